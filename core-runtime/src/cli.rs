//! `snapctl`: everything a person types.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::runner::{self, Stage};

/// Pull, convert, inspect and run images, and look into a running snapshotterd.
#[derive(Debug, Parser)]
#[command(name = "snapctl", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A stage of starting a container; not for people.
    #[command(hide = true)]
    Stage {
        /// Which.
        name: String,
        /// The container's description.
        file: PathBuf,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Stage { name, file } => match Stage::parse(&name) {
            Some(stage) => runner::run_stage(stage, &file),
            None => ExitCode::from(2),
        },
    }
}
