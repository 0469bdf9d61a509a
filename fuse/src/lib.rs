//! BlobFs: one FUSE mount per node whose flat files are the data devices of EROFS mounts.
//!
//! What it is made of:
//! - `transport` reads requests from `/dev/fuse` and answers them; a read that waits for its
//!   source holds no thread.
//! - `table` is the shared memory in which every request is recorded before it is worked on, so
//!   that the next daemon can answer what this one could not.
//! - [`holder`] is the tiny process that keeps the device and the table while daemons come and go.
//! - [`blobfs`] gives the file system its meaning: decimal names, one blob each.
//! - [`mounts`] mounts and unmounts in a short-lived process of its own.
//! - [`probe`] tries with real, tiny mounts what the kernel can do.
//!
//! What it never does: touch a path below its own mounts from the daemon's process, serve bytes
//! that its [`storage::source::BlobSource`] did not hand out, or turn an outage into zeros.
#![deny(clippy::undocumented_unsafe_blocks)]

pub mod blobfs;
pub mod command;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod holder;
pub mod mounts;
pub mod probe;
mod process;
mod sys;
mod table;
mod transport;

pub use blobfs::{BlobFs, BlobFsOptions, Nodes, StartError, Stats};
pub use command::CommandLine;
pub use table::TableError;
