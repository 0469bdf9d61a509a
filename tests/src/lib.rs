//! What the end-to-end suites share. Starting the daemon, containerd and registries is in crate
//! `harness`, re-exported here.

pub use harness::*;
