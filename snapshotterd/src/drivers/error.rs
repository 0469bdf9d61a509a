//! Why a driver refuses or fails.

use std::{io, path::PathBuf};

use crate::store::StoreError;

/// Why a driver refuses or fails. Each variant has one gRPC code, see
/// [`service::status`](crate::service).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The request makes no sense.
    #[error("{0}")]
    InvalidArgument(String),
    /// The request does not fit the present state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Something needed is not reachable now; asking again may help.
    #[error("{0}")]
    Unavailable(String),
    /// The driver cannot do this.
    #[error("{0}")]
    Unimplemented(String),
    /// A file system operation failed.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Everything else that is the daemon's own trouble.
    #[error("{0}")]
    Internal(String),
}

impl DriverError {
    /// Wraps an I/O error with what was tried on which path; for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
