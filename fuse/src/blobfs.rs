//! BlobFs: a flat directory whose files are named by decimal node numbers.

mod deadline;
pub(crate) mod local;
mod node_table;
mod server;
mod start;
mod watch;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use storage::source::{BlobSource, BoxFuture, SourceError};

use crate::{
    CommandLine,
    holder::{Client, HolderError},
    mounts::{Helper, HelperError},
    process,
    table::TableError,
    transport::Readers,
};
use server::{Counters, Server};
use watch::HolderWatch;

/// Where BlobFs finds its blobs. Asked by number, also right after a restart.
pub trait Nodes: Send + Sync + 'static {
    /// Length of that node's decoded address space in bytes, `None` if there is no such node.
    /// Must not wait for anything remote.
    fn size(&self, node: u64) -> Option<u64>;

    /// Opens a node. Called once per node while it is in use; after an error, again.
    fn open(&self, node: u64) -> BoxFuture<'static, Result<Arc<dyn BlobSource>, SourceError>>;

    /// The last open handle of a node is gone (or its session is). Must not wait.
    fn closed(&self, node: u64);
}

/// How a BlobFs is set up.
#[derive(Clone, Debug)]
pub struct BlobFsOptions {
    /// Where it is mounted. Made if absent; its parent must not be on BlobFs.
    pub mountpoint: PathBuf,
    /// Directory for the holder's socket, lock and log, private to this daemon. Made if absent.
    pub state_dir: PathBuf,
    /// Starts the holder; `--socket PATH` is appended.
    pub holder: CommandLine,
    /// Starts mount helpers.
    pub helper: Helper,
    /// Where reads that wait are continued. Needs its time driver.
    pub runtime: tokio::runtime::Handle,
    /// Threads that read requests, 1 to 16. They also read local bytes from disk.
    pub readers: usize,
    /// Longest READ negotiated for a new session, in bytes: 128 KiB to 1 MiB, a multiple of 4096.
    pub max_read_bytes: u32,
    /// Locked memory for replies, in bytes; 4 to 6 MiB stay within the smallest common limit.
    pub reply_memory_bytes: usize,
    /// A read that cannot be served within this time fails. Half of the kernel's own request
    /// timeout rules where one is set.
    pub read_deadline: Duration,
    /// How long to wait for the reader threads of a former daemon to be gone.
    pub fence_timeout: Duration,
    /// Bound for mounting and unmounting.
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
            read_deadline: Duration::from_mins(1),
            fence_timeout: Duration::from_mins(1),
            mount_timeout: Duration::from_secs(10),
        }
    }
}

/// Why BlobFs did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An option is outside of its bounds.
    #[error("{option} is {value}, it must be {bounds}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        bounds: &'static str,
    },
    /// A directory could not be made or resolved.
    #[error("prepare {path:?}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// /dev/fuse could not be opened.
    #[error("open /dev/fuse")]
    Device(#[source] io::Error),
    /// No memory for replies, or no threads.
    #[error("set up the transport")]
    Transport(#[source] io::Error),
    /// A table just made is invalid.
    #[error("use the request table")]
    Table(#[from] TableError),
    /// The holder did not do its part.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// Something that is not a dead session of ours is mounted there.
    #[error(
        "{mountpoint:?} is in use by {fs_type} {fs_source:?}, which is not a session held here"
    )]
    Occupied {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// Type of what is mounted.
        fs_type: String,
        /// Source of what is mounted.
        fs_source: String,
    },
    /// It could not be mounted.
    #[error("mount BlobFs")]
    Mount(#[source] HelperError),
}

/// Counters since this daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// READs answered with data.
    pub reads: u64,
    /// Bytes in them.
    pub read_bytes: u64,
    /// Requests answered with an error (lookups of absent names and ENOSYS aside).
    pub errors: u64,
    /// Requests that wait for their source now.
    pub waiting: u64,
    /// Requests taken over from a former daemon.
    pub replayed: u64,
    /// Nodes with an open handle.
    pub nodes_in_use: u64,
}

/// What this BlobFs came from and what it had to do without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// The session of a former daemon goes on. False: mounts that a former daemon made on BlobFs
    /// are dead and have to be made anew.
    pub adopted: bool,
    /// The former daemon's table was unusable and the kernel was asked to resend.
    pub resent: bool,
    /// Reply memory is locked; false where RLIMIT_MEMLOCK forbids it.
    pub replies_locked: bool,
}

/// A mounted, served BlobFs.
#[derive(Debug)]
pub struct BlobFs {
    mountpoint: PathBuf,
    helper: Helper,
    mount_timeout: Duration,
    condition: Condition,
    counters: Arc<Counters>,
    holder: Arc<Client>,
    watch: Arc<Mutex<HolderWatch>>,
    /// The session that is mounted comes last; those before it live on under mounts that were made
    /// while they were.
    sessions: Vec<Arc<Server>>,
    readers: Arc<Mutex<Vec<Readers>>>,
}

impl BlobFs {
    /// Adopts the session of a former daemon or makes a new one, and serves it.
    ///
    /// When this returns, every request that the former daemon left has been answered or is being
    /// worked on. Call [`Helper::settle`] next, and compare mountinfo with what was intended.
    pub async fn start(options: BlobFsOptions, nodes: Arc<dyn Nodes>) -> Result<Self, StartError> {
        start::start(options, nodes).await
    }

    /// The file of a node. Whoever walks this path may wait for the daemon: only mount helpers do.
    pub fn path(&self, node: u64) -> PathBuf {
        self.mountpoint.join(node.to_string())
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the session of a former daemon goes on; see [`Condition::adopted`].
    pub fn adopted(&self) -> bool {
        self.condition.adopted
    }

    /// What it came from.
    pub fn condition(&self) -> &Condition {
        &self.condition
    }

    /// Whether the mounted session still exists: false after someone else unmounted or aborted it.
    pub fn is_alive(&self) -> bool {
        self.sessions
            .last()
            .is_some_and(|server| !server.session().has_ended())
    }

    /// Fails (EIO) every request that waits for this node, and says how many there were.
    ///
    /// For the moment before a layer is unmounted: a killed reader leaves its request behind, and
    /// the kernel tears an EROFS superblock down only when that is answered, in a sleep that
    /// nothing ends. Requests that come later wait again.
    pub fn abandon(&self, node: u64) -> usize {
        self.sessions
            .iter()
            .map(|server| server.abandon(node, |_| true))
            .sum()
    }

    /// As [`Self::abandon`], but only what was asked for by threads that have ended or are being
    /// killed: harmless to whoever reads the node through another mount, since a reader that
    /// waits for the same page then asks for it itself.
    pub fn abandon_ended(&self, node: u64) -> usize {
        self.sessions
            .iter()
            .map(|server| server.abandon(node, process::kill_is_pending))
            .sum()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        let waiting: usize = self.sessions.iter().map(|server| server.waiting()).sum();
        Stats {
            reads: self.counters.reads.load(Ordering::Relaxed),
            read_bytes: self.counters.read_bytes.load(Ordering::Relaxed),
            errors: self.counters.errors.load(Ordering::Relaxed),
            waiting: waiting as u64,
            replayed: self.counters.replayed.load(Ordering::Relaxed),
            nodes_in_use: self
                .sessions
                .last()
                .map_or(0, |server| server.nodes_in_use() as u64),
        }
    }

    /// How many sessions the holder keeps.
    pub fn held_sessions(&self) -> Result<usize, HolderError> {
        Ok(self.holder.sessions()?.len())
    }

    /// Lets the holder keep a descriptor for the next daemon (a lock, a listening socket).
    pub fn keep_fd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), HolderError> {
        self.holder.put(name, fd)?;
        self.watch.lock().keep(name, fd);
        Ok(())
    }

    /// A descriptor that a former daemon let the holder keep.
    pub fn kept_fd(&self, name: &str) -> Result<Option<OwnedFd>, HolderError> {
        let fd = self.holder.take(name)?;
        if let Some(fd) = &fd {
            // So that a new holder gets it too.
            self.watch.lock().keep(name, fd.as_fd());
        }
        Ok(fd)
    }

    /// Makes the holder let a kept descriptor go.
    pub fn forget_fd(&self, name: &str) -> Result<(), HolderError> {
        self.watch.lock().forget(name);
        self.holder.forget(name)
    }

    /// Stops serving. With `keep_mounts` readers wait for the next daemon; without, BlobFs is
    /// unmounted (lazily if something still uses it: the users' reads then fail) and the holder
    /// ends. Waits for reads of local bytes under way, for nothing else.
    pub async fn stop(&self, keep_mounts: bool) -> Result<(), HelperError> {
        let mut unmounted = Ok(());
        if !keep_mounts && self.is_alive() {
            // Served until it is gone: an unmount may wait for answers.
            let plain = self
                .helper
                .umount(&self.mountpoint, false, self.mount_timeout)
                .await;
            if plain.is_err() {
                unmounted = self
                    .helper
                    .umount(&self.mountpoint, true, self.mount_timeout)
                    .await;
            }
        }
        let (watch, readers) = (Arc::clone(&self.watch), Arc::clone(&self.readers));
        let holder = Arc::clone(&self.holder);
        let sessions = self.sessions.iter().map(|server| server.session().name());
        let sessions: Vec<_> = sessions.map(str::to_owned).collect();
        let stopped = tokio::task::spawn_blocking(move || {
            watch.lock().stop();
            for readers in &mut *readers.lock() {
                readers.stop();
            }
            if !keep_mounts {
                let_go(&holder, &sessions);
            }
        });
        let _ = stopped.await;
        unmounted
    }
}

/// Ends the sessions with the holder, and the holder if nothing else is kept.
fn let_go(holder: &Client, sessions: &[String]) {
    for session in sessions {
        if let Err(e) = holder.drop_session(session) {
            tracing::warn!(error = %e, "let a session go");
        }
    }
    match holder.quit() {
        Ok(()) => holder.reap(),
        Err(e) => tracing::info!(error = %e, "the holder stays"),
    }
}
