//! Which program to start for the holder and for the mount helper.

use std::{ffi::OsString, path::PathBuf};

/// A program and its leading arguments, usually this daemon's own executable and a subcommand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// Path of the executable.
    pub program: PathBuf,
    /// Arguments that come before the ones added here.
    pub args: Vec<OsString>,
}

impl CommandLine {
    /// A program with its leading arguments.
    pub fn new<A: Into<OsString>>(
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        Self {
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
        }
    }
}
