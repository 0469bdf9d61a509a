//! The compressed bytes of a blob as far as they were fetched, and the fetches under way.
//!
//! Presence is kept per 4 KiB block. Every byte that arrives is written once, at its own offset,
//! whatever it was fetched for; whoever needs bytes asks for a range and gets what is missing and
//! not already on its way. Nothing here knows what the bytes mean, so a wire can be opened, and
//! the index fetched through it, before the layer's chunk map is known.

mod claims;
mod direct;
mod flight;

use std::{
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use formats::digest::Digest;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tokio::sync::{Notify, Semaphore, futures::Notified, oneshot};

use self::{claims::DUPLICATE_SHARE, flight::Flight};
use super::{
    counters::Counters,
    disk::Disk,
    mapfile::MapSpec,
    scheduler::{FolderClaim, Scheduler},
    store::Store,
};
use crate::{
    ranges::{FetchError, RangeSource},
    source::Cause,
};

/// Granularity of presence.
pub(crate) const BLOCK: u64 = 4096;
/// Where and for what a [`Wire`] is opened.
#[derive(Clone, Debug)]
pub struct WireOptions {
    /// Folder of this layer identity; exists. Nothing else may be in it but what the cache writes.
    pub dir: PathBuf,
    /// Digest of the layer's identity: a folder that holds another one's bytes is emptied.
    pub identity: Digest,
    /// Names the layer in errors and events (image and layer digest).
    pub name: String,
}

/// Told by a wire what happens to its bytes. Called without locks held, from any thread.
pub(crate) trait Listener: Send + Sync {
    /// `range` has become present.
    fn arrived(&self, range: Range<u64>, cause: Cause);
    /// A fetch ended. What of its range is neither present nor in flight now will not come.
    fn ended(&self, fetch: Ended, result: Result<(), FetchError>);
}

/// A fetch that is over.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) range: Range<u64>,
    pub(crate) cause: Cause,
    pub(crate) begun: Instant,
}

/// Compressed bytes of one blob.
pub struct Wire {
    pub(crate) name: String,
    pub(crate) identity: Digest,
    pub(crate) dir: PathBuf,
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) counters: Arc<Counters>,
    /// The file system that the folder is on.
    pub(crate) disk: Arc<Disk>,
    len: u64,
    source: RwLock<Arc<dyn RangeSource>>,
    store: Store,
    flights: Mutex<Flights>,
    listener: OnceLock<Weak<dyn Listener>>,
    reader_slots: Semaphore,
    /// The source answers range requests with the whole blob.
    ignores_ranges: AtomicBool,
    flush_pending: AtomicBool,
    duplicate_left: AtomicU64,
    /// Told whenever bytes arrived or a fetch ended.
    moved: Notify,
    /// Nothing more is fetched, written or recorded.
    closed: AtomicBool,
    closing: Notify,
    folder: Mutex<Option<FolderClaim>>,
    /// Held (shared) by whoever writes maps and records, so that closing can wait for them.
    usage: RwLock<()>,
    pub(crate) me: Weak<Self>,
}

/// Completes when a fetch has ended.
pub(crate) type Landing = oneshot::Receiver<Result<(), FetchError>>;

#[derive(Default)]
struct Flights {
    next_id: u64,
    active: Vec<Flight>,
    /// The fetch that is answered with the whole blob and read to its end.
    whole: Option<u64>,
    waits: Vec<Wait>,
}

struct Wait {
    range: Range<u64>,
    done: oneshot::Sender<Result<(), FetchError>>,
}

impl Wire {
    /// Opens or creates the wire of a blob in `options.dir`. Local file I/O only. Fails with
    /// [`io::ErrorKind::ResourceBusy`] while an earlier wire in this folder is neither closed nor
    /// gone, tasks it began included.
    pub fn open(
        options: WireOptions,
        source: Arc<dyn RangeSource>,
        scheduler: Arc<Scheduler>,
    ) -> io::Result<Arc<Self>> {
        let len = source.len();
        let folder = scheduler.claim_folder(&options.dir)?;
        let disk = scheduler.disk(&options.dir)?;
        let store = Store::open(
            options.dir.join("wire"),
            MapSpec {
                kind: 1,
                unit: 4096,
                bits: len.div_ceil(BLOCK),
                subject_len: len,
                identity: options.identity,
                table: [0; 32],
            },
        )?;
        Ok(Arc::new_cyclic(|me| Self {
            name: options.name,
            identity: options.identity,
            dir: options.dir,
            reader_slots: Semaphore::new(scheduler.options.requests_per_layer.max(1)),
            scheduler,
            counters: Arc::default(),
            disk,
            len,
            source: RwLock::new(source),
            store,
            flights: Mutex::default(),
            listener: OnceLock::new(),
            ignores_ranges: AtomicBool::new(false),
            flush_pending: AtomicBool::new(false),
            duplicate_left: AtomicU64::new(len / DUPLICATE_SHARE),
            moved: Notify::new(),
            closed: AtomicBool::new(false),
            closing: Notify::new(),
            folder: Mutex::new(Some(folder)),
            usage: RwLock::default(),
            me: me.clone(),
        }))
    }

    /// Length of the blob.
    pub fn blob_len(&self) -> u64 {
        self.len
    }

    /// The layer's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fetches from `source` from now on (a mirror, fresh credentials). It must deliver the same
    /// blob: its length is checked, its bytes are verified as ever.
    pub fn replace_source(&self, source: Arc<dyn RangeSource>) -> bool {
        let same = source.len() == self.len;
        if same {
            *self.source.write() = source;
        }
        same
    }

    /// Bytes of the blob that are local.
    pub fn present_bytes(&self) -> u64 {
        (self.store.bits.count() * BLOCK).min(self.len)
    }

    /// Stops all fetches. What was marked until now has been flushed or is lost; nothing in the
    /// folder is touched any more.
    pub(crate) fn shut(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.closing.notify_waiters();
        drop(std::mem::take(&mut self.flights.lock().waits));
        self.moved.notify_waiters();
    }

    /// The right to change maps and records in the folder; none after [`Self::shut`].
    pub(crate) fn usage(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let guard = self.usage.read();
        (!self.is_closed()).then_some(guard)
    }

    /// Leaves the folder to others, after [`Self::shut`]. Waits for those who change something in
    /// it just now.
    pub(crate) fn leave_folder(&self) {
        drop(self.usage.write());
        drop(self.folder.lock().take());
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Completes when the wire is shut.
    pub(crate) async fn until_closed(&self) {
        let closing = self.closing.notified();
        if !self.is_closed() {
            closing.await;
        }
    }

    pub(crate) fn origin(&self) -> String {
        self.source.read().origin()
    }

    pub(crate) fn listen(&self, listener: Weak<dyn Listener>) -> bool {
        self.listener.set(listener).is_ok()
    }

    pub(crate) fn has(&self, range: Range<u64>) -> bool {
        self.store.bits.all(self.blocks(&range))
    }

    /// Reads bytes that are present.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.store.read(buf, offset)
    }

    /// Forgets blocks whose content turned out to be wrong, so that they are fetched again.
    pub(crate) fn forget(&self, range: Range<u64>) {
        self.store.bits.clear_range(self.blocks(&range));
    }

    /// Forgets everything and frees the disk space.
    pub(crate) fn retire(&self) -> io::Result<()> {
        self.store.retire()
    }

    pub(crate) fn flush(&self, force: bool) -> io::Result<()> {
        match self.usage() {
            Some(_guard) => self.store.flush(force, || {}),
            None => Ok(()),
        }
    }

    pub(crate) fn allocated(&self) -> u64 {
        self.store.allocated()
    }

    /// (bytes under way, fetches under way)
    pub(crate) fn in_flight(&self) -> (u64, usize) {
        let flights = self.flights.lock();
        let bytes = flights.active.iter().map(Flight::rest).sum();
        (bytes, flights.active.len())
    }

    /// Bytes under way for one cause.
    pub(crate) fn rest_of(&self, cause: Cause) -> u64 {
        let flights = self.flights.lock();
        let of_cause = flights.active.iter().filter(|f| f.cause() == cause);
        of_cause.map(Flight::rest).sum()
    }

    /// Completes when bytes arrive or a fetch ends after this call.
    pub(crate) fn moved(&self) -> Notified<'_> {
        self.moved.notified()
    }

    /// Writes bytes that arrived and marks the blocks that are now complete. `whole_from` is where
    /// the uninterrupted run that ends with these bytes began. Blocks.
    fn accept(&self, whole_from: u64, at: u64, parts: &[bytes::Bytes]) -> io::Result<Range<u64>> {
        if self.is_closed() {
            return Ok(at..at);
        }
        let written = self
            .store
            .write(parts.iter().map(|part| &**part), at)
            .inspect_err(|error| self.refused(error))?;
        let offset = at + parts.iter().map(|part| part.len() as u64).sum::<u64>();
        let first = whole_from.div_ceil(BLOCK).max(at / BLOCK);
        let last = if offset == self.len {
            self.len.div_ceil(BLOCK)
        } else {
            offset / BLOCK
        };
        let blocks = first..last.max(first);
        {
            let _guard = self.store.marking(written)?;
            self.store.bits.set_range(blocks.clone());
        }
        if self.store.touch() {
            self.schedule_flush();
        }
        Ok(blocks.start * BLOCK..(blocks.end * BLOCK).min(self.len))
    }

    fn schedule_flush(&self) {
        if self.flush_pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let me = self.me.clone();
        self.scheduler.runtime.spawn(async move {
            tokio::time::sleep(super::FLUSH_EVERY).await;
            let Some(wire) = me.upgrade() else { return };
            wire.flush_pending.store(false, Ordering::Release);
            let flushed = tokio::task::spawn_blocking(move || (wire.flush(false), wire)).await;
            if let Ok((Err(error), wire)) = flushed {
                wire.refused(&error);
                wire.schedule_flush();
            }
        });
    }

    /// The disk did not take what was to be written in this folder.
    pub(crate) fn refused(&self, error: &io::Error) {
        self.disk.refused(&self.dir, error);
    }

    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK..range.end.min(self.len).div_ceil(BLOCK)
    }
}

pub(crate) const fn align_down(n: u64, unit: u64) -> u64 {
    n - n % unit
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire")
            .field("name", &self.name)
            .field("len", &self.len)
            .field("present_bytes", &self.present_bytes())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
