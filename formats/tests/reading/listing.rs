//! A layer's tree as rows, and the same rows from the fixtures' ground truth.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use formats::{
    digest::Digest,
    tree::{InodeId, Kind, LayerTree},
};

/// Path to what stands there, column by column.
pub(crate) type Listing = BTreeMap<String, Row>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) kind: String,
    pub(crate) mode: String,
    pub(crate) owner: String,
    pub(crate) size: String,
    /// Whole and fractional seconds; "*" where the layer does not say.
    pub(crate) mtime: String,
    pub(crate) rdev: String,
    pub(crate) nlink: String,
    /// The smallest name of a group of hard links.
    pub(crate) hard_link: String,
    pub(crate) target: String,
    pub(crate) xattrs: String,
    pub(crate) sha256: String,
}

fn escape(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        if (0x21..=0x7e).contains(byte) && *byte != b'\\' {
            out.push(char::from(*byte));
        } else {
            write!(out, "\\x{byte:02x}").expect("writes to a string");
        }
        out
    })
}

/// Reads `layer-lN.tsv` or `edge.tsv`: what `truth.py` made of a tar. The root is left out, as it
/// is whatever an unpack makes it; whiteouts become rows of type `whiteout` and `opaque`.
pub(crate) fn truth(path: &Path) -> Listing {
    let text = fs::read_to_string(path).expect("a listing");
    let mut rows = Listing::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<&str> = line.split('\t').collect();
        let [
            path,
            kind,
            mode,
            uid,
            gid,
            size,
            mtime,
            rdev,
            _nlink,
            nlink,
            hard_link,
            target,
            xattrs,
            sha256,
            flags,
        ] = columns[..]
        else {
            panic!("{line}");
        };
        let (parent, name) = path.rsplit_once('/').expect("an absolute path");
        if path == "/" {
            continue;
        }
        if name == ".wh..wh..opq" {
            rows.insert(format!("{parent}/"), marker("opaque"));
            continue;
        }
        if let Some(name) = name.strip_prefix(".wh.") {
            // Names such as ".whale" are no whiteouts, and do not have this prefix.
            rows.insert(format!("{parent}/{name}"), marker("whiteout"));
            continue;
        }
        let implied = flags == "implicit";
        rows.insert(
            path.to_owned(),
            Row {
                kind: kind.to_owned(),
                mode: mode.to_owned(),
                owner: format!("{uid}:{gid}"),
                size: size.to_owned(),
                mtime: if implied { "*" } else { mtime }.to_owned(),
                rdev: rdev.to_owned(),
                nlink: nlink.to_owned(),
                hard_link: hard_link.to_owned(),
                target: target.to_owned(),
                xattrs: xattrs.to_owned(),
                sha256: sha256.to_owned(),
            },
        );
    }
    rows
}

fn marker(kind: &str) -> Row {
    Row {
        kind: kind.to_owned(),
        mode: String::new(),
        owner: String::new(),
        size: String::new(),
        mtime: String::new(),
        rdev: String::new(),
        nlink: String::new(),
        hard_link: String::new(),
        target: String::new(),
        xattrs: String::new(),
        sha256: String::new(),
    }
}

/// Lists a tree; `content` gives the bytes of a regular file.
pub(crate) fn of_tree(tree: &LayerTree, content: &dyn Fn(InodeId) -> Vec<u8>) -> Listing {
    let mut rows = Listing::new();
    let mut names: BTreeMap<InodeId, String> = BTreeMap::new();
    let mut queue = vec![(String::new(), InodeId::ROOT)];
    while let Some((path, id)) = queue.pop() {
        let directory = tree.directory(id).expect("only directories are queued");
        if directory.opaque {
            rows.insert(format!("{path}/"), marker("opaque"));
        }
        for (name, child) in &directory.entries {
            let path = format!("{path}/{}", escape(name));
            if tree.directory(*child).is_some() {
                queue.push((path.clone(), *child));
            } else {
                let smallest = names.entry(*child).or_insert_with(|| path.clone());
                if path < *smallest {
                    smallest.clone_from(&path);
                }
            }
            rows.insert(path, row(tree, *child, content));
        }
    }
    // Second pass: the group of a name is only known when all were seen.
    let mut queue = vec![(String::new(), InodeId::ROOT)];
    while let Some((path, id)) = queue.pop() {
        for (name, child) in &tree.directory(id).expect("a directory").entries {
            let path = format!("{path}/{}", escape(name));
            if tree.directory(*child).is_some() {
                queue.push((path, *child));
            } else if tree.inode(*child).nlink > 1 {
                let row = rows.get_mut(&path).expect("listed above");
                row.hard_link.clone_from(&names[child]);
            }
        }
    }
    rows
}

fn row(tree: &LayerTree, id: InodeId, content: &dyn Fn(InodeId) -> Vec<u8>) -> Row {
    let inode = tree.inode(id);
    let none = || "-".to_owned();
    let (mut size, mut rdev, mut target, mut sha256) = (0, none(), none(), none());
    let mut implied = false;
    let kind = match &inode.kind {
        Kind::Directory(directory) => {
            implied = directory.implied;
            "dir"
        }
        Kind::Regular(regular) => {
            size = regular.size;
            sha256 = Digest::of(&content(id)).hex();
            "reg"
        }
        Kind::Symlink(to) => {
            size = to.len() as u64;
            target = escape(to);
            "sym"
        }
        Kind::CharDevice(number) => {
            rdev = format!("{}:{}", number.major, number.minor);
            "chr"
        }
        Kind::BlockDevice(number) => {
            rdev = format!("{}:{}", number.major, number.minor);
            "blk"
        }
        Kind::Fifo => "fifo",
        Kind::Whiteout => return marker("whiteout"),
    };
    let attrs = &inode.attrs;
    let xattrs: Vec<String> = attrs
        .xattrs
        .iter()
        .map(|(key, value)| {
            let hex = value.iter().fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").expect("writes to a string");
                hex
            });
            format!("{}={hex}", escape(key))
        })
        .collect();
    Row {
        kind: kind.to_owned(),
        mode: format!("{:04o}", attrs.mode),
        owner: format!("{}:{}", attrs.uid, attrs.gid),
        size: size.to_string(),
        mtime: if implied {
            "*".to_owned()
        } else {
            format!("{}.{:09}", attrs.mtime.seconds, attrs.mtime.nanos)
        },
        rdev,
        nlink: if kind == "dir" {
            none()
        } else {
            inode.nlink.to_string()
        },
        hard_link: none(),
        target,
        xattrs: if xattrs.is_empty() {
            none()
        } else {
            xattrs.join(",")
        },
        sha256,
    }
}

/// Panics with the first differences.
pub(crate) fn assert_same(what: &str, expected: &Listing, actual: &Listing) {
    let paths: std::collections::BTreeSet<_> = expected.keys().chain(actual.keys()).collect();
    let differences: Vec<String> = paths
        .into_iter()
        .filter(|path| expected.get(*path) != actual.get(*path))
        .take(10)
        .map(|path| {
            format!(
                "{path}\n  expected {:?}\n  actual   {:?}",
                expected.get(path),
                actual.get(path)
            )
        })
        .collect();
    assert!(
        differences.is_empty(),
        "{what}:\n{}",
        differences.join("\n")
    );
}
