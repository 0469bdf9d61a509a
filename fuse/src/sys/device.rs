//! /dev/fuse.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
};

use super::abi::{NOTIFY_RESEND, OUT_HEADER};

/// Opens a device for a new session.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::open("/dev/fuse", flags, Mode::empty())?)
}

/// Whether a mounted, connected session is behind the device.
pub(crate) fn is_connected(device: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(&device, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(!fds[0].revents().contains(PollFlags::ERR))
}

/// Makes the kernel send again whatever was read and not answered (6.9; EINVAL before).
pub(crate) fn resend(device: impl AsFd) -> io::Result<()> {
    let mut message = [0; OUT_HEADER];
    message[0] = 16;
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_le_bytes());
    rustix::io::write(device, &message)?;
    Ok(())
}
