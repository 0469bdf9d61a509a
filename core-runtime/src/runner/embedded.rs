//! The embedded engine: namespaces and pivot_root, for machines without an OCI runtime.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    mount::{
        MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_remount, move_mount,
        open_tree, unmount,
    },
    process::{chdir, pivot_root, umask},
    system::sethostname,
    thread::{CapabilitySet, UnshareFlags},
};

use super::{Container, Reexec, RunError, Stage, exit_code};

/// Outside: new namespaces for the child that becomes process 1, then waits for it.
pub(super) fn run(reexec: &Reexec, description: &Path) -> Result<u8, RunError> {
    let flags =
        UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
    crate::sys::unshare_namespaces(flags).map_err(RunError::step("making namespaces"))?;
    let status = Command::new(&reexec.program)
        .args(&reexec.args)
        .arg(Stage::Init.name())
        .arg(description)
        .status()
        .map_err(RunError::step("starting process 1"))?;
    Ok(exit_code(status))
}

/// Inside: finishes the root, enters it and becomes the program.
pub(super) fn init(container: &Container) -> Result<(), RunError> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(step("asking to die with the parent"))?;
    let rootfs = container.bundle.join("rootfs");
    let ids = container.process.credentials(&rootfs)?;
    // Without loopback a container cannot talk to itself; not fatal where the kernel has none.
    let _ = crate::sys::loopback_up();
    sethostname(container.hostname.as_bytes()).map_err(step("setting the host name"))?;
    // Bind sources are host paths: taken hold of before the host's tree is left. Everything else
    // happens inside, where a symbolic link of the image cannot lead out.
    let binds = container
        .binds
        .iter()
        .map(|(from, to, read_only)| {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            let tree = open_tree(CWD, from, flags)
                .map_err(step(&format!("binding {}", from.display())))?;
            Ok((tree, from.is_dir(), to, *read_only))
        })
        .collect::<Result<Vec<_>, RunError>>()?;
    enter(&rootfs)?;
    kernel_file_systems()?;
    for (tree, is_directory, to, read_only) in binds {
        let target = Path::new("/").join(to);
        let made = if is_directory {
            fs::create_dir_all(&target)
        } else {
            target
                .parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| {
                    fs::File::options()
                        .create(true)
                        .append(true)
                        .open(&target)
                        .map(drop)
                })
        };
        made.map_err(RunError::step(format!("making {}", target.display())))?;
        let what = format!("binding {} inside the container", target.display());
        move_mount(
            &tree,
            "",
            CWD,
            &target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(step(&what))?;
        if read_only {
            mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, c"")
                .map_err(step(&what))?;
        }
    }
    fs::create_dir_all(&container.process.cwd)
        .and_then(|()| std::env::set_current_dir(&container.process.cwd))
        .map_err(RunError::step(format!(
            "entering {}",
            container.process.cwd
        )))?;
    drop_capabilities();

    let process = &container.process;
    let program = find_program(&process.args[0], &process.env);
    let mut command = Command::new(&program);
    command
        .arg0(&process.args[0])
        .args(&process.args[1..])
        .env_clear();
    command.envs(process.env.iter().filter_map(|pair| pair.split_once('=')));
    rustix::thread::set_thread_groups(
        &ids.groups
            .iter()
            .map(|gid| rustix::process::Gid::from_raw(*gid))
            .collect::<Vec<_>>(),
    )
    .map_err(step("setting groups"))?;
    command.gid(ids.gid).uid(ids.uid);
    Err(RunError::Step {
        step: format!("executing {}", program.display()),
        source: command.exec(),
    })
}

fn step(what: &str) -> impl FnOnce(rustix::io::Errno) -> RunError {
    let what = what.to_owned();
    move |error| RunError::Step {
        step: what,
        source: error.into(),
    }
}

fn kernel_file_systems() -> Result<(), RunError> {
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let make = |name: &str, kind: &str, flags: MountFlags, data: &str| {
        let target = Path::new("/").join(name);
        fs::create_dir_all(&target)
            .map_err(RunError::step(format!("making {}", target.display())))?;
        let data = std::ffi::CString::new(data)
            .map_err(io::Error::from)
            .map_err(RunError::step("mount data"))?;
        mount(kind, &target, kind, flags, data.as_c_str())
            .map_err(step(&format!("mounting /{name}")))
    };
    make("proc", "proc", quiet, "")?;
    make("sys", "sysfs", quiet | MountFlags::RDONLY, "")?;
    make("dev", "tmpfs", MountFlags::NOSUID, "mode=755,size=65536k")?;
    make(
        "dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620",
    )?;
    make("dev/shm", "tmpfs", quiet, "mode=1777,size=65536k")?;
    let dev = Path::new("/dev");
    let old = umask(Mode::empty());
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let path = dev.join(name);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            mode,
            makedev(major, minor),
        )
        .map_err(step(&format!("making /dev/{name}")))?;
    }
    umask(old);
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        std::os::unix::fs::symlink(target, dev.join(link))
            .map_err(RunError::step(format!("making /dev/{link}")))?;
    }
    Ok(())
}

/// pivot_root(2) onto itself, then drops the old root that lies beneath.
fn enter(rootfs: &Path) -> Result<(), RunError> {
    chdir(rootfs).map_err(step("entering the root file system"))?;
    pivot_root(".", ".").map_err(step("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leaving the old root"))?;
    chdir("/").map_err(step("entering /"))
}

/// Keeps the usual default set in the bounding set; failures leave more than wished, and the
/// module says that this engine is no security boundary.
fn drop_capabilities() {
    let keep = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FSETID
        | CapabilitySet::FOWNER
        | CapabilitySet::MKNOD
        | CapabilitySet::NET_RAW
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
        | CapabilitySet::SETFCAP
        | CapabilitySet::SETPCAP
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::KILL
        | CapabilitySet::AUDIT_WRITE;
    for capability in CapabilitySet::all()
        .iter()
        .filter(|capability| !keep.contains(*capability))
    {
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    let _ = rustix::thread::set_no_new_privs(true);
}

/// Resolves a name without a slash along the container's own PATH.
fn find_program(name: &str, env: &[String]) -> PathBuf {
    if name.contains('/') {
        return name.into();
    }
    let path = env
        .iter()
        .find_map(|pair| pair.strip_prefix("PATH="))
        .unwrap_or("/usr/bin:/bin");
    std::env::split_paths(path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| name.into())
}
