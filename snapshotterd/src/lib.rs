//! The daemon: containerd's snapshots service over one metadata store and a few drivers.
//!
//! It never holds an image byte on a path of its own making: bytes come from `storage`, FUSE and
//! mounts from `fuse`. It never runs a directory walk or waits for a registry inside an RPC that
//! containerd makes under one of its own locks (Commit, Remove).
//!
//! Entry points: [`daemon::Daemon`] (the whole daemon in one value), [`service::Snapshots`] (the
//! gRPC service), [`drivers::Driver`] (what a kind of snapshot storage implements),
//! [`store::Store`] (the state machine of snapshots), [`config::Config`].
#![deny(unsafe_code)]

pub mod admin;
pub mod api;
pub mod config;
pub mod containerd;
pub mod daemon;
pub mod drivers;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod layers;
pub mod lock;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod resolve;
pub mod service;
pub mod store;
pub mod sys;
pub mod trust;
