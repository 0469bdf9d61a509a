//! One tree that mkfs.erofs 1.9 wrote in several ways, against a listing made without it.
//!
//! The files are data of the interop fixtures (`SNAPSHOTTERD_FIXTURES`, else `shared/fixtures` of
//! the workspace), which not every checkout has.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use formats::{
    digest::Digest,
    erofs::Image,
    limits::Limits,
    tree::{InodeId, Kind, LayerTree},
};
use skip::skip;

fn fixtures() -> Option<PathBuf> {
    let dir = std::env::var_os("SNAPSHOTTERD_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures"),
        PathBuf::from,
    );
    let packed = Command::new("zstd").arg("--version").output().is_ok();
    (packed && dir.join("erofs/chunk4k.erofs.zst").exists()).then_some(dir)
}

fn unpacked(path: &Path) -> Vec<u8> {
    let output = Command::new("zstd")
        .args(["-q", "-d", "-c", "--long=27"])
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{path:?}");
    output.stdout
}

#[test]
fn fixtures_read_as_listed() {
    let Some(dir) = fixtures() else {
        skip("the interop fixtures or the zstd program are not here");
        return;
    };
    let listing = fs::read_to_string(dir.join("tree/tree.tsv")).unwrap();
    for (image, data) in [
        ("erofs/dir-plain.erofs.zst", None),
        ("erofs/chunk4k.erofs.zst", Some("erofs/chunk4k.blob.zst")),
    ] {
        let image = unpacked(&dir.join(image));
        let data = data.map_or_else(|| image.clone(), |path| unpacked(&dir.join(path)));
        let tree = Image::open(&image)
            .unwrap()
            .tree(&Limits::default())
            .unwrap();
        let read = list(&tree, &data);
        let mut rows = 0;
        for row in listing.lines().filter(|line| !line.starts_with('#')) {
            let mut columns: Vec<&str> = row.split('\t').collect();
            if columns[14] == "implicit-upper" || columns[14] == "implicit" {
                // Times of directories without an entry differ from tool to tool.
                columns[6] = "*";
            }
            // The images were made from an unpack by containerd, which sets no trusted xattrs.
            let kept: Vec<&str> = columns[12]
                .split(',')
                .filter(|xattr| !xattr.starts_with("trusted."))
                .collect();
            let kept = kept.join(",");
            columns[12] = if kept.is_empty() { "-" } else { &kept };
            let expected = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13].map(|column| columns[column]);
            let mut found = read[expected[0]].clone();
            if expected[6] == "*" {
                found[6] = "*".to_owned();
            }
            assert_eq!(found, expected);
            rows += 1;
        }
        assert_eq!(rows, read.len());
    }
    for name in ["layer2-tari", "layer3-tari", "layer4-tari"] {
        let image = fs::read(dir.join(format!("erofs/{name}.erofs"))).unwrap();
        let tree = Image::open(&image).unwrap().tree(&Limits::default());
        assert!(tree.unwrap().inodes().len() > 1, "{name}");
    }
}

/// Path, type, mode, uid, gid, size, mtime, rdev, target, xattrs, sha256.
fn list(tree: &LayerTree, data: &[u8]) -> BTreeMap<String, [String; 11]> {
    let mut rows = BTreeMap::new();
    let mut queue = vec![(String::from("/"), InodeId::ROOT)];
    while let Some((path, id)) = queue.pop() {
        let inode = tree.inode(id);
        let none = || "-".to_owned();
        let (mut rdev, mut target, mut digest, mut size) = (none(), none(), none(), 0);
        let mut device = |device: &formats::tree::Rdev| {
            rdev = format!("{}:{}", device.major, device.minor);
        };
        let kind = match &inode.kind {
            Kind::Directory(directory) => {
                for (name, child) in &directory.entries {
                    let below = format!("{}/{}", path.trim_end_matches('/'), escaped(name));
                    queue.push((below, *child));
                }
                "dir"
            }
            Kind::Regular(file) => {
                size = file.size;
                let mut bytes = vec![0; usize::try_from(size).unwrap()];
                for extent in &file.extents {
                    let to = usize::try_from(extent.file_offset).unwrap();
                    let from = usize::try_from(extent.decoded.0).unwrap();
                    let len = usize::try_from(extent.len).unwrap();
                    bytes[to..to + len].copy_from_slice(&data[from..from + len]);
                }
                digest = Digest::of(&bytes).hex();
                "reg"
            }
            Kind::Symlink(link) => {
                size = link.len() as u64;
                target = escaped(link);
                "sym"
            }
            Kind::CharDevice(number) => {
                device(number);
                "chr"
            }
            Kind::BlockDevice(number) => {
                device(number);
                "blk"
            }
            Kind::Fifo => "fifo",
            Kind::Whiteout => "whiteout",
        };
        let xattrs: Vec<String> = inode
            .attrs
            .xattrs
            .iter()
            .map(|(name, value)| {
                let mut text = escaped(name) + "=";
                for byte in value {
                    write!(text, "{byte:02x}").unwrap();
                }
                text
            })
            .collect();
        let xattrs = if xattrs.is_empty() {
            none()
        } else {
            xattrs.join(",")
        };
        let attrs = &inode.attrs;
        let row = [
            path.clone(),
            kind.to_owned(),
            format!("{:04o}", attrs.mode),
            attrs.uid.to_string(),
            attrs.gid.to_string(),
            size.to_string(),
            format!("{}.{:09}", attrs.mtime.seconds, attrs.mtime.nanos),
            rdev,
            target,
            xattrs,
            digest,
        ];
        rows.insert(path, row);
    }
    rows
}

fn escaped(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        match byte {
            b'\\' => text.push_str("\\x5c"),
            b'!'..=b'~' => text.push(char::from(*byte)),
            other => write!(text, "\\x{other:02x}").unwrap(),
        }
    }
    text
}
