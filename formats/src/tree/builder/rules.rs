//! What single values of an entry may be.

use crate::{
    limits::Limits,
    tree::{BuildError, Mtime, NotLazyReason, Rdev, TreePath, Xattrs},
};

pub(super) fn count_name(path: &[u8], names: &mut u32, limits: &Limits) -> Result<(), BuildError> {
    if *names >= limits.max_entries {
        return Err(BuildError::Limit {
            path: TreePath::new(path),
            what: "number of names",
            actual: u64::from(*names) + 1,
            limit: u64::from(limits.max_entries),
        });
    }
    *names += 1;
    Ok(())
}

/// Whether an index that holds only Unicode text gives `bytes` back unchanged, and says so: U+FFFD
/// may stand for itself or for a byte that was no text.
pub(super) fn is_exact_text(bytes: &[u8]) -> bool {
    bytes.is_ascii()
        || core::str::from_utf8(bytes).is_ok_and(|text| !text.contains(char::REPLACEMENT_CHARACTER))
}

/// What `chtimes` of an ordinary unpack leaves: nothing outside `[1970, 2^63 ns]`.
pub(super) fn bounded(mtime: Mtime) -> Mtime {
    const LAST: Mtime = Mtime {
        seconds: i64::MAX / 1_000_000_000,
        nanos: 854_775_807,
    };
    if mtime.seconds < 0 || mtime > LAST {
        return Mtime::default();
    }
    mtime
}

pub(super) fn checked_rdev(path: &[u8], rdev: Rdev) -> Result<Rdev, BuildError> {
    if rdev.major < 1 << 12 && rdev.minor < 1 << 20 {
        return Ok(rdev);
    }
    Err(NotLazyReason::DeviceNumber {
        path: TreePath::new(path),
        major: rdev.major,
        minor: rdev.minor,
    }
    .into())
}

pub(super) fn xattr_bytes(path: &[u8], xattrs: &Xattrs, limits: &Limits) -> Result<(), BuildError> {
    let bytes: usize = xattrs
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    let actual = bytes as u64;
    let limit = u64::from(limits.max_xattr_bytes);
    if actual <= limit {
        return Ok(());
    }
    Err(BuildError::Limit {
        path: TreePath::new(path),
        what: "bytes of xattrs",
        actual,
        limit,
    })
}

pub(super) fn name_error(path: &[u8], why: &'static str) -> BuildError {
    NotLazyReason::Name {
        path: TreePath::new(path),
        why,
    }
    .into()
}

pub(super) fn not_a_directory(path: &[u8]) -> BuildError {
    NotLazyReason::ParentNotDirectory {
        path: TreePath::new(path),
    }
    .into()
}
