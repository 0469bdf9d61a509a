//! The minimal runtime manager: what `snapctl` is made of.
//!
//! Entry points: [`process::Process`] (what to start, from an image's config), [`runner`] (start it
//! in a root file system, with an installed OCI runtime or the embedded one).
#![deny(unsafe_code)]

pub mod admin;
pub mod cli;
pub mod convert;
pub mod doctor;
pub mod image;
pub mod inspect;
pub mod process;
pub mod pull;
pub mod record;
pub mod runner;
pub mod snapshots;
mod sys;
pub mod unpack;
