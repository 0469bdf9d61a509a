//! eStargz layers that we write: read back by us, by gzip and tar, and by upstream's library.
#![expect(
    clippy::unwrap_used,
    reason = "test code outside of test functions, too"
)]

mod fixtures;
mod identity;
mod peers;
mod tars;
