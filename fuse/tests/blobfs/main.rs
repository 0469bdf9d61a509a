//! BlobFs against the kernel: real mounts, real kills. Needs root; says SKIP otherwise.
//!
//! Everything that reads or serves is another process under a bound of its own.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on fails; what it measured and skipped goes to stderr"
)]

mod crash;
mod hold;
mod isolation;
mod probe;
mod serve;
mod signals;
mod world;
