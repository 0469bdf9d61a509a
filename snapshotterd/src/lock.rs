//! One daemon per directory, judged by process, not by file lock.
//!
//! A daemon killed while one of its threads waits in the kernel for our own file system stays a
//! zombie that holds its flocks, and only its successor can free the thread: a successor must not
//! wait for them. So the lock is a file that names its holder by pid, start time and boot; it is
//! free as soon as that process is gone or a zombie. What such a zombie could still write, its
//! store-writer thread, is named too and waited for: that thread never touches our file system,
//! so it is gone within one system call.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

const FILE: &str = "daemon.lock";
const PATIENCE: Duration = Duration::from_secs(5);
/// A predecessor that was just killed or terminated may still be ending.
const GRACE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// A held lock; dropping it gives it up.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    holder: Holder,
}

/// Why a directory cannot be locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another daemon uses the directory.
    #[error("{directory} is in use by another daemon (pid {pid})", directory = directory.display())]
    Held {
        /// The directory.
        directory: PathBuf,
        /// Its holder.
        pid: u32,
    },
    /// The predecessor's last thread does not end.
    #[error(
        "pid {pid} was killed, but its thread {thread} is still writing to {directory}",
        directory = directory.display()
    )]
    Lingering {
        /// The directory.
        directory: PathBuf,
        /// The predecessor.
        pid: u32,
        /// Its store-writer thread.
        thread: u32,
    },
    /// The file system refuses.
    #[error("cannot lock {directory}", directory = directory.display())]
    Io {
        /// The directory.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
struct Holder {
    pid: u32,
    /// Start time in clock ticks since boot, `/proc/PID/stat` field 22: pids are reused.
    start: u64,
    boot: String,
    /// The store-writer thread, once there is one.
    writer: Option<u32>,
}

impl Lock {
    /// Locks `directory`, which exists. A living holder gets a second: it may be about to end.
    /// Blocks for at most a few seconds.
    pub fn acquire(directory: &Path) -> Result<Self, LockError> {
        let deadline = Instant::now() + GRACE;
        loop {
            match Self::attempt(directory) {
                Err(LockError::Held { .. }) if Instant::now() < deadline => thread::sleep(POLL),
                other => return other,
            }
        }
    }

    fn attempt(directory: &Path) -> Result<Self, LockError> {
        let wrap = |source| LockError::Io {
            directory: directory.to_owned(),
            source,
        };
        let path = directory.join(FILE);
        let _guard = Guard::take(directory).map_err(wrap)?;
        if let Some(holder) = read(&path).map_err(wrap)?
            && holder.boot == boot_id().map_err(wrap)?
        {
            if holder.is_alive() {
                return Err(LockError::Held {
                    directory: directory.to_owned(),
                    pid: holder.pid,
                });
            }
            holder.fence(directory)?;
        }
        let holder = Holder::this_process().map_err(wrap)?;
        write(&path, &holder).map_err(wrap)?;
        Ok(Self { path, holder })
    }

    /// Names the thread that a successor has to wait for.
    pub fn set_writer(&mut self, thread: u32) -> io::Result<()> {
        self.holder.writer = Some(thread);
        write(&self.path, &self.holder)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Whoever comes next judges by process anyway; removing the file only spares the look.
        if read(&self.path).is_ok_and(|holder| holder.as_ref() == Some(&self.holder)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn this_process() -> io::Result<Self> {
        let pid = std::process::id();
        let stat = Stat::of(&pid_path(pid))?
            .ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        Ok(Self {
            pid,
            start: stat.start,
            boot: boot_id()?,
            writer: None,
        })
    }

    fn is_alive(&self) -> bool {
        // Without /proc nobody can be judged dead.
        Stat::of(&pid_path(self.pid)).map_or(true, |stat| {
            stat.is_some_and(|stat| stat.start == self.start && !stat.is_dead())
        })
    }

    fn fence(&self, directory: &Path) -> Result<(), LockError> {
        let Some(thread) = self.writer else {
            return Ok(());
        };
        let path = pid_path(self.pid).join("task").join(thread.to_string());
        let deadline = Instant::now() + PATIENCE;
        // The pid may already be another process, whose threads have other numbers or start later.
        while Stat::of(&pid_path(self.pid))
            .ok()
            .flatten()
            .is_some_and(|stat| stat.start == self.start)
            && Stat::of(&path)
                .ok()
                .flatten()
                .is_some_and(|stat| !stat.is_dead())
        {
            if Instant::now() > deadline {
                return Err(LockError::Lingering {
                    directory: directory.to_owned(),
                    pid: self.pid,
                    thread,
                });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

/// Whether process `pid` exists and has not been killed.
pub fn process_is_alive(pid: u32) -> bool {
    Stat::of(&pid_path(pid)).map_or(true, |stat| stat.is_some_and(|stat| !stat.is_dead()))
}

/// State and start time from a `stat` file below /proc.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    start: u64,
}

impl Stat {
    /// `None` when there is no such process or thread.
    fn of(directory: &Path) -> io::Result<Option<Self>> {
        match fs::read(directory.join("stat")) {
            Ok(text) => Self::parse(&text)
                .map(Some)
                .ok_or_else(|| io::Error::other("unreadable stat file")),
            // ESRCH: it went away between open and read.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESRCH) =>
            {
                if Path::new("/proc/self/stat").exists() {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The command name in parentheses may hold anything, parentheses included.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        // Fields 3 (state) and 22 (start time).
        let start = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start })
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// A lock file, and a `stat` file below /proc. For fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    let _ = Stat::parse(data);
    if let Ok(holder) = serde_json::from_slice::<Holder>(data) {
        let text = serde_json::to_vec(&holder).unwrap_or_default();
        assert_eq!(serde_json::from_slice::<Holder>(&text).ok(), Some(holder));
    }
}

/// Two starters decide one after the other. Held for a few file operations only, before the
/// process touches anything that can block, so a dead holder is gone at once.
struct Guard(#[expect(dead_code, reason = "closing it unlocks")] fs::File);

impl Guard {
    fn take(directory: &Path) -> io::Result<Self> {
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join(".daemon.lock.guard"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    thread::sleep(POLL);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Option<Holder>> {
    match fs::read(path) {
        // Half a file cannot be: it is renamed into place. Damaged otherwise: nobody's.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(path: &Path, holder: &Holder) -> io::Result<()> {
    let new = path.with_extension("lock.new");
    fs::write(&new, serde_json::to_vec(holder)?)?;
    fs::rename(&new, path)
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

fn pid_path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn reads_stat_files_with_odd_names() {
        let text = b"12 (a) b) ) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                state: b'Z',
                start: 4242
            })
        );
        assert_eq!(Stat::parse(b"12 (x) R 1"), None);
    }

    #[test]
    fn the_living_hold_it_and_the_dead_do_not() -> Result<(), Box<dyn std::error::Error>> {
        let temp = tempfile::tempdir()?;
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()?;
        let stat = Stat::of(&pid_path(child.id()))?.ok_or("no child")?;
        let holder = Holder {
            pid: child.id(),
            start: stat.start,
            boot: boot_id()?,
            writer: Some(child.id()),
        };
        write(&temp.path().join(FILE), &holder)?;
        assert!(matches!(
            Lock::acquire(temp.path()),
            Err(LockError::Held { pid, .. }) if pid == child.id()
        ));
        // A zombie now: it is not waited for before the lock is taken.
        child.kill()?;
        let deadline = Instant::now() + PATIENCE;
        while process_is_alive(child.id()) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        let lock = Lock::acquire(temp.path())?;
        child.wait()?;
        assert!(matches!(
            Lock::acquire(temp.path()),
            Err(LockError::Held { pid, .. }) if pid == std::process::id()
        ));
        drop(lock);
        drop(Lock::acquire(temp.path())?);
        Ok(())
    }

    #[test]
    fn a_reused_pid_or_an_earlier_boot_is_nobody() -> Result<(), Box<dyn std::error::Error>> {
        let temp = tempfile::tempdir()?;
        let this = Holder::this_process()?;
        for holder in [
            Holder {
                start: this.start + 1,
                ..this.clone()
            },
            Holder {
                boot: "earlier".to_owned(),
                ..this.clone()
            },
        ] {
            write(&temp.path().join(FILE), &holder)?;
            drop(Lock::acquire(temp.path())?);
        }
        fs::write(temp.path().join(FILE), b"{damaged")?;
        drop(Lock::acquire(temp.path())?);
        Ok(())
    }
}
