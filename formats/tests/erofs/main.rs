//! EROFS images: property tests, foreign images, and what the kernel makes of ours.
#![expect(
    clippy::unwrap_used,
    clippy::unnecessary_debug_formatting,
    reason = "test code outside of test functions, too; paths here hold bytes that want escaping"
)]

mod fixtures;
mod foreign;
mod generate;
mod identity;
mod kernel;
mod sample;
