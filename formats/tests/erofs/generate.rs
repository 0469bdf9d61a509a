//! Random layer trees.

use formats::{
    tree::{
        Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Mtime, Rdev, Regular, Xattrs,
    },
    units::DecodedOffset,
};
use proptest::{collection::vec, prelude::*};

const BLOCK: u64 = 4096;

/// A random tree and the length of the device its files need.
pub(crate) fn tree() -> impl Strategy<Value = (LayerTree, u64)> {
    vec(step(), 0..60).prop_map(|steps| {
        let mut growing = Growing::default();
        for step in steps {
            growing.apply(step);
        }
        growing.finish()
    })
}

/// One change to a growing tree.
#[derive(Clone, Debug)]
struct Step {
    /// Which directory, or which inode to link.
    at: usize,
    name: Vec<u8>,
    attrs: Attrs,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Directory {
        opaque: bool,
    },
    /// Pieces as (hole before it in blocks, blocks, jump on the device in blocks), then what the
    /// last block lacks.
    File(Vec<(u64, u64, u64)>, u64),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Whiteout,
    Link(usize),
}

fn step() -> impl Strategy<Value = Step> {
    (any::<usize>(), name(), attrs(), what()).prop_map(|(at, name, attrs, what)| Step {
        at,
        name,
        attrs,
        what,
    })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![b'!'..=b'.', b'0'..=b'z', 1..=255_u8]
        .prop_filter("no slash", |byte| *byte != b'/');
    prop_oneof![
        4 => vec(byte.clone(), 1..20),
        1 => vec(byte, 200..256),
    ]
    .prop_filter("not a dot", |name| name != b"." && name != b"..")
}

fn attrs() -> impl Strategy<Value = Attrs> {
    let mtime = prop_oneof![
        Just((0, 0)),
        (any::<i64>(), 0..1_000_000_000_u32),
        (-3_i64..3, 0..1_000_000_000_u32),
    ];
    let key = prop_oneof![
        "user\\.[a-z]{1,8}",
        "user\\.[a-z]{200,240}",
        "trusted\\.[a-z]{1,8}",
        "security\\.[a-z]{1,8}",
        Just("system.posix_acl_access".to_owned()),
        Just("system.posix_acl_default".to_owned()),
    ];
    let value = prop_oneof![
        6 => vec(any::<u8>(), 0..40),
        1 => vec(any::<u8>(), 3000..5000),
    ];
    let xattrs = prop_oneof![
        3 => Just(Vec::new()),
        1 => vec((key, value), 1..5),
    ];
    (0..=0o7777_u16, any::<u32>(), any::<u32>(), mtime, xattrs).prop_map(
        |(mode, uid, gid, (seconds, nanos), xattrs)| Attrs {
            mode,
            uid,
            gid,
            mtime: Mtime { seconds, nanos },
            xattrs: xattrs
                .into_iter()
                .map(|(key, value)| (key.into_bytes(), value))
                .collect::<Xattrs>(),
        },
    )
}

fn what() -> impl Strategy<Value = What> {
    let target = prop_oneof![vec(1..=255_u8, 1..60), vec(1..=255_u8, 3900..4096)];
    let number = || (1..4096_u32, 0..1_u32 << 20);
    prop_oneof![
        3 => any::<bool>().prop_map(|opaque| What::Directory { opaque }),
        4 => (vec((0..3_u64, 1..5_u64, 0..3_u64), 0..5), 0..BLOCK)
            .prop_map(|(pieces, lacking)| What::File(pieces, lacking)),
        1 => target.prop_map(What::Symlink),
        1 => number().prop_map(|(major, minor)| What::Char(major, minor)),
        1 => number().prop_map(|(major, minor)| What::Block(major, minor)),
        1 => Just(What::Fifo),
        1 => Just(What::Whiteout),
        2 => any::<usize>().prop_map(What::Link),
    ]
}

struct Growing {
    inodes: Vec<Inode>,
    directories: Vec<InodeId>,
    others: Vec<InodeId>,
    device_blocks: u64,
}

impl Default for Growing {
    fn default() -> Self {
        Self {
            inodes: vec![Inode {
                attrs: Attrs::default(),
                kind: Kind::Directory(Directory::default()),
                nlink: 2,
            }],
            directories: vec![InodeId::ROOT],
            others: Vec::new(),
            device_blocks: 1,
        }
    }
}

impl Growing {
    fn apply(&mut self, step: Step) {
        let parent = self.directories[step.at % self.directories.len()];
        if self.entries(parent).entries.contains_key(&step.name) {
            return;
        }
        let kind = match step.what {
            What::Link(which) => {
                if let Some(id) = self.others.get(which % self.others.len().max(1)) {
                    let id = *id;
                    self.inodes[id.index()].nlink += 1;
                    self.entries(parent).entries.insert(step.name, id);
                }
                return;
            }
            What::Directory { opaque } => Kind::Directory(Directory {
                opaque,
                ..Directory::default()
            }),
            What::File(pieces, lacking) => Kind::Regular(self.file(&pieces, lacking)),
            What::Symlink(target) => Kind::Symlink(target),
            What::Char(major, minor) => Kind::CharDevice(Rdev { major, minor }),
            What::Block(major, minor) => Kind::BlockDevice(Rdev { major, minor }),
            What::Fifo => Kind::Fifo,
            What::Whiteout => Kind::Whiteout,
        };
        let id = InodeId(u32::try_from(self.inodes.len()).unwrap());
        let is_directory = matches!(kind, Kind::Directory(_));
        let attrs = if kind == Kind::Whiteout {
            Attrs::default()
        } else {
            step.attrs
        };
        self.inodes.push(Inode {
            attrs,
            kind,
            nlink: if is_directory { 2 } else { 1 },
        });
        self.entries(parent).entries.insert(step.name, id);
        if is_directory {
            self.inodes[parent.index()].nlink += 1;
            self.directories.push(id);
        } else {
            self.others.push(id);
        }
    }

    fn entries(&mut self, id: InodeId) -> &mut Directory {
        match &mut self.inodes[id.index()].kind {
            Kind::Directory(directory) => directory,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn file(&mut self, pieces: &[(u64, u64, u64)], lacking: u64) -> Regular {
        let mut file = Regular::default();
        let mut blocks = 0;
        for (hole, len, jump) in pieces {
            blocks += hole;
            self.device_blocks += jump;
            let next = Extent {
                file_offset: blocks * BLOCK,
                len: len * BLOCK,
                decoded: DecodedOffset(self.device_blocks * BLOCK),
            };
            match file.extents.last_mut() {
                Some(last) if *hole == 0 && *jump == 0 => last.len += next.len,
                _ => file.extents.push(next),
            }
            blocks += len;
            self.device_blocks += len;
        }
        file.size = (blocks * BLOCK).saturating_sub(lacking);
        if let Some(last) = file.extents.last_mut() {
            last.len -= lacking;
        }
        file
    }

    fn finish(self) -> (LayerTree, u64) {
        let device_len = self.device_blocks * BLOCK;
        let tree = LayerTree::from_inodes(self.inodes).expect("generated trees have a shape");
        (tree.in_order(), device_len)
    }
}
