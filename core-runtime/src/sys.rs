//! System calls that rustix marks unsafe or lacks.
#![expect(
    unsafe_code,
    reason = "unshare(2) and one socket ioctl; each call states why it is sound"
)]

use std::{io, os::fd::AsRawFd as _};

use rustix::thread::UnshareFlags;

/// unshare(2) for namespaces only.
pub(crate) fn unshare_namespaces(flags: UnshareFlags) -> io::Result<()> {
    assert!(
        !flags.contains(UnshareFlags::FILES),
        "only namespaces are unshared here"
    );
    // SAFETY: the file descriptor table stays shared (asserted above), so no I/O safety rule of
    // other threads is touched; namespaces are not memory.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Brings the loopback interface of the current network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    // SAFETY: SIOCSIFFLAGS reads the ifreq it is given, which lives across the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
