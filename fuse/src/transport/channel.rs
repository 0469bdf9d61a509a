//! The two things that are done with the device, so that tests can stand in for the kernel.

use std::{
    fmt, io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::sys::{arena::Buffer, map::SharedMap};

/// The device of a session.
pub(crate) trait Channel: fmt::Debug + Send + Sync {
    /// Reads one request into a byte range of shared memory; EAGAIN if there is none.
    fn receive(&self, map: &SharedMap, range: Range<usize>) -> io::Result<usize>;

    /// Writes one answer: `error` is 0 or a negative errno.
    fn reply(&self, buffer: &mut Buffer, unique: u64, error: i32, len: usize) -> io::Result<()>;

    /// The descriptor, where there is one.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

impl Channel for OwnedFd {
    fn receive(&self, map: &SharedMap, range: Range<usize>) -> io::Result<usize> {
        map.receive(self, range)
    }

    fn reply(&self, buffer: &mut Buffer, unique: u64, error: i32, len: usize) -> io::Result<()> {
        buffer.send(self, unique, error, len)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}
