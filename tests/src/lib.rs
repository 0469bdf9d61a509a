//! What the end-to-end suites share. Starting the daemon, containerd and registries is in crate
//! `harness`, re-exported here; [`conformance`] is containerd's snapshotter suite over a socket.

pub mod conformance;
pub mod mounting;
pub mod snapshotter;
pub mod tree;

pub mod images;

pub use harness::*;
