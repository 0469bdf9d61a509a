//! Mounting what a snapshotter answers, by plain mount(2): no option compaction, no helper.

use std::{ffi::CString, io, path::Path};

use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind_recursive, mount_remount, unmount,
};
use snapshotterd::api::types::Mount;

/// Mounts `mounts` one over the other at `target`.
pub fn mount_all(mounts: &[Mount], target: &Path) -> io::Result<()> {
    for entry in mounts {
        mount_one(entry, target)
            .map_err(|error| io::Error::new(error.kind(), format!("{error}: {entry:?}")))?;
    }
    Ok(())
}

/// Unmounts everything at `target`.
pub fn unmount_all(target: &Path) -> io::Result<()> {
    loop {
        match unmount(target, UnmountFlags::empty()) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn mount_one(entry: &Mount, target: &Path) -> io::Result<()> {
    let target = match entry.target.as_str() {
        "" => target.to_owned(),
        below => target.join(below.trim_start_matches('/')),
    };
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    let mut bind = entry.r#type == "bind";
    for option in &entry.options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rbind" | "bind" => bind = true,
            "rw" => {}
            other => data.push(other),
        }
    }
    if bind {
        mount_bind_recursive(entry.source.as_str(), &target)?;
        if flags.contains(MountFlags::RDONLY) {
            mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, c"")?;
        }
        return Ok(());
    }
    let data = CString::new(data.join(","))?;
    mount(
        entry.source.as_str(),
        &target,
        entry.r#type.as_str(),
        flags,
        data.as_c_str(),
    )?;
    Ok(())
}
