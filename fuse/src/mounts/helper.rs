//! The parent's side: starts the child, bounds it, and believes mountinfo more than its answer.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{io::AsyncReadExt as _, process::Command, time::timeout};

use super::{
    mountinfo,
    request::{Operation, Request, Response},
};
use crate::{CommandLine, process::ThreadId, sys};

/// How long a killed child may take to be gone. It may sit in a system call that waits for
/// BlobFs; a stalled read is killable, so this is generous.
const REAP: Duration = Duration::from_secs(5);

/// Starts mount helper processes.
#[derive(Clone, Debug)]
pub struct Helper {
    command: CommandLine,
    claims: Option<PathBuf>,
}

/// An EROFS mount made of a local metadata image and data devices.
#[derive(Clone, Debug)]
pub struct ErofsMount {
    /// The metadata image, a regular file outside BlobFs.
    pub metadata: PathBuf,
    /// Data devices in the order of the image's device table: BlobFs files or plain files.
    pub devices: Vec<PathBuf>,
    /// An existing directory.
    pub target: PathBuf,
    /// Whether EROFS reads its files past their page cache (`directio`, 6.13). For plain files of
    /// complete blobs; BlobFs files are direct without it.
    pub direct_io: bool,
}

/// An overlay mount, for probes and tests.
#[derive(Clone, Debug)]
pub struct OverlayMount {
    /// Lower directories, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Upper and work directory; without them the overlay is read-only.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// An existing directory.
    pub target: PathBuf,
}

/// What statfs(2) said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Total size in blocks.
    pub blocks: u64,
    /// Block size in bytes.
    pub block_size_bytes: u64,
    /// File system magic.
    pub fs_type: u64,
}

/// What a child read from a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReport {
    /// Bytes read; short only at the end of the file.
    pub bytes: u64,
    /// SHA-256 of them, lower-case hex.
    pub sha256: String,
}

/// A helper that a former daemon left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// What it was about to mount or unmount.
    pub target: PathBuf,
    /// False: it is gone and mountinfo tells what it achieved. True: it could not be ended.
    pub running: bool,
}

/// Why a helper did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelperError {
    /// The child could not be started or talked to.
    #[error("start mount helper {program:?} for {operation} {target:?}")]
    Start {
        /// The program that was to be started.
        program: PathBuf,
        /// Operation name.
        operation: &'static str,
        /// Path operated on.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was killed because it did not finish, and mountinfo shows no effect of it.
    #[error("{operation} {target:?} did not finish within {after:?} and was killed{}", if *gone { "" } else { ", but does not die" })]
    TimedOut {
        /// Operation name.
        operation: &'static str,
        /// Path operated on.
        target: PathBuf,
        /// The bound it was given.
        after: Duration,
        /// Whether the kill ended it. One that waits for a superblock to be torn down goes on.
        gone: bool,
    },
    /// The kernel refused.
    #[error("{operation} {target:?}: {step}: {message}")]
    Refused {
        /// Operation name.
        operation: &'static str,
        /// Path operated on.
        target: PathBuf,
        /// The system call or option that failed.
        step: String,
        /// Its errno, 0 if none.
        errno: i32,
        /// The error text with the kernel's own log lines.
        message: String,
    },
    /// It died or said something that is not an answer.
    #[error(
        "{operation} {target:?}: the mount helper ended with {status} and no answer: {stderr:?}"
    )]
    Died {
        /// Operation name.
        operation: &'static str,
        /// Path operated on.
        target: PathBuf,
        /// Exit status.
        status: std::process::ExitStatus,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
}

impl HelperError {
    /// The kernel's errno, where it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } if *errno != 0 => Some(*errno),
            _ => None,
        }
    }
}

impl Helper {
    /// Children run `command`, which must end in [`super::run_child`].
    pub fn new(command: CommandLine) -> Self {
        Self {
            command,
            claims: None,
        }
    }

    /// Makes children register in `dir` while they work, so that [`Helper::settle`] of a later
    /// daemon finds them.
    #[must_use]
    pub fn with_claims(mut self, dir: impl Into<PathBuf>) -> Self {
        self.claims = Some(dir.into());
        self
    }

    /// Mounts an EROFS image. No nodev or nosuid: layers keep their device nodes and suid bits.
    /// Opens the devices, so BlobFs must be serving.
    pub async fn mount_erofs(
        &self,
        mount: &ErofsMount,
        bound: Duration,
    ) -> Result<(), HelperError> {
        let operation = Operation::MountErofs {
            metadata: mount.metadata.clone(),
            devices: mount.devices.clone(),
            target: mount.target.clone(),
            direct_io: mount.direct_io,
        };
        self.run(operation, None, bound).await.map(drop)
    }

    /// Mounts a FUSE session's device.
    pub async fn mount_fuse(
        &self,
        source: &str,
        target: &Path,
        device: BorrowedFd<'_>,
        max_read_bytes: u32,
        bound: Duration,
    ) -> Result<(), HelperError> {
        let operation = Operation::MountFuse {
            source: source.to_owned(),
            target: target.to_owned(),
            max_read_bytes,
        };
        self.run(operation, Some(device), bound).await.map(drop)
    }

    /// Mounts an overlay.
    pub async fn mount_overlay(
        &self,
        mount: &OverlayMount,
        bound: Duration,
    ) -> Result<(), HelperError> {
        let (upper, work) = mount.upper.clone().unzip();
        let operation = Operation::MountOverlay {
            lowers: mount.lowers.clone(),
            upper,
            work,
            target: mount.target.clone(),
        };
        self.run(operation, None, bound).await.map(drop)
    }

    /// Unmounts the topmost mount at `target`; `lazy` detaches it even while it is busy.
    pub async fn umount(
        &self,
        target: &Path,
        lazy: bool,
        bound: Duration,
    ) -> Result<(), HelperError> {
        let operation = Operation::Umount {
            target: target.to_owned(),
            lazy,
        };
        self.run(operation, None, bound).await.map(drop)
    }

    /// Asks a file system for its totals; ENOTCONN tells a dead FUSE session.
    pub async fn statfs(&self, path: &Path, bound: Duration) -> Result<StatFs, HelperError> {
        let operation = Operation::Statfs {
            path: path.to_owned(),
        };
        match self.run(operation, None, bound).await? {
            Response::Statfs {
                blocks,
                block_size_bytes,
                fs_type,
            } => Ok(StatFs {
                blocks,
                block_size_bytes,
                fs_type,
            }),
            other => Err(unexpected("statfs", path, &other)),
        }
    }

    /// Reads `[offset, offset + len)` of a file; with `alarm_every` while SIGALRM interrupts it.
    pub async fn read_file(
        &self,
        path: &Path,
        offset: u64,
        len: u64,
        alarm_every: Option<Duration>,
        bound: Duration,
    ) -> Result<ReadReport, HelperError> {
        let operation = Operation::ReadFile {
            path: path.to_owned(),
            offset,
            len,
            alarm_ms: alarm_every.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        };
        match self.run(operation, None, bound).await? {
            Response::Read { bytes, sha256 } => Ok(ReadReport { bytes, sha256 }),
            other => Err(unexpected("read_file", path, &other)),
        }
    }

    /// Waits until the helpers of former daemons are gone, kills them after `bound`. Call it once
    /// BlobFs serves (they may wait for it), then compare mountinfo with what was intended for the
    /// targets returned.
    pub async fn settle(&self, bound: Duration) -> Vec<Leftover> {
        self.settle_where(bound, |_| true).await
    }

    /// As [`Helper::settle`], for FUSE mounts alone: those never wait for BlobFs, so they can and
    /// must be over before a session is adopted.
    pub(crate) async fn settle_fuse_mounts(&self, bound: Duration) -> Vec<Leftover> {
        self.settle_where(bound, |operation| operation == "mount_fuse")
            .await
    }

    async fn settle_where(&self, bound: Duration, which: impl Fn(&str) -> bool) -> Vec<Leftover> {
        let mut left = Vec::new();
        for claim in self.claims_left() {
            if !which(&claim.operation) {
                continue;
            }
            let gone = async || {
                while !claim.thread.is_gone().unwrap_or(false) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let mut running = timeout(bound, gone()).await.is_err();
            if running {
                claim.kill();
                running = timeout(REAP, gone()).await.is_err();
            }
            if !running {
                let _ = fs::remove_file(&claim.file);
            }
            left.push(Leftover {
                target: claim.target,
                running,
            });
        }
        left
    }

    fn claims_left(&self) -> Vec<ClaimLeft> {
        let entries = self.claims.iter().filter_map(|dir| fs::read_dir(dir).ok());
        entries
            .flatten()
            .filter_map(|entry| ClaimLeft::read(&entry.ok()?.path()))
            .collect()
    }

    async fn run(
        &self,
        operation: Operation,
        device: Option<BorrowedFd<'_>>,
        bound: Duration,
    ) -> Result<Response, HelperError> {
        let (name, target) = (operation.name(), operation.target().clone());
        let before = visible(&operation);
        let start_error = |source| HelperError::Start {
            program: self.command.program.clone(),
            operation: name,
            target: target.clone(),
            source,
        };
        let request = Request {
            claims: self.claims.clone(),
            operation: operation.clone(),
        };
        let mut child = self.start(&request, device).map_err(start_error)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let finished = timeout(bound, async {
            let (out, err) = tokio::join!(drain(stdout), drain(stderr));
            (out, err, child.wait().await)
        })
        .await;
        let Ok((out, err, status)) = finished else {
            let _ = child.start_kill();
            let gone = timeout(REAP, child.wait()).await.is_ok();
            if achieved(&operation, before) {
                return Ok(Response::Done);
            }
            return Err(HelperError::TimedOut {
                operation: name,
                target,
                after: bound,
                gone,
            });
        };
        let status = status.map_err(start_error)?;
        match serde_json::from_slice(&out) {
            Ok(Response::Failed {
                step,
                errno,
                message,
            }) => Err(HelperError::Refused {
                operation: name,
                target,
                step,
                errno,
                message,
            }),
            Ok(response) => Ok(response),
            Err(_) if achieved(&operation, before) => Ok(Response::Done),
            Err(_) => Err(HelperError::Died {
                operation: name,
                target,
                status,
                stderr: String::from_utf8_lossy(&err).trim_end().to_owned(),
            }),
        }
    }

    fn start(
        &self,
        request: &Request,
        device: Option<BorrowedFd<'_>>,
    ) -> io::Result<tokio::process::Child> {
        let (ours, theirs) = sys::socket::pair()?;
        let bytes = serde_json::to_vec(request).map_err(io::Error::other)?;
        let child = Command::new(&self.command.program)
            .args(&self.command.args)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .current_dir("/")
            .kill_on_drop(true)
            .spawn()?;
        // Fits the socket's buffer, so it does not wait for the child. A child whose parent dies
        // before this line reads the end of the stream and ends without having done anything.
        let fds: Vec<_> = device.into_iter().collect();
        sys::socket::send(ours.as_fd(), &bytes, &fds)?;
        let _sent: OwnedFd = ours;
        Ok(child)
    }
}

async fn drain(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // A broken pipe shows in the missing answer.
        let _ = pipe.take(64 << 10).read_to_end(&mut bytes).await;
    }
    bytes
}

/// How many mounts sit at the target of a mount or umount.
fn visible(operation: &Operation) -> Option<usize> {
    let target = operation.target();
    let mounts = mountinfo().ok()?;
    Some(mounts.iter().filter(|m| m.target == *target).count())
}

fn achieved(operation: &Operation, before: Option<usize>) -> bool {
    match (before, visible(operation)) {
        (Some(before), Some(after)) if operation.mounts() => after > before,
        (Some(before), Some(after)) => {
            matches!(operation, Operation::Umount { .. }) && after < before
        }
        _ => false,
    }
}

fn unexpected(operation: &'static str, target: &Path, response: &Response) -> HelperError {
    HelperError::Refused {
        operation,
        target: target.to_owned(),
        step: "read the answer".to_owned(),
        errno: 0,
        message: format!("unexpected answer {response:?}"),
    }
}

struct ClaimLeft {
    file: PathBuf,
    thread: ThreadId,
    operation: String,
    target: PathBuf,
}

impl ClaimLeft {
    fn read(file: &Path) -> Option<Self> {
        let bytes = fs::read(file).ok()?;
        let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let mut fields = line.splitn(4, |b| *b == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let tid = text()?.parse().ok()?;
        let started = text()?.parse().ok()?;
        let operation = text()?.to_owned();
        let target = PathBuf::from(std::ffi::OsStr::from_bytes(fields.next()?));
        Some(Self {
            file: file.to_owned(),
            thread: ThreadId { tid, started },
            operation,
            target,
        })
    }

    fn kill(&self) {
        let Some(pid) = i32::try_from(self.thread.tid).ok().and_then(Pid::from_raw) else {
            return;
        };
        // The pidfd pins the process; the start time read after it says that it is the right one.
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            && !self.thread.is_gone().unwrap_or(true)
        {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}
