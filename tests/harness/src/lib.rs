//! What the end-to-end suites share: starting the daemon, containerd and registries on private
//! sockets and directories, running a test in a process of its own under a hard timeout, and
//! comparing trees.
//!
//! A test that lacks something on this machine calls [`skip()`] and returns; `./run test` counts it.

pub mod containerd;
pub mod cri;
pub mod daemon;
pub mod isolate;
pub mod listing;
pub mod machine;
pub mod process;
pub mod pulling;
pub mod stargz;
pub mod tarball;
pub mod workdir;

pub use skip::skip;
