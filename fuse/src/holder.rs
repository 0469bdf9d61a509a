//! The process that outlives the daemon.

use std::{path::PathBuf, process::ExitCode};

/// How the holder is run.
#[derive(Clone, Debug)]
pub struct HolderOptions {
    /// Path of its socket; lock and log lie beside it.
    pub socket: PathBuf,
}

/// Runs the holder until it holds nothing any more: the body of the `holder` subcommand.
pub fn run(options: &HolderOptions) -> ExitCode {
    let _ = options;
    ExitCode::FAILURE
}
