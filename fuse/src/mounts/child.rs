//! The child's side: one request from stdin, raw system calls, one line on stdout.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount,
        move_mount, unmount,
    },
};
use sha2::{Digest as _, Sha256};

use super::request::{Operation, Request, Response};
use crate::{process::ThreadId, sys};

/// Runs one request of [`super::Helper`] and ends: the body of the `mount-helper` subcommand.
///
/// Keeps no file but stdin, stdout, stderr and what came with the request, so that whatever the
/// parent holds is free as soon as the parent is gone.
pub fn run_child() -> ExitCode {
    let response = match sys::signals::close_from(3).and_then(|()| receive()) {
        Ok((request, device)) => serve(&request, device),
        Err(e) => failed("read the request", &e),
    };
    let code = match response {
        Response::Failed { .. } => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    };
    // A parent that is gone reads mountinfo instead.
    if let Ok(mut line) = serde_json::to_vec(&response) {
        line.push(b'\n');
        let _ = io::stdout().write_all(&line);
    }
    code
}

fn receive() -> io::Result<(Request, Option<OwnedFd>)> {
    let stdin = io::stdin();
    let mut device = None;
    let mut bytes = Vec::new();
    match sys::socket::receive(stdin.as_fd(), 64 << 10) {
        Ok(Some(message)) => {
            bytes = message.bytes;
            device = message.fds.into_iter().next();
        }
        Ok(None) => {}
        // A pipe or a file: someone runs the subcommand by hand.
        Err(e) if e.raw_os_error() == Some(Errno::NOTSOCK.raw_os_error()) => {
            stdin.lock().take(64 << 10).read_to_end(&mut bytes)?;
        }
        Err(e) => return Err(e),
    }
    if bytes.is_empty() {
        return Err(io::Error::other("no request: the parent is gone"));
    }
    let request = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
    Ok((request, device))
}

fn serve(request: &Request, device: Option<OwnedFd>) -> Response {
    let claim = match request
        .claims
        .as_deref()
        .map(|dir| Claim::new(dir, request))
    {
        Some(Ok(claim)) => Some(claim),
        Some(Err(e)) => return failed("register the helper", &e),
        None => None,
    };
    let response = perform(&request.operation, device).unwrap_or_else(|failure| failure);
    drop(claim);
    response
}

fn perform(operation: &Operation, device: Option<OwnedFd>) -> Result<Response, Response> {
    match operation {
        Operation::MountFuse {
            source,
            target,
            max_read_bytes,
        } => {
            let device = device.ok_or_else(|| {
                failed(
                    "take the device",
                    &io::Error::other("no descriptor came with it"),
                )
            })?;
            mount_fuse(source, target, *max_read_bytes, &device)
        }
        Operation::MountErofs {
            metadata,
            devices,
            target,
            direct_io,
        } => mount_erofs(metadata, devices, target, *direct_io),
        Operation::MountOverlay {
            lowers,
            upper,
            work,
            target,
        } => mount_overlay(lowers, upper.as_deref(), work.as_deref(), target),
        Operation::Umount { target, lazy } => {
            let mut flags = UnmountFlags::NOFOLLOW;
            flags.set(UnmountFlags::DETACH, *lazy);
            unmount(target, flags).map_err(|e| failed("umount", &e.into()))?;
            Ok(Response::Done)
        }
        Operation::Statfs { path } => {
            let stat = rustix::fs::statfs(path).map_err(|e| failed("statfs", &e.into()))?;
            Ok(Response::Statfs {
                blocks: stat.f_blocks,
                block_size_bytes: u64::try_from(stat.f_bsize).unwrap_or(0),
                fs_type: u64::try_from(stat.f_type).unwrap_or(0),
            })
        }
        Operation::ReadFile {
            path,
            offset,
            len,
            alarm_ms,
        } => read_file(path, *offset, *len, *alarm_ms),
    }
}

fn mount_fuse(
    source: &str,
    target: &Path,
    max_read_bytes: u32,
    device: &OwnedFd,
) -> Result<Response, Response> {
    let fd = device.as_raw_fd().to_string();
    let max_read = max_read_bytes.to_string();
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let options = [
        ("source", source),
        ("fd", &fd),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
        ("max_read", &max_read),
    ];
    let context = match fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NOSYS) => {
            let data = joined(&options[1..]);
            let flags =
                MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            return old_mount(source.as_ref(), target, "fuse", flags, &data);
        }
        Err(e) => return Err(failed("fsopen fuse", &e.into())),
    };
    for (key, value) in options {
        set(&context, key, value)?;
    }
    attach(&context, target, attributes)
}

fn mount_erofs(
    metadata: &Path,
    devices: &[PathBuf],
    target: &Path,
    direct_io: bool,
) -> Result<Response, Response> {
    // Layer mounts carry neither nodev nor nosuid: an overlay passes its lowers' flags on in
    // effect, and a container's device nodes and suid programs must work as containerd's own
    // unpacked layers let them.
    let context = match fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NOSYS) => {
            let mut data: Vec<_> = devices
                .iter()
                .map(|device| format!("device={}", device.display()))
                .collect();
            data.extend(direct_io.then(|| "directio".to_owned()));
            let data = data.join(",");
            return old_mount(metadata, target, "erofs", MountFlags::RDONLY, &data);
        }
        Err(e) => return Err(failed("fsopen erofs", &e.into())),
    };
    set(&context, "source", metadata)?;
    set_flag(&context, "ro")?;
    for device in devices {
        set(&context, "device", device.as_path())?;
    }
    if direct_io {
        set_flag(&context, "directio")?;
    }
    attach(&context, target, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn mount_overlay(
    lowers: &[PathBuf],
    upper: Option<&Path>,
    work: Option<&Path>,
    target: &Path,
) -> Result<Response, Response> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| failed("fsopen overlay", &e.into()))?;
    set(&context, "source", "overlay")?;
    for lower in lowers {
        // `lowerdir+` (6.5) has no length limit; before that one string has to do.
        if let Err(e) = fsconfig_set_string(&context, "lowerdir+", lower.as_path()) {
            if e != Errno::INVAL || lowers.len() > 1 {
                return Err(told(&context, "fsconfig lowerdir+", e));
            }
            set(&context, "lowerdir", lower.as_path())?;
        }
    }
    if let (Some(upper), Some(work)) = (upper, work) {
        set(&context, "upperdir", upper)?;
        set(&context, "workdir", work)?;
    }
    attach(&context, target, MountAttrFlags::empty())
}

fn set(context: &OwnedFd, key: &str, value: impl rustix::path::Arg) -> Result<(), Response> {
    fsconfig_set_string(context, key, value)
        .map_err(|e| told(context, &format!("fsconfig {key}"), e))
}

fn set_flag(context: &OwnedFd, key: &str) -> Result<(), Response> {
    fsconfig_set_flag(context, key).map_err(|e| told(context, &format!("fsconfig {key}"), e))
}

fn attach(
    context: &OwnedFd,
    target: &Path,
    attributes: MountAttrFlags,
) -> Result<Response, Response> {
    fsconfig_create(context).map_err(|e| told(context, "create the superblock", e))?;
    let mounted = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|e| told(context, "fsmount", e))?;
    move_mount(
        &mounted,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|e| failed("move_mount", &e.into()))?;
    Ok(Response::Done)
}

fn old_mount(
    source: &Path,
    target: &Path,
    fs_type: &str,
    flags: MountFlags,
    data: &str,
) -> Result<Response, Response> {
    let data = std::ffi::CString::new(data).map_err(|e| failed("mount", &io::Error::other(e)))?;
    mount(source, target, fs_type, flags, data.as_c_str())
        .map_err(|e| failed("mount", &e.into()))?;
    Ok(Response::Done)
}

fn joined(options: &[(&str, &str)]) -> String {
    let pairs: Vec<_> = options.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

fn read_file(
    path: &Path,
    offset: u64,
    len: u64,
    alarm_ms: Option<u64>,
) -> Result<Response, Response> {
    if let Some(every_ms) = alarm_ms {
        sys::signals::alarm_storm(every_ms).map_err(|e| failed("start the alarm", &e))?;
    }
    let mut file = File::open(path).map_err(|e| failed("open", &e))?;
    file.seek(SeekFrom::Start(offset))
        .map_err(|e| failed("seek", &e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    let mut done = 0;
    while done < len {
        let want = usize::try_from(len - done).unwrap_or(usize::MAX);
        let want = want.min(buffer.len());
        match file.read(&mut buffer[..want]) {
            Ok(0) => break,
            Ok(n) => {
                hash.update(&buffer[..n]);
                done += n as u64;
            }
            // What a careful program does; any other error is the finding.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed("read", &e)),
        }
    }
    Ok(Response::Read {
        bytes: done,
        sha256: hash.finalize().iter().fold(String::new(), |mut text, b| {
            use std::fmt::Write as _;
            let _ = write!(text, "{b:02x}");
            text
        }),
    })
}

/// An error with what the kernel wrote into the file system context's log.
fn told(context: &OwnedFd, step: &str, errno: Errno) -> Response {
    let mut message = io::Error::from(errno).to_string();
    let mut line = [0; 1024];
    // Each read is one message; ENODATA ends them.
    while let Ok(n) = rustix::io::read(context, &mut line[..]) {
        if n == 0 {
            break;
        }
        message.push_str("; ");
        message.push_str(String::from_utf8_lossy(&line[..n]).trim_end());
    }
    Response::Failed {
        step: step.to_owned(),
        errno: errno.raw_os_error(),
        message,
    }
}

fn failed(step: &str, error: &io::Error) -> Response {
    Response::Failed {
        step: step.to_owned(),
        errno: error.raw_os_error().unwrap_or(0),
        message: error.to_string(),
    }
}

/// The file that tells a later daemon which helpers may still be at work.
struct Claim(PathBuf);

impl Claim {
    fn new(dir: &Path, request: &Request) -> io::Result<Self> {
        let me = ThreadId::current()?;
        fs::create_dir_all(dir)?;
        let claim = Self(dir.join(me.tid.to_string()));
        let operation = &request.operation;
        fs::write(
            &claim.0,
            format!(
                "{} {} {} {}\n",
                me.tid,
                me.started,
                operation.name(),
                operation.target().display()
            ),
        )?;
        Ok(claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
