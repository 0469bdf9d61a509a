//! The shared memory in which requests are recorded.
