//! Listings of a directory tree with every attribute a container can see.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use formats::digest::Digest;

/// Everything compared of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// `st_mode`: type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size (regular files and symlinks; 0 otherwise).
    pub size: u64,
    /// Modification time, whole seconds.
    pub mtime: i64,
    /// Links (not for directories).
    pub nlink: u64,
    /// Device number of a device node.
    pub rdev: u64,
    /// Smallest path of the same inode.
    pub group: PathBuf,
    /// Symlink target.
    pub target: Option<PathBuf>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// SHA-256 of a regular file.
    pub digest: Option<Digest>,
    /// Inode number.
    pub ino: u64,
}

/// A tree by path relative to its root.
pub type Listing = BTreeMap<PathBuf, Row>;

/// Lists `root` without crossing into other file systems than the root's own view (an overlay
/// reports several devices, so device numbers are not looked at).
pub fn list(root: &Path) -> std::io::Result<Listing> {
    let mut listing = Listing::new();
    let mut groups: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    walk(root, Path::new(""), &mut listing, &mut groups)?;
    // The walk is sorted per directory, not over the whole tree: settle groups on the smallest name.
    let mut smallest: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for (path, row) in &listing {
        smallest
            .entry(row.group.clone())
            .or_insert_with(|| path.clone());
    }
    for row in listing.values_mut() {
        if let Some(path) = smallest.get(&row.group) {
            row.group = path.clone();
        }
    }
    Ok(listing)
}

fn walk(
    root: &Path,
    relative: &Path,
    listing: &mut Listing,
    groups: &mut BTreeMap<(u64, u64), PathBuf>,
) -> std::io::Result<()> {
    let path = root.join(relative);
    let meta = fs::symlink_metadata(&path)?;
    let kind = meta.file_type();
    let group = if kind.is_dir() {
        relative.to_owned()
    } else {
        groups
            .entry((meta.dev(), meta.ino()))
            .or_insert_with(|| relative.to_owned())
            .clone()
    };
    let row = Row {
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        size: if kind.is_file() || kind.is_symlink() {
            meta.size()
        } else {
            0
        },
        mtime: meta.mtime(),
        nlink: if kind.is_dir() { 0 } else { meta.nlink() },
        rdev: meta.rdev(),
        group,
        target: if kind.is_symlink() {
            Some(fs::read_link(&path)?)
        } else {
            None
        },
        xattrs: xattrs(&path)?,
        digest: if kind.is_file() {
            Some(Digest::of(&fs::read(&path)?))
        } else {
            None
        },
        ino: meta.ino(),
    };
    listing.insert(relative.to_owned(), row);
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        for name in names {
            walk(root, &relative.join(name), listing, groups)?;
        }
    }
    Ok(())
}

fn xattrs(path: &Path) -> std::io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value)?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// What may differ between a lazily served tree and an ordinary serial pull by containerd.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Directories no entry of any layer describes: their mtime is the time of the unpack.
    pub implied: Vec<PathBuf>,
}

/// Differences between the oracle (an ordinary pull) and a lazily served tree, in words. Left out
/// is what a TOC cannot hold or an unpack does not restore: attributes of the root, mtimes of
/// implied directories, landmarks and the TOC file.
pub fn differences(oracle: &Listing, lazy: &Listing, allowed: &Allowed) -> Vec<String> {
    let hidden = |path: &Path| {
        [
            ".prefetch.landmark",
            ".no.prefetch.landmark",
            "stargz.index.json",
        ]
        .iter()
        .any(|name| path == Path::new(name))
    };
    let mut found = Vec::new();
    for path in oracle
        .keys()
        .filter(|path| !lazy.contains_key(*path) && !hidden(path))
    {
        found.push(format!("{}: missing", path.display()));
    }
    for (path, row) in lazy {
        let Some(expected) = oracle.get(path) else {
            found.push(format!("{}: not in an ordinary pull", path.display()));
            continue;
        };
        if path.as_os_str().is_empty() {
            continue;
        }
        let mut expected = Row {
            ino: row.ino,
            ..expected.clone()
        };
        if allowed.implied.contains(path) {
            expected.mtime = row.mtime;
        }
        if expected != *row {
            found.push(format!(
                "{}:\n    ordinary {expected:?}\n    lazy     {row:?}",
                path.display()
            ));
        }
    }
    found
}
