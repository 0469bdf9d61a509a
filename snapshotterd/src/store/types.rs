//! What the store speaks of.

use std::{collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

use prost_types::Timestamp;

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// The present, as snapshots record it.
pub fn now() -> Timestamp {
    SystemTime::now().into()
}

/// A snapshot's name: containerd's key (or committed name) under one plugin name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotKey {
    /// The plugin name containerd registered the daemon under.
    pub snapshotter: Arc<str>,
    /// containerd's key, usually `<namespace>/<sequence>/<client key>`.
    pub key: Arc<str>,
}

impl SnapshotKey {
    /// Names `key` of plugin `snapshotter`.
    pub fn new(snapshotter: impl Into<Arc<str>>, key: impl Into<Arc<str>>) -> Self {
        Self {
            snapshotter: snapshotter.into(),
            key: key.into(),
        }
    }

    /// Another key of the same plugin.
    #[must_use]
    pub fn sibling(&self, key: &str) -> Self {
        Self {
            snapshotter: Arc::clone(&self.snapshotter),
            key: key.into(),
        }
    }
}

impl fmt::Display for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.key, self.snapshotter)
    }
}

/// The number of a snapshot, unique on the node over all plugin names and for all time. An active
/// snapshot keeps it when it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The state of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Read-only, cannot be committed.
    View,
    /// Writable.
    Active,
    /// Immutable; may be a parent.
    Committed,
}

impl Kind {
    /// The lower-case word of the filter language.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a snapshot takes on disk without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// What containerd may know about a snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Info {
    /// The key of an active snapshot or view, the name of a committed one.
    pub name: String,
    /// The parent's name.
    pub parent: Option<String>,
    /// The state.
    pub kind: Kind,
    /// When it was made; reset by a commit.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
    /// The labels.
    pub labels: Labels,
}

/// A snapshot as drivers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Its number.
    pub id: SnapshotId,
    /// What containerd sees of it.
    pub info: Info,
    /// The numbers of its ancestors, nearest first.
    pub parents: Vec<SnapshotId>,
    /// Usage as recorded; `None` when never computed.
    pub usage: Option<Usage>,
}

/// Everything a new snapshot is made of.
#[derive(Clone, Debug)]
pub struct CreateSnapshot {
    /// Its key.
    pub key: SnapshotKey,
    /// Its state. `Committed` makes a remote snapshot: one that was never active here.
    pub kind: Kind,
    /// The name of its parent, which must be committed.
    pub parent: Option<Arc<str>>,
    /// Its labels; empty values are dropped.
    pub labels: Labels,
    /// Its number, from [`Store::reserve_id`](super::Store::reserve_id).
    pub id: SnapshotId,
}

/// A commit.
#[derive(Clone, Debug)]
pub struct CommitSnapshot {
    /// The key of the active snapshot.
    pub key: SnapshotKey,
    /// The name of the committed one.
    pub name: Arc<str>,
    /// The parent to link a snapshot to that was prepared without one; otherwise absent or the
    /// parent it has.
    pub parent: Option<Arc<str>>,
    /// The labels of the committed snapshot; those of the active one are not inherited.
    pub labels: Labels,
    /// Usage, where it is known without a directory walk.
    pub usage: Option<Usage>,
}
