//! What /proc tells about threads: the identity the fence is built on.

use std::{fs, io, path::Path};

/// A thread or process named so that a reused id is not mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId {
    /// Its tid.
    pub(crate) tid: u32,
    /// Start time in clock ticks since boot (field 22 of /proc/TID/stat).
    pub(crate) started: u64,
}

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> io::Result<Self> {
        let raw = rustix::thread::gettid().as_raw_nonzero().get();
        let tid = u32::try_from(raw).map_err(io::Error::other)?;
        match stat(tid)? {
            Some(stat) => Ok(Self {
                tid,
                started: stat.started,
            }),
            None => Err(io::Error::other("the calling thread is not in /proc")),
        }
    }

    /// Whether it can run no more instruction: absent, dead, or its id is another's by now.
    pub(crate) fn is_gone(self) -> io::Result<bool> {
        Ok(match stat(self.tid)? {
            None => true,
            Some(stat) => stat.started != self.started || matches!(stat.state, b'Z' | b'X' | b'x'),
        })
    }
}

/// Whether that thread has ended, or SIGKILL is pending for it (false when it cannot be told).
pub(crate) fn kill_is_pending(tid: u32) -> bool {
    const SIGKILL_BIT: u64 = 1 << 8;
    if tid == 0 {
        return false; // a thread of another pid namespace, or of the kernel
    }
    let Ok(status) = fs::read_to_string(format!("/proc/{tid}/status")) else {
        // No such thread: it died, so nobody waits for an answer.
        return true;
    };
    let ended = |state: &str| state.trim_start().starts_with(['Z', 'X']);
    if status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))
        .is_some_and(ended)
    {
        return true;
    }
    status
        .lines()
        .filter_map(|line| {
            line.strip_prefix("SigPnd:")
                .or_else(|| line.strip_prefix("ShdPnd:"))
        })
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & SIGKILL_BIT != 0)
}

struct Stat {
    state: u8,
    started: u64,
}

fn stat(tid: u32) -> io::Result<Option<Stat>> {
    // ESRCH comes from a thread that died between open and read.
    let bytes = match fs::read(Path::new("/proc").join(tid.to_string()).join("stat")) {
        Ok(bytes) => bytes,
        Err(e)
            if e.kind() == io::ErrorKind::NotFound
                || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    parse_stat(&bytes)
        .map(Some)
        .ok_or_else(|| io::Error::other(format!("/proc/{tid}/stat is not as documented")))
}

fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    // The name in parentheses may hold anything, parentheses included.
    let close = bytes.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, started })
}

/// A `stat` file below /proc. For fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_stat(data: &[u8]) {
    let _ = parse_stat(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        let line = b"77 (a) Z 1 2 (b)) S 1 77 77 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.state, stat.started), (b'S', 4242));
    }

    #[test]
    fn a_live_thread_is_not_gone_and_a_joined_one_is() {
        let here = ThreadId::current().unwrap();
        assert!(!here.is_gone().unwrap());
        let other = std::thread::spawn(|| ThreadId::current().unwrap())
            .join()
            .unwrap();
        // The kernel removes a joined thread from /proc a moment after the join returns.
        while !other.is_gone().unwrap() {
            std::thread::yield_now();
        }
        let reused = ThreadId {
            started: here.started + 1,
            ..here
        };
        assert!(reused.is_gone().unwrap());
    }
}
