//! Reply memory: populated and locked once, so that the kernel's copy out of it cannot fault.

use std::{
    io,
    os::fd::AsFd,
    ptr::{self, NonNull},
    slice,
    sync::Arc,
};

use parking_lot::{Condvar, Mutex};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

use super::abi::OUT_HEADER;

const PAGE: usize = 4096;

/// A fixed number of equal buffers in one private mapping. Each has a page for the header before
/// its payload, so that header and payload leave in one write and the payload is page-aligned.
#[derive(Debug)]
pub(crate) struct Arena {
    base: NonNull<u8>,
    payload: usize,
    count: usize,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    locked: bool,
}

// SAFETY: each buffer belongs to the one Buffer that took its index off the free list.
unsafe impl Send for Arena {}
// SAFETY: as above; the free list is behind a mutex.
unsafe impl Sync for Arena {}

impl Arena {
    /// `count` buffers of `payload` bytes (a multiple of 4096), populated, and locked if the
    /// memlock limit allows it: see [`Arena::is_locked`].
    pub(crate) fn new(payload: usize, count: usize) -> io::Result<Self> {
        let len = (payload + PAGE) * count;
        // SAFETY: a fresh private mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let base = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        let mut arena = Self {
            base,
            payload,
            count,
            free: Mutex::new((0..count).rev().collect()),
            freed: Condvar::new(),
            locked: false,
        };
        // SAFETY: within the mapping just made. A child made by fork would turn its pages
        // copy-on-write, that is unpopulated here at the next write.
        unsafe { madvise(start, len, Advice::LinuxDontFork) }?;
        // SAFETY: within the mapping just made and not yet shared.
        if unsafe { madvise(start, len, Advice::LinuxPopulateWrite) }.is_err() {
            for page in (0..len).step_by(PAGE) {
                // SAFETY: within the mapping just made and not yet shared.
                unsafe { base.as_ptr().add(page).write_volatile(0) };
            }
        }
        // SAFETY: within the mapping just made.
        arena.locked = unsafe { mlock(start, len) }.is_ok();
        Ok(arena)
    }

    /// Whether the memory is locked; if not it is populated all the same and may be reclaimed.
    pub(crate) fn is_locked(&self) -> bool {
        self.locked
    }

    /// Payload bytes of each buffer.
    pub(crate) fn payload(&self) -> usize {
        self.payload
    }

    /// Takes a buffer, waiting for one if all are in use. Holders fill and send, they never wait
    /// for anything remote.
    pub(crate) fn take(self: &Arc<Self>) -> Buffer {
        let mut free = self.free.lock();
        loop {
            if let Some(index) = free.pop() {
                return Buffer {
                    arena: Arc::clone(self),
                    index,
                };
            }
            self.freed.wait(&mut free);
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let len = (self.payload + PAGE) * self.count;
        // SAFETY: exactly what new() mapped; every Buffer holds the arena alive.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), len) };
    }
}

/// One buffer, exclusively owned until dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    arena: Arc<Arena>,
    index: usize,
}

impl Buffer {
    /// The payload bytes.
    pub(crate) fn payload(&mut self) -> &mut [u8] {
        let len = self.arena.payload;
        // SAFETY: the payload of buffer `index` lies in the mapping, is initialised (zero pages),
        // and only this Buffer has its index.
        unsafe { slice::from_raw_parts_mut(self.start().add(PAGE), len) }
    }

    /// Writes fuse_out_header and `len` payload bytes as one message.
    pub(crate) fn send(
        &mut self,
        fd: impl AsFd,
        unique: u64,
        error: i32,
        len: usize,
    ) -> io::Result<()> {
        let message = self.message(unique, error, len)?;
        let n = message.len();
        // One message, taken whole or refused.
        let written = rustix::io::write(fd, message)?;
        if written == n {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "/dev/fuse took {written} of {n} bytes"
            )))
        }
    }

    /// The bytes that [`Buffer::send`] writes.
    pub(crate) fn message(&mut self, unique: u64, error: i32, len: usize) -> io::Result<&[u8]> {
        if len > self.arena.payload {
            return Err(io::Error::other("reply longer than its buffer"));
        }
        let total = OUT_HEADER + len;
        // SAFETY: the end of the header page and the payload lie side by side in this buffer,
        // which is initialised and only ours.
        let message =
            unsafe { slice::from_raw_parts_mut(self.start().add(PAGE - OUT_HEADER), total) };
        let total = u32::try_from(total).map_err(io::Error::other)?;
        message[0..4].copy_from_slice(&total.to_le_bytes());
        message[4..8].copy_from_slice(&error.to_le_bytes());
        message[8..16].copy_from_slice(&unique.to_le_bytes());
        Ok(message)
    }

    fn start(&self) -> *mut u8 {
        let stride = self.arena.payload + PAGE;
        // SAFETY: index < count, so the buffer lies within the mapping.
        unsafe { self.arena.base.as_ptr().add(self.index * stride) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.arena.free.lock().push(self.index);
        self.arena.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap_and_come_back() {
        let arena = Arc::new(Arena::new(4096, 2).unwrap());
        let mut a = arena.take();
        let mut b = arena.take();
        a.payload().fill(1);
        b.payload().fill(2);
        assert_eq!(a.message(7, -5, 4).unwrap()[OUT_HEADER..], [1; 4]);
        assert_eq!(
            b.message(0x0102, 0, 0).unwrap(),
            [16, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]
        );
        assert!(a.payload().iter().all(|x| *x == 1));
        assert!(a.message(7, 0, 4097).is_err());
        drop(a);
        drop(arena.take());
    }
}
