//! A session without a holder, for the probe: it ends with the process.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::fs::MemfdFlags;

use super::{
    Nodes, StartError,
    deadline::Deadline,
    node_table::NodeTable,
    server::{Counters, Server, Shared},
    start::reply_memory,
};
use crate::{
    mounts::Helper,
    sys::device,
    table::{self, Table},
    transport::{Handler, Readers, Session},
};

const MAX_READ_BYTES: u32 = 128 << 10;
/// A few buffers do for a few reads.
const REPLY_BYTES: usize = 1 << 20;

/// A mounted, served session.
#[derive(Debug)]
pub(crate) struct Local {
    mountpoint: PathBuf,
    server: Arc<Server>,
    readers: Readers,
}

impl Local {
    /// Mounts a session at an existing directory.
    pub(crate) async fn mount(
        mountpoint: &Path,
        helper: &Helper,
        runtime: &tokio::runtime::Handle,
        nodes: Arc<dyn Nodes>,
        bound: Duration,
    ) -> Result<Self, StartError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("snapshotterd-probe", flags);
        let memory: OwnedFd = memory.map_err(|e| StartError::Transport(e.into()))?;
        table::format(memory.as_fd()).map_err(StartError::Transport)?;
        let table = Table::open(memory, 0)?;
        let device = device::open().map_err(StartError::Device)?;
        helper
            .mount_fuse("probe", mountpoint, device.as_fd(), MAX_READ_BYTES, bound)
            .await
            .map_err(StartError::Mount)?;
        let arena = reply_memory(REPLY_BYTES, MAX_READ_BYTES)?;
        let session = Session::new("probe".to_owned(), table, Box::new(device), arena);
        let shared = Shared {
            nodes: Arc::new(NodeTable::new(nodes)),
            runtime: runtime.clone(),
            deadline: Deadline::new(Duration::from_mins(1)),
            max_read_bytes: MAX_READ_BYTES,
            counters: Arc::new(Counters::default()),
        };
        let server = Server::new(Arc::new(session), shared, Box::new(|_| {}));
        let handler: Arc<dyn Handler> = Arc::clone(&server) as _;
        let readers = Readers::start(server.session(), &handler, 1);
        Ok(Self {
            mountpoint: mountpoint.to_owned(),
            server,
            readers: readers.map_err(StartError::Transport)?,
        })
    }

    pub(crate) fn path(&self, node: u64) -> PathBuf {
        self.mountpoint.join(node.to_string())
    }

    /// Requests whose answer waits for a source.
    pub(crate) fn waiting(&self) -> usize {
        self.server.waiting()
    }

    /// Fails what waits for a node.
    pub(crate) fn abandon(&self, node: u64) {
        self.server.abandon(node, |_| true);
    }

    /// Ends the session; what still uses it gets errors.
    pub(crate) fn end(mut self) {
        self.readers.stop();
    }
}
