use super::{layout::BLOCK, *};
use crate::{
    limits::Limits,
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Mtime, Rdev, Regular},
    units::DecodedOffset,
};

fn inode(kind: Kind) -> Inode {
    Inode {
        attrs: Attrs {
            mode: 0o755,
            uid: 70_000,
            gid: 80_000,
            mtime: Mtime {
                seconds: -77,
                nanos: 5,
            },
            ..Attrs::default()
        },
        kind,
        nlink: 1,
    }
}

fn root(inodes: Vec<(&str, Inode)>) -> LayerTree {
    let mut directory = Directory::default();
    let mut all = vec![inode(Kind::Fifo)];
    for (name, child) in inodes {
        let id = InodeId(u32::try_from(all.len()).unwrap());
        directory.entries.insert(name.as_bytes().to_vec(), id);
        all.push(child);
    }
    all[0] = inode(Kind::Directory(directory));
    all[0].nlink = 2;
    LayerTree::from_inodes(all).unwrap()
}

fn file(size: u64, decoded: u64) -> Inode {
    inode(Kind::Regular(Regular {
        size,
        extents: vec![Extent {
            file_offset: 0,
            len: size,
            decoded: DecodedOffset(decoded),
        }],
    }))
}

fn read(image: &[u8]) -> Result<LayerTree, ReadError> {
    Image::open(image)?.tree(&Limits::default())
}

#[test]
fn an_empty_layer_is_one_block() {
    let image = write(&LayerTree::empty(), 0).unwrap();
    assert_eq!(image.len() as u64, BLOCK);
    let opened = Image::open(&image).unwrap();
    assert_eq!(opened.device_len(), Some(0));
    assert_eq!(opened.inode_count(), 1);
    let tree = opened.tree(&Limits::default()).unwrap();
    assert!(tree.directory(InodeId::ROOT).unwrap().entries.is_empty());
}

#[test]
fn the_uuid_tells_images_apart() {
    let one = write(&root(vec![("a", file(1, 0))]), 4096).unwrap();
    let same = write(&root(vec![("a", file(1, 0))]), 4096).unwrap();
    let other = write(&root(vec![("a", file(2, 0))]), 4096).unwrap();
    assert_eq!(one, same);
    let uuid = |image: &[u8]| Image::open(image).unwrap().uuid();
    assert_ne!(uuid(&one), [0; 16]);
    assert_ne!(uuid(&one), uuid(&other));
}

#[test]
fn names_before_the_dot_keep_the_order() {
    let names = ["!x", "-", ".", "..", ".a", "..a", "/", "A", "~"];
    let tree = root(
        names
            .iter()
            .filter(|name| !matches!(**name, "." | ".." | "/"))
            .map(|name| (*name, file(1, 0)))
            .collect(),
    );
    // The reader refuses entries that are out of order: the kernel would not find them.
    assert_eq!(read(&write(&tree, 4096).unwrap()), Ok(tree.in_order()));
}

#[test]
fn a_directory_fills_its_blocks_to_the_last_byte() {
    // `.` and `..` take 27 bytes; a directory of exactly one block has no tail behind its inode.
    // The third one's second block lies behind the inode.
    for room in [4068, 4069, 4070] {
        let mut left: usize = room;
        let mut inodes = Vec::new();
        let mut names = Vec::new();
        while left > 0 {
            let len = if left > 450 {
                200
            } else {
                left.div_ceil(1 + left / 251)
            };
            names.push(format!("{:0len$}", names.len(), len = len - 12));
            left -= len;
        }
        for name in &names {
            inodes.push((name.as_str(), inode(Kind::Fifo)));
        }
        let tree = root(inodes);
        let image = write(&tree, 0).unwrap();
        assert_eq!(image.len(), 2 * 4096, "{room}");
        assert_eq!(read(&image), Ok(tree.in_order()));
    }
}

#[test]
fn every_problem_names_its_path() {
    let problem = |child: Inode, device_len: u64| match write(&root(vec![("p", child)]), device_len)
    {
        Err(WriteError::Inode { path, problem }) => {
            assert_eq!(path, "p");
            problem
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        problem(inode(Kind::Symlink(Vec::new())), 0),
        InodeProblem::Target
    );
    assert_eq!(
        problem(inode(Kind::Symlink(vec![b'a'; 4096])), 0),
        InodeProblem::Target
    );
    assert_eq!(
        problem(inode(Kind::Symlink(b"a\0b".to_vec())), 0),
        InodeProblem::Target
    );
    let device = Rdev {
        major: 4096,
        minor: 0,
    };
    assert_eq!(
        problem(inode(Kind::CharDevice(device)), 0),
        InodeProblem::DeviceNumber {
            major: 4096,
            minor: 0
        }
    );
    assert_eq!(
        problem(file(10, 0), 9),
        InodeProblem::BeyondDevice {
            end: 10,
            device_len: 9
        }
    );
    let mut named = inode(Kind::Fifo);
    named
        .attrs
        .xattrs
        .insert(b"user.x".to_vec(), vec![0; 65536]);
    assert_eq!(problem(named, 0), InodeProblem::XattrValue);
    assert_eq!(
        write(&LayerTree::empty(), u64::MAX),
        Err(WriteError::DeviceTooLarge(u64::MAX))
    );
    // A file of holes and crumbs may ask for more indexes than an image holds.
    let crumb = Extent {
        file_offset: 4096,
        len: 4096,
        decoded: DecodedOffset(0),
    };
    let sparse = inode(Kind::Regular(Regular {
        size: 1 << 60,
        extents: vec![crumb],
    }));
    assert!(matches!(
        write(&root(vec![("s", sparse)]), 4096),
        Err(WriteError::TooLarge { .. })
    ));
}

#[test]
fn a_whiteout_carries_nothing() {
    let mut whiteout = inode(Kind::Whiteout);
    whiteout
        .attrs
        .xattrs
        .insert(b"user.x".to_vec(), b"y".to_vec());
    let tree = read(&write(&root(vec![("w", whiteout)]), 0).unwrap()).unwrap();
    let read = tree.inode(tree.lookup(b"w").unwrap());
    assert_eq!(read.kind, Kind::Whiteout);
    assert_eq!(read.attrs, Attrs::default());
}

#[test]
fn a_changed_superblock_is_noticed() {
    let mut image = write(&root(vec![("a", file(1, 0))]), 4096).unwrap();
    image[1300] ^= 1;
    assert!(matches!(
        Image::open(&image),
        Err(ReadError::Checksum { .. })
    ));
    image[1024] ^= 1;
    assert!(matches!(Image::open(&image), Err(ReadError::Magic)));
    assert!(matches!(Image::open(b""), Err(ReadError::Corrupt { .. })));
}
