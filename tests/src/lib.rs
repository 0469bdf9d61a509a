//! What the end-to-end suites share. Starting the daemon, containerd and registries is in crate
//! `harness`, re-exported here; [`conformance`] is containerd's snapshotter suite over a socket;
//! [`host`] pulls as containerd does, [`pushed`] makes small images and puts them into a lab
//! registry.

pub mod conformance;
pub mod host;
pub mod mounting;
pub mod pushed;
pub mod snapshotter;
pub mod tree;

pub mod images;

pub use harness::*;
