//! Mounts as the snapshots service states them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        mount_bind, mount_bind_recursive, mount_change, mount_remount, move_mount,
    },
};
use serde::{Deserialize, Serialize};

use super::RunError;

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `overlay`, `bind`, or a kernel file system.
    pub kind: String,
    /// Source path or name.
    pub source: String,
    /// Path inside the root file system; empty is the root.
    pub target: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// Nothing mounted from here on is seen outside.
pub(super) fn make_private() -> Result<(), RunError> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(io::Error::from)
    .map_err(RunError::step("making mounts private"))
}

pub(super) fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<(), RunError> {
    for mount in mounts {
        // The target comes from the snapshotter, not from the image; still, stay inside.
        let target: PathBuf = Path::new(&mount.target)
            .components()
            .filter(|part| matches!(part, std::path::Component::Normal(_)))
            .fold(rootfs.to_owned(), |path, part| path.join(part));
        match mount.kind.as_str() {
            "bind" => bind(mount, &target)?,
            kind if kind.contains('/') => return Err(RunError::UnknownMount(kind.to_owned())),
            kind => new_mount(kind, mount, &target)?,
        }
    }
    Ok(())
}

fn bind(mount: &Mount, target: &Path) -> Result<(), RunError> {
    let source = Path::new(&mount.source);
    let failed = || {
        RunError::step(format!(
            "binding {} to {}",
            source.display(),
            target.display()
        ))
    };
    let recursive = mount.options.iter().any(|option| option == "rbind");
    let bound = if recursive {
        mount_bind_recursive(source, target)
    } else {
        mount_bind(source, target)
    };
    bound.map_err(io::Error::from).map_err(failed())?;
    if mount.options.iter().any(|option| option == "ro") {
        mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, c"")
            .map_err(io::Error::from)
            .map_err(failed())?;
    }
    Ok(())
}

/// By fsconfig: an overlay of many layers does not fit into the one page that mount(2) passes.
fn new_mount(kind: &str, mount: &Mount, target: &Path) -> Result<(), RunError> {
    let failed =
        |what: String| RunError::step(format!("mounting {kind} on {}: {what}", target.display()));
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(io::Error::from)
        .map_err(failed("the kernel has no such file system".into()))?;
    if !mount.source.is_empty() {
        fsconfig_set_string(&context, "source", mount.source.as_str())
            .map_err(io::Error::from)
            .map_err(failed("source".into()))?;
    }
    let mut attributes = MountAttrFlags::empty();
    for option in &mount.options {
        let set = |name: &str, value: &str| {
            fsconfig_set_string(&context, name, value).map_err(|error| told(&context, error))
        };
        let result = match option.split_once('=') {
            None if option == "ro" => {
                attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
                fsconfig_set_flag(&context, "ro").map_err(|error| told(&context, error))
            }
            None if option == "rw" => Ok(()),
            None => {
                fsconfig_set_flag(&context, option.as_str()).map_err(|error| told(&context, error))
            }
            // One parameter each: values of fsconfig end at 256 bytes. `lowerdir+` is there since 6.7.
            Some(("lowerdir", list)) if kind == "overlay" => {
                let each = list
                    .split(':')
                    .try_for_each(|lower| set("lowerdir+", lower));
                each.or_else(|error| {
                    if list.len() < 256 {
                        set("lowerdir", list)
                    } else {
                        Err(error)
                    }
                })
            }
            Some((name, value)) => set(name, value),
        };
        result.map_err(failed(format!("option {option:?}")))?;
    }
    fsconfig_create(&context)
        .map_err(|error| told(&context, error))
        .map_err(failed("refused".into()))?;
    let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(io::Error::from)
        .map_err(failed("fsmount".into()))?;
    move_mount(
        &mounted,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(io::Error::from)
    .map_err(failed("move_mount".into()))
}

/// Adds what the kernel wrote into the context's log to the errno.
fn told(context: &std::os::fd::OwnedFd, error: rustix::io::Errno) -> io::Error {
    let plain = io::Error::from(error);
    let Ok(clone) = context.try_clone() else {
        return plain;
    };
    let mut text = String::new();
    let mut buffer = [0; 1024];
    let file = File::from(clone);
    while let Ok(length) = io::Read::read(&mut &file, &mut buffer) {
        if length == 0 {
            break;
        }
        text.push_str(String::from_utf8_lossy(&buffer[..length]).trim());
        text.push(' ');
    }
    if text.is_empty() {
        plain
    } else {
        io::Error::new(plain.kind(), format!("{plain} ({})", text.trim()))
    }
}
