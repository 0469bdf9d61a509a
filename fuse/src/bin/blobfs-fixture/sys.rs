//! Reading through a mapping: every byte by page fault.
#![deny(unsafe_op_in_unsafe_fn)]

use std::{fs::File, io, ptr, slice};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Copies the first `len` bytes of a file that nobody changes out of a private mapping.
pub(crate) fn read_mapped(file: &File, len: usize) -> io::Result<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: a fresh read-only mapping at an address of the kernel's choice.
    let base = unsafe {
        mmap(
            ptr::null_mut(),
            len,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            0,
        )
    }?;
    // SAFETY: just mapped, `len` bytes, and images are immutable.
    let bytes = unsafe { slice::from_raw_parts(base.cast::<u8>(), len) }.to_vec();
    // SAFETY: exactly what was mapped; nothing borrows it any more.
    unsafe { munmap(base, len) }?;
    Ok(bytes)
}
