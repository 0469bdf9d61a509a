//! The calls of the C library that need unsafe.
#![allow(
    unsafe_code,
    reason = "the one place of this crate that calls the C library itself"
)]

/// How many heaps threads share. More would be faster for programs that allocate all the time;
/// this one parses an index now and then on some thread of a pool, and what it frees should be
/// found by the next thread that does.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// Bounds the heaps of this process. Call it before threads are started.
pub fn limit_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers and only sets a parameter of the allocator; a refusal
    // leaves the default.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives free memory back to the system. Takes milliseconds.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the locks it needs and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
