//! The compressed bytes of a blob as far as they were fetched, and the fetches under way.
//!
//! Presence is kept per 4 KiB block. Every byte that arrives is written once, at its own offset,
//! whatever it was fetched for; whoever needs bytes asks for a range and gets what is missing and
//! not already on its way. Nothing here knows what the bytes mean, so a wire can be opened, and
//! the index fetched through it, before the layer's chunk map is known.

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
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, Semaphore, futures::Notified, oneshot};

use self::flight::Flight;
use super::{
    counters::Counters,
    mapfile::MapSpec,
    scheduler::{Scheduler, Ticket},
    store::Store,
};
use crate::{
    ranges::{FetchError, FetchFailure, RangeSource},
    source::Cause,
};

/// Granularity of presence.
pub(crate) const BLOCK: u64 = 4096;
/// The largest single request for readers.
const REQUEST_MAX: u64 = 4 << 20;
/// A reader waits for a fetch that will reach its range within this many bytes.
const PATIENCE: u64 = 512 << 10;
/// Share of the blob that may be fetched twice so that readers need not wait (1/100).
const DUPLICATE_SHARE: u64 = 100;

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
    pub(crate) me: Weak<Self>,
}

/// Completes when a fetch has ended.
pub(crate) type Landing = oneshot::Receiver<Result<(), FetchError>>;

#[derive(Default)]
struct Flights {
    next_id: u64,
    active: Vec<Flight>,
    waits: Vec<Wait>,
}

struct Wait {
    range: Range<u64>,
    done: oneshot::Sender<Result<(), FetchError>>,
}

impl Wire {
    /// Opens or creates the wire of a blob in `options.dir`. Local file I/O only.
    pub fn open(
        options: WireOptions,
        source: Arc<dyn RangeSource>,
        scheduler: Arc<Scheduler>,
    ) -> io::Result<Arc<Self>> {
        let len = source.len();
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

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
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
        if self.is_closed() {
            return Ok(());
        }
        self.store.flush(force)
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

    /// Whether every byte of the range is present or on its way.
    pub(crate) fn covered(&self, range: Range<u64>) -> bool {
        self.unclaimed(&self.flights.lock(), &range, None)
            .is_empty()
    }

    /// Starts fetching what is missing of `range` for readers who wait for `needed`; returns at
    /// once. Missing runs that touch none of `needed` are left alone: they are there for
    /// convenience only.
    pub(crate) fn request(&self, range: Range<u64>, cause: Cause, needed: &[Range<u64>]) {
        self.start(&range, cause, needed, Some(PATIENCE));
    }

    /// Starts fetching what is missing of `range` and not on its way, for a reader to come.
    pub(crate) fn request_ahead(&self, range: &Range<u64>) {
        self.start(range, Cause::Demand, std::slice::from_ref(range), None);
    }

    fn start(
        &self,
        range: &Range<u64>,
        cause: Cause,
        needed: &[Range<u64>],
        patience: Option<u64>,
    ) {
        let mut begun = Vec::new();
        if !self.is_closed() {
            let mut flights = self.flights.lock();
            for run in self.unclaimed(&flights, range, patience) {
                if !needed
                    .iter()
                    .any(|n| n.start < run.end && run.start < n.end)
                {
                    continue;
                }
                let mut at = run.start;
                while at < run.end {
                    let part = at..run.end.min(at + REQUEST_MAX);
                    at = part.end;
                    begun.push(flights.begin(part, cause));
                }
            }
        }
        for flight in begun {
            self.launch(flight, None);
        }
    }

    /// Starts the fetch of the first missing run of `range`, at most `max` bytes of it. Returns
    /// the run and a receiver for its end.
    pub(crate) fn claim(
        &self,
        range: Range<u64>,
        max: u64,
        cause: Cause,
        ticket: Ticket,
    ) -> Option<(Range<u64>, Landing)> {
        let flight = {
            let mut flights = self.flights.lock();
            let run = self.first_unclaimed(&flights, &range)?;
            let end = run.end.min(align_down(run.start + max.max(BLOCK), BLOCK));
            flights.begin(run.start..end, cause)
        };
        let run = flight.range();
        ticket.resize(run.end - run.start);
        Some((run, self.launch(flight, Some(ticket))))
    }

    /// The first run of `range` that is neither present nor on its way.
    pub(crate) fn next_unclaimed(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.first_unclaimed(&self.flights.lock(), &range)
    }

    /// Waits until `range` is present, having asked for it under `cause`. An attempt that failed
    /// for another cause's fetch is repeated once.
    pub(crate) async fn obtain(&self, range: Range<u64>, cause: Cause) -> Result<(), FetchError> {
        let mut again = true;
        loop {
            self.request(range.clone(), cause, std::slice::from_ref(&range));
            match self.wait(range.clone()).await {
                Err(_) if again => again = false,
                result => return result,
            }
        }
    }

    /// Waits until `range` is present; fails when a fetch failed and nothing else will bring it.
    pub(crate) async fn wait(&self, range: Range<u64>) -> Result<(), FetchError> {
        let whole = range.clone();
        let done = {
            let mut flights = self.flights.lock();
            if self.has(range.clone()) {
                return Ok(());
            }
            if self.is_closed() || !self.unclaimed(&flights, &range, None).is_empty() {
                return Err(self.nothing_under_way(range));
            }
            let (tx, rx) = oneshot::channel();
            flights.waits.retain(|wait| !wait.done.is_closed());
            flights.waits.push(Wait { range, done: tx });
            rx
        };
        match done.await {
            Ok(result) => result,
            // The wire was closed.
            Err(_) => Err(self.nothing_under_way(whole)),
        }
    }

    fn nothing_under_way(&self, range: Range<u64>) -> FetchError {
        FetchError::Source {
            origin: self.origin(),
            range,
            failure: FetchFailure::Unreachable,
            source: Arc::new(io::Error::other("the fetch ended before these bytes")),
        }
    }

    /// Writes bytes that arrived and marks the blocks that are now complete. `whole_from` is where
    /// the uninterrupted run that ends with these bytes began. Blocks.
    fn accept(&self, whole_from: u64, at: u64, parts: &[bytes::Bytes]) -> io::Result<Range<u64>> {
        if self.is_closed() {
            return Ok(at..at);
        }
        let mut offset = at;
        for part in parts {
            self.store.write(part, offset)?;
            offset += part.len() as u64;
        }
        let first = whole_from.div_ceil(BLOCK).max(at / BLOCK);
        let last = if offset == self.len {
            self.len.div_ceil(BLOCK)
        } else {
            offset / BLOCK
        };
        let blocks = first..last.max(first);
        self.store.bits.set_range(blocks.clone());
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
                wire.counters.event(format!(
                    "{}: cannot make fetched bytes durable: {error}",
                    wire.name
                ));
            }
        });
    }

    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK..range.end.min(self.len).div_ceil(BLOCK)
    }

    fn missing<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
        self.store
            .bits
            .clear_runs(self.blocks(range))
            .map(|run| run.start * BLOCK..(run.end * BLOCK).min(self.len))
    }

    fn first_unclaimed(&self, flights: &Flights, range: &Range<u64>) -> Option<Range<u64>> {
        if self.is_closed() {
            return None;
        }
        self.missing(range).find_map(|run| {
            subtract(run, &flights.active, |_, _| false)
                .into_iter()
                .next()
        })
    }

    /// What of `range` is missing and not on its way. With `patience`, a fetch that is still that
    /// far before a run does not count, as long as the budget for fetching twice lasts.
    fn unclaimed(
        &self,
        flights: &Flights,
        range: &Range<u64>,
        patience: Option<u64>,
    ) -> Vec<Range<u64>> {
        let whole_only = self.ignores_ranges.load(Ordering::Acquire);
        self.missing(range)
            .flat_map(|run| {
                subtract(run, &flights.active, |distance, overlap| {
                    patience.is_some_and(|patience| distance > patience)
                        && !whole_only
                        && self.spend_duplicate(overlap)
                })
            })
            .collect()
    }

    fn spend_duplicate(&self, bytes: u64) -> bool {
        let spent = self
            .duplicate_left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                left.checked_sub(bytes)
            });
        if spent.is_ok() {
            self.counters
                .duplicate_bytes
                .fetch_add(bytes, Ordering::Relaxed);
        }
        spent.is_ok()
    }
}

/// Takes from `run` what the flights will bring, except where `impatient(distance, overlap)`.
fn subtract(
    run: Range<u64>,
    flights: &[Flight],
    mut impatient: impl FnMut(u64, u64) -> bool,
) -> Vec<Range<u64>> {
    let mut left = vec![run];
    for flight in flights {
        let coming = flight.coming();
        let mut next = Vec::with_capacity(left.len() + 1);
        for part in left {
            let overlap = part.start.max(coming.start)..part.end.min(coming.end);
            if overlap.is_empty()
                || impatient(overlap.start - coming.start, overlap.end - overlap.start)
            {
                next.push(part);
                continue;
            }
            if part.start < overlap.start {
                next.push(part.start..overlap.start);
            }
            if overlap.end < part.end {
                next.push(overlap.end..part.end);
            }
        }
        left = next;
    }
    left
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
