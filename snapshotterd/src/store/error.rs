//! Why a store operation failed.

use std::{io, path::PathBuf};

use super::{FilterError, Kind};

/// Why a store operation failed. The first group is an answer to the caller, the second is
/// trouble of the daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No snapshot of that key or name.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// The key asked for.
        key: String,
    },
    /// No parent of that name.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// The parent asked for.
        parent: String,
    },
    /// The key or name is taken.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// The key or name.
        key: String,
    },
    /// The parent of a new snapshot is not committed.
    #[error("parent snapshot {parent:?} is {kind}, not committed")]
    ParentNotCommitted {
        /// The parent.
        parent: String,
        /// Its state.
        kind: Kind,
    },
    /// The parent that a commit wants to link to is not committed.
    #[error("cannot rebase on snapshot {parent:?}, which is {kind}, not committed")]
    RebaseParentNotCommitted {
        /// The parent.
        parent: String,
        /// Its state.
        kind: Kind,
    },
    /// A commit names another parent than the one the snapshot has.
    #[error("snapshot {key:?} has parent {actual:?} and cannot be committed with {asked:?}")]
    ParentMismatch {
        /// The active snapshot.
        key: String,
        /// Its parent.
        actual: String,
        /// The parent in the request.
        asked: String,
    },
    /// The operation does not fit the snapshot's state.
    #[error("cannot {operation} snapshot {key:?}, which is {kind}")]
    WrongKind {
        /// What was asked.
        operation: &'static str,
        /// The snapshot.
        key: String,
        /// Its state.
        kind: Kind,
    },
    /// Other snapshots are built on this one.
    #[error("cannot remove snapshot {key:?}: it has children")]
    HasChildren {
        /// The snapshot.
        key: String,
    },
    /// A field mask names something that cannot be changed.
    #[error("field {path:?} of a snapshot cannot be updated")]
    ImmutableField {
        /// The path in the mask.
        path: String,
    },
    /// An empty or over-long key.
    #[error("invalid snapshot key of {length} bytes: 1 to {limit} are allowed")]
    InvalidKey {
        /// Its length.
        length: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// A filter that does not parse.
    #[error(transparent)]
    Filter(#[from] FilterError),

    /// The database was written by a newer daemon.
    #[error("the metadata store has schema {found}, this daemon knows up to {supported}")]
    Schema {
        /// The version on disk.
        found: u64,
        /// The newest version known.
        supported: u64,
    },
    /// A record that does not decode or points nowhere.
    #[error("the metadata store is damaged: {what}")]
    Corrupt {
        /// Where and what.
        what: String,
    },
    /// Opening or creating the file failed.
    #[error("cannot open the metadata store {path}", path = path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The database failed.
    #[error("metadata store")]
    Database(#[source] Box<redb::Error>),
    /// The commit that carried this change failed; nothing of it was written.
    #[error("the commit of a group of changes failed: {reason}")]
    CommitFailed {
        /// What the database said.
        reason: String,
    },
    /// A change panicked; nothing of it was written.
    #[error("a change to the metadata store panicked: {message}")]
    Panicked {
        /// The panic message.
        message: String,
    },
    /// The store is shutting down.
    #[error("the metadata store is closed")]
    Closed,
}

impl StoreError {
    pub(super) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}

from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);
