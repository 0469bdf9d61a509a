//! The minimal runtime manager: what `snapctl` is made of.
//!
//! Entry points: [`process::Process`] (what to start, from an image's config), [`runner`] (start it
//! in a root file system, with an installed OCI runtime or the embedded one).
#![deny(unsafe_code)]

pub mod cli;
pub mod process;
pub mod runner;
mod sys;
pub mod unpack;
