//! What each request means. One server per session; they share the nodes.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rustix::io::Errno;
use storage::source::{BlobSource, Cause, ReadNow, SourceError};

use super::{
    deadline::Deadline,
    node_table::{NodeTable, ino, number},
};
use crate::{
    process,
    sys::{
        abi::{self, Attr, FOPEN_DIRECT_IO, ROOT, op},
        arena::Buffer,
    },
    table::Request,
    transport::{Handler, Session, Ticket, init},
};

/// Names and attributes never change: the kernel may keep them.
const VALID_SECS: u64 = 365 * 24 * 3600;
/// How often a request that a signal hit is looked at for a pending SIGKILL.
const KILL_POLL: Duration = Duration::from_millis(100);

/// Counters shared by all sessions of a daemon.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) replayed: AtomicU64,
}

/// What is told when a session is over.
pub(super) type OnEnd = Box<dyn Fn(&Session) + Send + Sync>;

/// Serves one session.
pub(super) struct Server {
    me: Weak<Self>,
    session: Arc<Session>,
    nodes: Arc<NodeTable>,
    runtime: tokio::runtime::Handle,
    deadline: Deadline,
    max_read_bytes: u32,
    counters: Arc<Counters>,
    /// Requests whose answer waits for a source, by unique. Who takes one out answers it.
    waiting: Mutex<HashMap<u64, Ticket>>,
    /// Of those, the ones a signal has hit.
    signalled: Mutex<Vec<u64>>,
    ended: AtomicBool,
    on_end: OnEnd,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// What a server is made of, beside its session.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) nodes: Arc<NodeTable>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) deadline: Deadline,
    pub(super) max_read_bytes: u32,
    pub(super) counters: Arc<Counters>,
}

impl Server {
    pub(super) fn new(session: Arc<Session>, shared: Shared, on_end: OnEnd) -> Arc<Self> {
        for number in session.table().open_nodes() {
            shared.nodes.add_handle(number);
        }
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            session,
            nodes: shared.nodes,
            runtime: shared.runtime,
            deadline: shared.deadline,
            max_read_bytes: shared.max_read_bytes,
            counters: shared.counters,
            waiting: Mutex::default(),
            signalled: Mutex::default(),
            ended: AtomicBool::new(false),
            on_end,
        })
    }

    pub(super) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Requests whose answer waits for a source.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Fails what waits for a node, if `which` says so of the requesting thread.
    pub(super) fn abandon(&self, node: u64, which: impl Fn(u32) -> bool) -> usize {
        let requests: Vec<(u64, u32)> = self
            .waiting
            .lock()
            .iter()
            .filter(|(_, ticket)| number(ticket.request().node) == Some(node))
            .map(|(unique, ticket)| (*unique, ticket.request().pid))
            .collect();
        let tickets = requests
            .into_iter()
            .filter(|(_, pid)| which(*pid))
            .filter_map(|(unique, _)| self.take(unique));
        tickets
            .map(|ticket| self.fail(ticket, Errno::IO.raw_os_error()))
            .count()
    }

    /// Nodes in use, by all sessions.
    pub(super) fn nodes_in_use(&self) -> usize {
        self.nodes.numbers().len()
    }

    fn read(&self, ticket: Ticket) {
        let request = *ticket.request();
        let Some(number) = number(request.node) else {
            return self.fail(ticket, Errno::ISDIR.raw_os_error());
        };
        if let Some(source) = self.nodes.source(number) {
            let mut buffer = self.session.buffer();
            match fill(&*source, &request, &mut buffer) {
                Ok(Some(len)) => return self.answer_read(ticket, &mut buffer, len),
                Ok(None) => {}
                Err(e) => {
                    tracing::warn!(node = number, offset = request.offset, error = %e, "read");
                    return self.fail(ticket, errno_of(&e));
                }
            }
        }
        self.later(ticket, move |server| async move {
            let mut pause = Duration::from_millis(1);
            loop {
                let source = server.nodes.open(number).await?;
                let len = wanted(&*source, &request);
                Arc::clone(&source)
                    .ensure(request.offset, len, Cause::Demand)
                    .await?;
                let mut buffer = server.session.buffer();
                match fill(&*source, &request, &mut buffer) {
                    Ok(Some(len)) => {
                        if let Some(ticket) = server.take(request.unique) {
                            server.answer_read(ticket, &mut buffer, len);
                        }
                        return Ok(());
                    }
                    // Evicted again before it was read.
                    Ok(None) => drop(buffer),
                    Err(e) => {
                        return Err(SourceError {
                            errno: errno_of(&e),
                            message: format!("read at {}: {e}", request.offset),
                        });
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
        });
    }

    fn answer_read(&self, ticket: Ticket, buffer: &mut Buffer, len: usize) {
        ticket.answer(buffer, len);
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters
            .read_bytes
            .fetch_add(len as u64, Ordering::Relaxed);
    }

    fn open(&self, ticket: Ticket) {
        let request = *ticket.request();
        let Some(number) = number(request.node) else {
            return self.fail(ticket, Errno::ISDIR.raw_os_error());
        };
        if request.fh != 0 {
            // A former daemon gave it a handle; whether its answer went out, the kernel knows.
            return self.opened(ticket, number);
        }
        if self.nodes.size(number).is_none() {
            return self.fail(ticket, Errno::NOENT.raw_os_error());
        }
        if self.nodes.source(number).is_some() {
            return self.opened(ticket, number);
        }
        self.later(ticket, move |server| async move {
            server.nodes.open(number).await?;
            if let Some(ticket) = server.take(request.unique) {
                server.opened(ticket, number);
            }
            Ok(())
        });
    }

    fn opened(&self, ticket: Ticket, number: u64) {
        let Some(granted) = ticket.grant_handle(number) else {
            return self.fail(ticket, Errno::NFILE.raw_os_error());
        };
        if granted.new {
            self.nodes.add_handle(number);
        }
        ticket.answer_bytes(&abi::open_out(granted.fh, FOPEN_DIRECT_IO));
    }

    /// Goes on with a request on the runtime, within the deadline; holds no thread meanwhile.
    fn later<F, W>(&self, ticket: Ticket, work: F)
    where
        F: FnOnce(Arc<Self>) -> W,
        W: Future<Output = Result<(), SourceError>> + Send + 'static,
    {
        let Some(server) = self.me.upgrade() else {
            return;
        };
        let request = *ticket.request();
        let left = self.deadline.left(request.started_ns);
        self.waiting.lock().insert(request.unique, ticket);
        let work = work(Arc::clone(&server));
        self.runtime.spawn(async move {
            let failure = match tokio::time::timeout(left, work).await {
                Ok(Ok(())) => return,
                Ok(Err(e)) => e,
                Err(_) => SourceError {
                    errno: Errno::TIMEDOUT.raw_os_error(),
                    message: format!("not served within {left:?}"),
                },
            };
            if let Some(ticket) = server.take(request.unique) {
                tracing::warn!(
                    node = number(request.node),
                    offset = request.offset,
                    len = request.size,
                    errno = failure.errno,
                    "{}",
                    failure.message
                );
                server.fail(ticket, failure.errno);
            }
        });
    }

    fn take(&self, unique: u64) -> Option<Ticket> {
        self.waiting.lock().remove(&unique)
    }

    fn fail(&self, ticket: Ticket, errno: i32) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        ticket.fail(errno);
    }

    fn init(&self, ticket: Ticket) {
        let table = self.session.table();
        let offer = ticket.request().payload;
        let reply = match table.saved_init() {
            Some(reply) => reply,
            None => match init::negotiate(&offer, self.max_read_bytes) {
                Ok(negotiated) => {
                    if !negotiated.async_dio {
                        tracing::warn!("the kernel has no asynchronous direct I/O");
                    }
                    table.save_init(&offer, &negotiated.reply);
                    negotiated.reply
                }
                Err(minor) => {
                    tracing::error!(minor, "the kernel's FUSE protocol is older than 7.28");
                    return self.fail(ticket, Errno::PROTO.raw_os_error());
                }
            },
        };
        let bytes: Vec<u8> = reply.iter().flat_map(|word| word.to_le_bytes()).collect();
        ticket.answer_bytes(&bytes);
    }

    fn attr(&self, ino: u64) -> Option<Attr> {
        if ino == ROOT {
            return Some(Attr {
                ino,
                size: 0,
                mode: 0o040_555,
                nlink: 2,
            });
        }
        Some(Attr {
            ino,
            size: self.nodes.size(number(ino)?)?,
            mode: 0o100_444,
            nlink: 1,
        })
    }

    /// A name is a node number as `to_string` writes it: one name for each node.
    fn lookup(&self, request: &Request) -> Option<Attr> {
        if request.node != ROOT {
            return None;
        }
        let name = String::from_utf8(request.name()?).ok()?;
        let number: u64 = name.parse().ok()?;
        (number.to_string() == name).then_some(())?;
        self.attr(ino(number)?)
    }

    fn read_dir(&self, request: &Request) -> Vec<u8> {
        let mut entries = vec![(ROOT, true, ".".to_owned()), (ROOT, true, "..".to_owned())];
        entries.extend(
            self.nodes
                .numbers()
                .into_iter()
                .filter_map(|number| Some((ino(number)?, false, number.to_string()))),
        );
        let room = usize::try_from(request.size).unwrap_or(0);
        let room = room.min(self.session.longest_reply());
        let skip = usize::try_from(request.offset).unwrap_or(usize::MAX);
        let mut out = Vec::new();
        for (index, (ino, is_dir, name)) in entries.iter().enumerate().skip(skip) {
            let entry = abi::dirent(*ino, index as u64 + 1, *is_dir, name);
            if out.len() + entry.len() > room {
                break;
            }
            out.extend_from_slice(&entry);
        }
        out
    }

    /// Watches requests that a signal has hit: one whose thread is being killed gets EINTR, so
    /// that it can die; any other goes on waiting, since its reader did not ask for an error.
    async fn watch_signalled(self: Arc<Self>) {
        loop {
            tokio::time::sleep(KILL_POLL).await;
            let uniques = self.signalled.lock().clone();
            let seen = uniques.len();
            let mut still = Vec::new();
            for unique in uniques {
                let pid = self.waiting.lock().get(&unique).map(|t| t.request().pid);
                match pid {
                    Some(pid) if process::kill_is_pending(pid) => {
                        if let Some(ticket) = self.take(unique) {
                            ticket.fail(Errno::INTR.raw_os_error());
                        }
                    }
                    Some(_) => still.push(unique),
                    None => {}
                }
            }
            let mut signalled = self.signalled.lock();
            // What came in meanwhile is at the end.
            still.extend_from_slice(&signalled[seen..]);
            *signalled = still;
            if signalled.is_empty() {
                return;
            }
        }
    }
}

impl Handler for Server {
    fn request(&self, ticket: Ticket) {
        let request = *ticket.request();
        let not_found = Errno::NOENT.raw_os_error();
        match request.opcode {
            op::READ => self.read(ticket),
            op::OPEN => self.open(ticket),
            op::RELEASE => {
                if let Some(closed) = self.session.table().close_handle(request.fh)
                    && !self.session.table().handles_lost()
                {
                    self.nodes.drop_handle(closed.node);
                }
                ticket.answer_bytes(&[]);
            }
            op::LOOKUP => match self.lookup(&request) {
                Some(attr) => ticket.answer_bytes(&abi::entry_out(attr, VALID_SECS)),
                None => ticket.fail(not_found),
            },
            op::GETATTR => match self.attr(request.node) {
                Some(attr) => ticket.answer_bytes(&abi::attr_out(attr, VALID_SECS)),
                None => self.fail(ticket, not_found),
            },
            op::OPENDIR => ticket.answer_bytes(&abi::open_out(0, 0)),
            op::READDIR => ticket.answer_bytes(&self.read_dir(&request)),
            op::RELEASEDIR | op::DESTROY => ticket.answer_bytes(&[]),
            op::STATFS => {
                let files = self.nodes.numbers().len() as u64;
                ticket.answer_bytes(&abi::statfs_out(files));
            }
            op::INIT => self.init(ticket),
            // The kernel remembers ENOSYS and asks no more. ACCESS, FLUSH, GETXATTR and the like
            // are meant to end here; writes cannot come through a read-only mount.
            _ => ticket.fail(Errno::NOSYS.raw_os_error()),
        }
    }

    fn interrupted(&self, unique: u64) {
        // It may not wait yet: another reader can have it in hand. The watch looks later.
        let mut signalled = self.signalled.lock();
        signalled.push(unique);
        if signalled.len() == 1
            && let Some(server) = self.me.upgrade()
        {
            self.runtime.spawn(server.watch_signalled());
        }
    }

    fn ended(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::info!(session = self.session.name(), "the session has ended");
        for number in self.session.table().open_nodes() {
            self.nodes.drop_handle(number);
        }
        self.waiting.lock().clear();
        (self.on_end)(&self.session);
    }
}

/// How much of a READ lies within the blob.
fn wanted(source: &dyn BlobSource, request: &Request) -> u64 {
    let left = source.len().saturating_sub(request.offset);
    left.min(request.size.into())
}

/// Copies what a READ asks for into `buffer` if it is local. A READ is never answered short but
/// at the end of the blob: the kernel takes a short answer for the end.
fn fill(
    source: &dyn BlobSource,
    request: &Request,
    buffer: &mut Buffer,
) -> io::Result<Option<usize>> {
    let want = usize::try_from(wanted(source, request)).unwrap_or(usize::MAX);
    if want == 0 {
        return Ok(Some(0));
    }
    let Some(payload) = buffer.payload().get_mut(..want) else {
        return Err(io::Error::other(format!(
            "a READ of {want} bytes is longer than was negotiated"
        )));
    };
    match source.try_read(request.offset, payload)? {
        ReadNow::Pending => Ok(None),
        ReadNow::Ready(n) if n == want => Ok(Some(n)),
        ReadNow::Ready(n) => Err(io::Error::other(format!(
            "the source gave {n} of {want} bytes"
        ))),
    }
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::IO.raw_os_error())
}
