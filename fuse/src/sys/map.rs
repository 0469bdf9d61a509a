//! Shared mappings of a memfd, seen as atomics only.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    ptr::{self, NonNull},
    sync::atomic::AtomicU64,
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, munmap};

/// Bytes in a word.
pub(crate) const WORD: usize = 8;

/// A read-write mapping of part of a memfd that other processes may map too.
#[derive(Debug)]
pub(crate) struct SharedMap {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is only reachable as atomics, or written by the kernel into a range whose
// owner waits for it.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `[offset, offset + len)`; both multiples of the page size, the file at least as long
    /// and sealed against shrinking (a shrunk file would turn an access into SIGBUS).
    pub(crate) fn new(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset,
            )
        }?;
        let base = NonNull::new(base.cast::<AtomicU64>())
            .ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(Self {
            base,
            words: len / WORD,
        })
    }

    /// The whole mapping.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: base is page-aligned and maps `words` words until drop; AtomicU64 allows any
        // bit pattern and concurrent change, also by other processes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// Makes the pages of a byte range present and writable in this process.
    pub(crate) fn populate(&self, range: Range<usize>) -> io::Result<()> {
        let (start, len) = self.checked(&range)?;
        // SAFETY: the range lies in this mapping; populating changes no contents.
        unsafe { madvise(start, len, Advice::LinuxPopulateWrite) }?;
        Ok(())
    }

    /// Pins the pages of a byte range in memory (counts against RLIMIT_MEMLOCK).
    pub(crate) fn lock(&self, range: Range<usize>) -> io::Result<()> {
        let (start, len) = self.checked(&range)?;
        // SAFETY: the range lies in this mapping; locking changes no contents.
        unsafe { mlock(start, len) }?;
        Ok(())
    }

    /// Takes pages out of this process' page tables; their contents stay in the file.
    #[cfg(feature = "must-fail")]
    pub(crate) fn unmap(&self, range: Range<usize>) -> io::Result<()> {
        let (start, len) = self.checked(&range)?;
        // SAFETY: the range lies in this shared mapping, whose contents this does not change.
        unsafe { madvise(start, len, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// read(2) straight into a byte range: what the kernel copied is visible to every process
    /// that maps the file, even if the caller is killed before this returns.
    pub(crate) fn receive(&self, fd: impl AsFd, range: Range<usize>) -> io::Result<usize> {
        let (start, len) = self.checked(&range)?;
        // SAFETY: the range lies in this mapping and is writable; Rust sees it only as atomics,
        // and the caller owns the range until it returns.
        let n = unsafe { libc::read(fd.as_fd().as_raw_fd(), start, len) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn checked(&self, range: &Range<usize>) -> io::Result<(*mut core::ffi::c_void, usize)> {
        if range.start > range.end || range.end > self.words * WORD {
            return Err(io::Error::other("range outside of the mapping"));
        }
        // SAFETY: the start lies within the mapping (or one past it).
        let start = unsafe { self.base.as_ptr().cast::<u8>().add(range.start) };
        Ok((start.cast(), range.end - range.start))
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: exactly what new() mapped; references into it borrow self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.words * WORD) };
    }
}
