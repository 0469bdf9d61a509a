//! What parent and child say to each other: one JSON request, one JSON line back.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A request with the place where the child registers itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    /// Directory in which the child leaves `PID` with its start time for as long as it works.
    pub(crate) claims: Option<PathBuf>,
    /// What to do.
    pub(crate) operation: Operation,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Operation {
    /// The device comes with the request, as SCM_RIGHTS.
    MountFuse {
        source: String,
        target: PathBuf,
        max_read_bytes: u32,
    },
    MountErofs {
        metadata: PathBuf,
        devices: Vec<PathBuf>,
        target: PathBuf,
        direct_io: bool,
    },
    MountOverlay {
        lowers: Vec<PathBuf>,
        upper: Option<PathBuf>,
        work: Option<PathBuf>,
        target: PathBuf,
    },
    Umount {
        target: PathBuf,
        lazy: bool,
    },
    Statfs {
        path: PathBuf,
    },
    /// Reads a file; with `alarm_ms` under a storm of SIGALRM handled without SA_RESTART.
    ReadFile {
        path: PathBuf,
        offset: u64,
        len: u64,
        alarm_ms: Option<u64>,
    },
}

impl Operation {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::MountFuse { .. } => "mount_fuse",
            Self::MountErofs { .. } => "mount_erofs",
            Self::MountOverlay { .. } => "mount_overlay",
            Self::Umount { .. } => "umount",
            Self::Statfs { .. } => "statfs",
            Self::ReadFile { .. } => "read_file",
        }
    }

    pub(crate) fn target(&self) -> &PathBuf {
        match self {
            Self::MountFuse { target, .. }
            | Self::MountErofs { target, .. }
            | Self::MountOverlay { target, .. }
            | Self::Umount { target, .. } => target,
            Self::Statfs { path } | Self::ReadFile { path, .. } => path,
        }
    }

    pub(crate) fn mounts(&self) -> bool {
        matches!(
            self,
            Self::MountFuse { .. } | Self::MountErofs { .. } | Self::MountOverlay { .. }
        )
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Response {
    Done,
    Statfs {
        blocks: u64,
        block_size_bytes: u64,
        fs_type: u64,
    },
    Read {
        bytes: u64,
        sha256: String,
    },
    Failed {
        step: String,
        errno: i32,
        message: String,
    },
}
