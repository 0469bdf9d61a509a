//! Signals and descriptors of the small processes.

use std::{
    io, mem,
    os::fd::{FromRawFd, OwnedFd},
    ptr,
};

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called first thing in a process of its own, before it opened anything.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    check(result)
}

/// Ignores SIGHUP and SIGPIPE and turns SIGTERM and SIGINT into a descriptor that becomes
/// readable.
pub(crate) fn termination() -> io::Result<OwnedFd> {
    // SAFETY: SIG_IGN is a valid disposition; the set is initialised by sigemptyset before use;
    // signalfd makes a new descriptor that nobody else owns.
    unsafe {
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()).into())?;
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Takes one signal off a descriptor of [`termination`].
pub(crate) fn take(fd: &OwnedFd) {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    let _ = rustix::io::read(fd, &mut info[..]);
}

/// Sends this process SIGALRM every `every_ms`, with a handler that does nothing and without
/// SA_RESTART: a system call that can be interrupted is.
pub(crate) fn alarm_storm(every_ms: u64) -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let seconds = libc::time_t::try_from(every_ms / 1000).map_err(io::Error::other)?;
    let micros = libc::suseconds_t::try_from(every_ms % 1000 * 1000).map_err(io::Error::other)?;
    // SAFETY: an all-zero sigaction is valid (no flags, empty mask), its handler touches nothing;
    // the itimerval is fully initialised.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = nothing as *const () as libc::sighandler_t;
        check(libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()).into())?;
        let every = libc::timeval {
            tv_sec: seconds,
            tv_usec: micros,
        };
        let timer = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        check(libc::syscall(
            libc::SYS_setitimer,
            libc::ITIMER_REAL,
            &raw const timer,
            ptr::null_mut::<libc::itimerval>(),
        ))
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
