//! The process that outlives the daemon.
//!
//! It keeps, for each session, the `/dev/fuse` descriptor and the request table, and any other
//! descriptor a daemon wants to find again. It serves nothing: while no daemon runs, readers wait.
//! Its one piece of logic is the fence: it hands a session over only when no recorded reader
//! thread of the former daemon is left, and then raises the generation.

mod client;
mod keeper;
pub(crate) mod protocol;
mod server;

use std::path::PathBuf;

pub use client::HolderError;
pub(crate) use client::{Adopted, Client};
pub use server::run;

/// How the holder is run.
#[derive(Clone, Debug)]
pub struct HolderOptions {
    /// Path of its socket (`holder.sock` in the daemon's state directory). A lock file lies beside
    /// it, named as the socket with `.lock` appended.
    pub socket: PathBuf,
}
