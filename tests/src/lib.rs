//! What the end-to-end suites share. Starting the daemon, containerd and registries is in crate
//! `harness`, re-exported here; [`conformance`] is containerd's snapshotter suite over a socket;
//! [`node`] is containerd with the daemon, [`host`] pulls as containerd does, [`pushed`] makes
//! images and puts them into a lab registry.

pub mod conformance;
pub mod host;
pub mod images;
pub mod mounting;
pub mod node;
pub mod pushed;
pub mod snapshotter;
pub mod tree;

pub use harness::*;
