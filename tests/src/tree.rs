//! Changes to a directory tree, and whether two trees are the same.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
};

use harness::listing;

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// Writes a file and sets its mode.
    File(String, Vec<u8>, u32),
    /// Makes a directory and sets its mode.
    Dir(String, u32),
    /// Removes whatever is there.
    Remove(String),
    /// Makes a hard link (existing, new).
    Link(String, String),
    /// Renames (old, new).
    Rename(String, String),
    /// Changes the owner.
    Chown(String, u32, u32),
}

/// [`Change::File`].
pub fn file(path: &str, content: impl AsRef<[u8]>, mode: u32) -> Change {
    Change::File(path.to_owned(), content.as_ref().to_vec(), mode)
}

/// [`Change::Dir`].
pub fn dir(path: &str, mode: u32) -> Change {
    Change::Dir(path.to_owned(), mode)
}

/// [`Change::Remove`].
pub fn remove(path: &str) -> Change {
    Change::Remove(path.to_owned())
}

/// [`Change::Link`].
pub fn link(existing: &str, new: &str) -> Change {
    Change::Link(existing.to_owned(), new.to_owned())
}

/// [`Change::Rename`].
pub fn rename(old: &str, new: &str) -> Change {
    Change::Rename(old.to_owned(), new.to_owned())
}

/// [`Change::Chown`].
pub fn owner(path: &str, uid: u32, gid: u32) -> Change {
    Change::Chown(path.to_owned(), uid, gid)
}

/// Applies changes below `root`, in order.
pub fn apply(root: &Path, changes: &[Change]) -> io::Result<()> {
    for change in changes {
        apply_one(root, change)
            .map_err(|error| io::Error::new(error.kind(), format!("{error}: {change:?}")))?;
    }
    Ok(())
}

fn apply_one(root: &Path, change: &Change) -> io::Result<()> {
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    match change {
        Change::File(path, content, mode) => {
            fs::write(at(path), content)?;
            fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
        }
        Change::Dir(path, mode) => {
            fs::create_dir(at(path))?;
            fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
        }
        Change::Remove(path) => {
            if fs::symlink_metadata(at(path))?.is_dir() {
                fs::remove_dir_all(at(path))
            } else {
                fs::remove_file(at(path))
            }
        }
        Change::Link(existing, new) => fs::hard_link(at(existing), at(new)),
        Change::Rename(old, new) => fs::rename(at(old), at(new)),
        Change::Chown(path, uid, gid) => chown(at(path), Some(*uid), Some(*gid)),
    }
}

/// Asserts that two trees are the same but for times, inode numbers and the attributes of their
/// roots.
///
/// # Panics
/// When they differ or cannot be read.
pub fn assert_same(expected: &Path, actual: &Path) {
    let list = |root| {
        let mut rows = listing::list(root).expect("a readable tree");
        rows.remove(Path::new(""));
        for row in rows.values_mut() {
            row.ino = 0;
            row.mtime = 0;
        }
        rows
    };
    let (expected, actual) = (list(expected), list(actual));
    assert!(
        expected == actual,
        "trees differ:\nexpected {expected:#?}\nactual   {actual:#?}"
    );
}
