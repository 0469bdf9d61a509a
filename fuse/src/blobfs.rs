//! BlobFs: a flat directory whose files are named by decimal node numbers.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use storage::source::{BlobSource, BoxFuture, SourceError};

use crate::{CommandLine, mounts::Helper};

/// Where BlobFs finds its blobs. Asked by number, also right after a restart.
pub trait Nodes: Send + Sync + 'static {
    /// Length of that node's decoded address space in bytes, `None` if there is no such node.
    /// Must not wait for anything remote.
    fn size(&self, node: u64) -> Option<u64>;

    /// Opens a node. Called once per node while it is in use.
    fn open(&self, node: u64) -> BoxFuture<'static, Result<Arc<dyn BlobSource>, SourceError>>;

    /// The last open handle of a node is gone (or its session is). Must not wait.
    fn closed(&self, node: u64);
}

/// How a BlobFs is set up.
#[derive(Clone, Debug)]
pub struct BlobFsOptions {
    /// Where it is mounted. Made if absent; its parent must not be on BlobFs.
    pub mountpoint: PathBuf,
    /// Directory for the holder's socket, lock and log, private to this daemon.
    pub state_dir: PathBuf,
    /// Starts the holder; `--socket PATH` is appended.
    pub holder: CommandLine,
    /// Starts mount helpers.
    pub helper: Helper,
    /// Where reads that wait are continued.
    pub runtime: tokio::runtime::Handle,
    /// Threads that read requests, 1 to 16.
    pub readers: usize,
    /// Longest READ negotiated, in bytes: a multiple of 4096 from 128 KiB to 1 MiB.
    pub max_read_bytes: u32,
    /// Locked memory for replies, in bytes; 4 to 6 MiB stay within the smallest common limit.
    pub reply_memory_bytes: usize,
    /// A read that cannot be served within this time fails.
    pub read_deadline: Duration,
    /// How long to wait for the threads of a former daemon to be gone.
    pub fence_timeout: Duration,
    /// Bound for the mount itself.
    pub mount_timeout: Duration,
}

impl BlobFsOptions {
    /// Defaults for everything that has one.
    pub fn new(
        mountpoint: impl Into<PathBuf>,
        state_dir: impl Into<PathBuf>,
        holder: CommandLine,
        helper: Helper,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            state_dir: state_dir.into(),
            holder,
            helper,
            runtime,
            readers: 2,
            max_read_bytes: 128 << 10,
            reply_memory_bytes: 4 << 20,
            read_deadline: Duration::from_secs(60),
            fence_timeout: Duration::from_secs(60),
            mount_timeout: Duration::from_secs(10),
        }
    }
}

/// Why BlobFs did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// This version has no transport.
    #[error("BlobFs has no transport in this version")]
    NotBuilt,
}

/// Counters since this daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// READs answered with data.
    pub reads: u64,
    /// Bytes in them.
    pub read_bytes: u64,
    /// Requests answered with an error, ENOSYS aside.
    pub errors: u64,
    /// Requests that wait for their source now.
    pub waiting: u64,
    /// Requests taken over from a former daemon.
    pub replayed: u64,
}

/// A mounted, served BlobFs.
#[derive(Debug)]
pub struct BlobFs {
    mountpoint: PathBuf,
}

impl BlobFs {
    /// Adopts the session of a former daemon or makes a new one, and serves it.
    pub async fn start(options: BlobFsOptions, nodes: Arc<dyn Nodes>) -> Result<Self, StartError> {
        let _ = (options, nodes);
        Err(StartError::NotBuilt)
    }

    /// The file of a node. Whoever walks this path may wait for the daemon: only mount helpers do.
    pub fn path(&self, node: u64) -> PathBuf {
        self.mountpoint.join(node.to_string())
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the session of a former daemon goes on. False: mounts that a former daemon made on
    /// BlobFs are dead and have to be made anew.
    pub fn adopted(&self) -> bool {
        false
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }

    /// Stops serving. With `keep_mounts` readers wait for the next daemon; without, BlobFs is
    /// unmounted (lazily if something still uses it) and the holder let go.
    pub async fn stop(self, keep_mounts: bool) {
        let _ = keep_mounts;
    }
}
