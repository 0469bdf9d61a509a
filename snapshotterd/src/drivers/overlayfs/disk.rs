//! Directories of snapshots.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::Owner;
use crate::store::{SnapshotId, Usage};

/// Creates a directory that only root may list, with its parents.
pub(super) fn make_private(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Makes `fs` and, for an active snapshot, `work` below `directory`. Modes hold whatever the
/// process's umask is.
pub(super) fn create(directory: &Path, work: bool, owner: Option<Owner>) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(directory)?;
    let layer = directory.join("fs");
    fs::create_dir(&layer)?;
    fs::set_permissions(&layer, fs::Permissions::from_mode(0o755))?;
    if let Some(Owner { uid, gid }) = owner
        && (uid, gid) != (0, 0)
    {
        std::os::unix::fs::lchown(&layer, Some(uid), Some(gid))?;
    }
    if work {
        let work = directory.join("work");
        fs::create_dir(&work)?;
        fs::set_permissions(&work, fs::Permissions::from_mode(0o711))?;
    }
    Ok(())
}

/// Lets the symbolic link `link` point to `target`, replacing what is there.
pub(super) fn point(link: &Path, target: &Path) -> io::Result<()> {
    match fs::read_link(link) {
        Ok(current) if current == target => return Ok(()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match std::os::unix::fs::symlink(target, link) {
                // Somebody else was faster, with the same target: ids are not reused.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => return other,
            }
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    // Another root used the same directory for links before.
    let new = link.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new)?;
    fs::rename(&new, link)
}

/// The entries of `directory` that are named `<prefix><id>`.
pub(super) fn numbered(directory: &Path, prefix: &str) -> io::Result<Vec<(SnapshotId, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let id = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix))
            .filter(|digits| !digits.starts_with(['0', '+']))
            .and_then(|digits| digits.parse().ok());
        if let Some(id) = id {
            found.push((SnapshotId(id), entry.path()));
        }
    }
    Ok(found)
}

/// Deletes a directory with all that is in it, or a link; nothing there is fine.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Allocated bytes and inodes below and including `root`, hard links counted once. Files that
/// vanish meanwhile are not counted; other file systems mounted below are not entered.
pub(super) fn usage(root: &Path) -> io::Result<Usage> {
    const BLOCK_BYTES: u64 = 512;
    let top = fs::symlink_metadata(root)?;
    let device = top.dev();
    let mut usage = Usage {
        bytes: top.blocks().saturating_mul(BLOCK_BYTES),
        inodes: 1,
    };
    let mut linked = HashSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            if metadata.dev() != device {
                continue;
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            } else if metadata.nlink() > 1 && !linked.insert(metadata.ino()) {
                continue;
            }
            usage.bytes = usage
                .bytes
                .saturating_add(metadata.blocks().saturating_mul(BLOCK_BYTES));
            usage.inodes += 1;
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_links_once_and_removes_what_is_there() -> io::Result<()> {
        let temp = tempfile::tempdir()?;
        let directory = temp.path().join("7");
        create(&directory, true, None)?;
        let layer = directory.join("fs");
        fs::write(layer.join("a"), vec![1; 10_000])?;
        fs::hard_link(layer.join("a"), layer.join("b"))?;
        std::os::unix::fs::symlink("a", layer.join("c"))?;
        fs::create_dir(layer.join("d"))?;
        let counted = usage(&layer)?;
        assert_eq!(counted.inodes, 4);
        assert!(
            counted.bytes >= 10_000 && counted.bytes < 100_000,
            "{counted:?}"
        );
        assert_eq!(fs::metadata(&layer)?.permissions().mode() & 0o7777, 0o755);
        assert_eq!(
            numbered(temp.path(), "")?,
            [(SnapshotId(7), directory.clone())]
        );
        remove(&directory)?;
        remove(&directory)?;
        assert!(!directory.exists());
        Ok(())
    }

    #[test]
    fn points_again_after_the_target_has_moved() -> io::Result<()> {
        let temp = tempfile::tempdir()?;
        let link = temp.path().join("s1");
        for target in ["/a", "/a", "/b"] {
            point(&link, Path::new(target))?;
            assert_eq!(fs::read_link(&link)?, Path::new(target));
        }
        Ok(())
    }
}
