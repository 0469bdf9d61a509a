//! [`LayerBlob`]: the decoded bytes of one layer.

mod checks;

use std::{
    fmt, io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use formats::{
    blobmap::{BlobMap, Chunk},
    units::ChunkIdx,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use self::checks::{check_map, table_digest, verify_present};
use super::{
    bits::{Bits, index},
    chunks::Tasks,
    codec::Codec,
    files,
    mapfile::MapSpec,
    plan::{PlanOptions, plan},
    readahead::Readahead,
    store::Store,
    touched::Touched,
    wire::{Ended, Listener, Wire},
};
use crate::{
    hydrate::Slot,
    prefetch::Prefetch,
    ranges::FetchError,
    source::{BlobSource, BoxFuture, Cause, ReadNow, SourceError},
};

pub(crate) const PAGE: u64 = 4096;
/// How far into a member chunks may lie: bounds memory and time for one read.
const MEMBER_MAX: u64 = 256 << 20;
/// Places where readers were lately, for hydration to continue at.
const HINTS: usize = 16;

/// Whether chunks found on disk are checked by digest at open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// The order of writes is trusted.
    #[default]
    Never,
    /// Checked if the last stop was not clean.
    AfterUncleanStop,
    /// Checked always.
    Always,
}

/// How a [`LayerBlob`] behaves.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// How members are compressed.
    pub codec: Codec,
    /// How readers' requests are shaped.
    pub plan: PlanOptions,
    /// Fetch ahead of readers that go through the blob in order.
    pub readahead: bool,
    /// Which chunks on disk to check at open.
    pub verify: Verify,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            codec: Codec::Gzip,
            plan: PlanOptions::default(),
            readahead: true,
            verify: Verify::Never,
        }
    }
}

/// Why a layer's cache cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The chunk map is not in remote order or points beyond the blob.
    #[error(
        "chunk {chunk} lies at bytes {}..{} of the blob: not in order, or beyond its {blob_len} bytes",
        range.start, range.end
    )]
    BadMap {
        /// Index of the chunk.
        chunk: usize,
        /// Its remote range.
        range: Range<u64>,
        /// Length of the blob.
        blob_len: u64,
    },
    /// To decode a chunk, more would have to be decoded than is reasonable.
    #[error("chunk {chunk} ends {needed} decoded bytes into its member, more than {limit}")]
    TooDeep {
        /// Index of the chunk.
        chunk: usize,
        /// Decoded bytes from the start of the member to the chunk's end.
        needed: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Another [`LayerBlob`] uses the same wire.
    #[error("the layer's wire is in use by another blob")]
    InUse,
    /// Local I/O failed.
    #[error("cannot open the layer's cache in {}", path.display())]
    Io {
        /// The layer's folder.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

/// The decoded bytes of one layer, filled from its [`Wire`] as readers, start lists and hydration
/// want them.
pub struct LayerBlob {
    pub(crate) wire: Arc<Wire>,
    pub(crate) map: Arc<BlobMap>,
    pub(crate) options: CacheOptions,
    pub(crate) store: Store,
    /// Decoded 4 KiB pages all of whose chunks are present (gaps are).
    pages: Bits,
    pub(crate) tasks: Mutex<Tasks>,
    pub(crate) touched: Touched,
    readahead: Readahead,
    hints: Mutex<std::collections::VecDeque<u64>>,
    pub(crate) payload_bytes: u64,
    pub(crate) present_payload: AtomicU64,
    pub(crate) last_error: Mutex<Option<String>>,
    pub(crate) prefetch: watch::Sender<Prefetch>,
    /// Where the start list ends.
    pub(crate) prefetch_end: AtomicU64,
    pub(crate) hydration: Slot,
    flush_pending: AtomicBool,
    /// Its number in the node's memory for chunks that could not be stored.
    pub(crate) in_memory: u64,
    /// Chunks put there so far: while none was, nobody looks.
    pub(crate) held: AtomicUsize,
    pub(crate) storing_held: AtomicBool,
    pub(crate) readers: AtomicUsize,
    pub(crate) me: Weak<Self>,
}

impl LayerBlob {
    /// Opens or creates the decoded side of a layer whose wire is open. No network.
    pub fn open(
        wire: Arc<Wire>,
        map: Arc<BlobMap>,
        options: CacheOptions,
    ) -> Result<Arc<Self>, OpenError> {
        check_map(&map, wire.blob_len())?;
        let fail = |source| OpenError::Io {
            path: wire.dir().to_owned(),
            source,
        };
        let chunks = map.chunks().len() as u64;
        let store = Store::open(
            wire.dir().join("data"),
            MapSpec {
                kind: 2,
                unit: 0,
                bits: chunks,
                subject_len: map.decoded_len(),
                identity: wire.identity,
                table: table_digest(&map),
            },
        )
        .map_err(fail)?;
        let clean = matches!(files::remove(&wire.dir().join("clean")), Ok(true));
        if options.verify == Verify::Always || options.verify == Verify::AfterUncleanStop && !clean
        {
            verify_present(&store, &map, &wire).map_err(fail)?;
        }
        let hydration = Slot::load(wire.dir(), wire.identity).map_err(fail)?;
        let pages = Bits::new(map.decoded_len().div_ceil(PAGE));
        pages.set_range(0..pages.len());
        let (mut payload, mut present) = (0, 0);
        for (number, chunk) in map.chunks().iter().enumerate() {
            payload += u64::from(chunk.len);
            if store.bits.get(number as u64) {
                present += u64::from(chunk.len);
            } else {
                pages.clear_range(pages_of(&chunk.decoded_range()));
            }
        }
        let in_memory = wire.scheduler.memory.layer();
        let blob = Arc::new_cyclic(|me: &Weak<Self>| Self {
            wire,
            options,
            store,
            pages,
            tasks: Mutex::default(),
            touched: Touched::new(&map),
            readahead: Readahead::default(),
            hints: Mutex::default(),
            payload_bytes: payload,
            present_payload: AtomicU64::new(present),
            last_error: Mutex::default(),
            prefetch: watch::Sender::default(),
            prefetch_end: AtomicU64::new(0),
            hydration,
            flush_pending: AtomicBool::new(false),
            in_memory,
            held: AtomicUsize::new(0),
            storing_held: AtomicBool::new(false),
            readers: AtomicUsize::new(0),
            map,
            me: me.clone(),
        });
        let listener: Weak<dyn Listener> = blob.me.clone() as Weak<dyn Listener>;
        if !blob.wire.listen(listener) {
            return Err(OpenError::InUse);
        }
        Ok(blob)
    }

    /// The compressed side.
    pub fn wire(&self) -> &Arc<Wire> {
        &self.wire
    }

    /// The chunk map.
    pub fn map(&self) -> &Arc<BlobMap> {
        &self.map
    }

    /// The file that holds the decoded bytes: the EROFS device once the layer is complete.
    pub fn data_path(&self) -> PathBuf {
        self.store.path().clone()
    }

    /// Creates the data file (sparse, full length) if it is not there yet.
    pub fn create_data(&self) -> io::Result<()> {
        self.store.file().map(drop)
    }

    /// Whether every chunk is local and verified.
    pub fn is_full(&self) -> bool {
        self.store.bits.all(0..self.store.bits.len())
    }

    /// Chunks in the order in which readers first touched them (bounded).
    pub fn touched(&self) -> Vec<ChunkIdx> {
        self.touched.list().into_iter().map(ChunkIdx).collect()
    }

    /// Stops fetching, makes everything durable and leaves the marker of a clean stop. What is
    /// local can still be read; whoever waits for more is not answered any more (with the daemon
    /// going, its successor answers). Afterwards the folder belongs to the next opener.
    pub async fn close(self: &Arc<Self>) -> io::Result<()> {
        let blob = Arc::clone(self);
        let closed = tokio::task::spawn_blocking(move || {
            let flushed = blob.wire.flush(true).and_then(|()| blob.flush(true));
            blob.wire.shut();
            let marked =
                flushed.and_then(|()| files::create(&blob.wire.dir().join("clean")).map(drop));
            blob.wire.leave_folder();
            marked
        });
        closed
            .await
            .unwrap_or_else(|join| Err(io::Error::other(join)))
    }

    /// Chunks of a decoded range that are not present.
    pub(crate) fn absent(&self, range: Range<u64>) -> impl Iterator<Item = usize> + '_ {
        self.map
            .overlapping(range)
            .filter(|number| !self.store.bits.get(*number as u64))
    }

    /// Writes a chunk's verified bytes to `data` and marks it.
    pub(crate) fn keep(&self, number: usize, chunk: &Chunk, bytes: &[u8]) -> io::Result<()> {
        let written = self
            .store
            .write([bytes], chunk.decoded.0)
            .inspect_err(|error| self.wire.refused(error))?;
        let guard = self.store.marking(written)?;
        self.mark_present(number, chunk);
        drop(guard);
        Ok(())
    }

    fn mark_present(&self, number: usize, chunk: &Chunk) {
        if self.wire.is_closed() || self.store.bits.set(number as u64) {
            return;
        }
        self.present_payload
            .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
        let range = chunk.decoded_range();
        let inner = range.start.div_ceil(PAGE)..range.end / PAGE;
        self.pages.set_range(inner);
        for page in [range.start / PAGE, (range.end - 1) / PAGE] {
            let mut there = self.map.overlapping(page * PAGE..(page + 1) * PAGE);
            if there.all(|number| self.store.bits.get(number as u64)) {
                self.pages.set(page);
            }
        }
        if self.store.touch() {
            self.schedule_flush();
        }
    }

    fn flush(&self, force: bool) -> io::Result<()> {
        match self.wire.usage() {
            Some(_guard) => self.flush_held(force),
            None => Ok(()),
        }
    }

    /// As [`Self::flush`], by one who has the right to use the folder.
    pub(crate) fn flush_held(&self, force: bool) -> io::Result<()> {
        let lost = || {
            let mut present = 0;
            for (number, chunk) in self.map.chunks().iter().enumerate() {
                if self.store.bits.get(number as u64) {
                    present += u64::from(chunk.len);
                } else {
                    self.pages.clear_range(pages_of(&chunk.decoded_range()));
                }
            }
            self.present_payload.store(present, Ordering::Relaxed);
        };
        self.store
            .flush(force, lost)
            .inspect_err(|error| self.wire.refused(error))
    }

    fn schedule_flush(&self) {
        if self.flush_pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let me = self.me.clone();
        self.wire.scheduler.runtime.spawn(async move {
            tokio::time::sleep(super::FLUSH_EVERY).await;
            let Some(blob) = me.upgrade() else { return };
            blob.flush_pending.store(false, Ordering::Release);
            let flushed = tokio::task::spawn_blocking(move || (blob.flush(false), blob)).await;
            if let Ok((Err(_), blob)) = flushed {
                blob.schedule_flush();
            }
        });
    }

    pub(crate) fn note_error(&self, message: String) {
        *self.last_error.lock() = Some(message.clone());
        self.wire.counters.event(message);
    }

    /// Where readers were lately: remote offsets behind what was fetched for them, newest first.
    pub(crate) fn take_hint(&self) -> Option<u64> {
        self.hints.lock().pop_back()
    }

    pub(crate) fn give_hint(&self, at: u64) {
        let mut hints = self.hints.lock();
        hints.retain(|hint| *hint != at);
        if hints.len() == HINTS {
            hints.pop_front();
        }
        hints.push_back(at);
    }

    /// Asks the wire for what readers need, widened to windows.
    pub(crate) fn fetch(&self, needed: &[Range<u64>], cause: Cause) {
        let options = &self.options.plan;
        let window = options.window(self.wire.scheduler.bandwidth_delay_bytes());
        for range in plan(needed, self.wire.blob_len(), options, window) {
            let end = range.end;
            self.wire.request(range, cause, needed);
            if cause == Cause::Demand {
                self.give_hint(end);
            }
        }
    }

    /// Looks whether a reader goes through the blob in order, and fetches ahead if so.
    fn look_ahead(&self, stream: Option<usize>, range: &Range<u64>) {
        if self.wire.disk.is_full() {
            return;
        }
        let chunks = self.map.overlapping(range.clone());
        let Some(last) = chunks
            .last()
            .and_then(|number| self.map.chunks().get(number))
        else {
            return;
        };
        // A start that follows its own list goes in order as well, and stops where the list does.
        if last.remote_end.0 <= self.prefetch_end.load(Ordering::Relaxed) {
            return;
        }
        let least = 2 * self.wire.scheduler.bandwidth_delay_bytes();
        let Some(ahead) =
            self.readahead
                .note(stream, range.start, range.end, last.remote_end.0, least)
        else {
            return;
        };
        let (from, to) = (ahead.from, ahead.to.min(self.wire.blob_len()));
        if from < to {
            self.wire.request_ahead(&(from..to));
            self.decode_present(from..to);
        }
        let middle = last.remote_end.0 + (ahead.to - last.remote_end.0) / 2;
        let decoded_at = |remote: u64| {
            let at = self.map.chunks().partition_point(|c| c.remote.0 < remote);
            self.map.chunks().get(at).map_or(u64::MAX, |c| c.decoded.0)
        };
        self.readahead
            .mark(ahead.stream, decoded_at(middle), decoded_at(ahead.to));
    }

    /// Decoded bytes of a file that is being read; nothing is copied if any of it is absent.
    fn read_local(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow> {
        let end = self
            .map
            .decoded_len()
            .min(offset.saturating_add(buf.len() as u64));
        if offset >= end {
            return Ok(ReadNow::Ready(0));
        }
        let range = offset..end;
        let buf = &mut buf[..index(end - offset)];
        if self.pages.all(pages_of(&range)) {
            self.store.read(buf, offset)?;
        } else if self.held.load(Ordering::Acquire) == 0 || !self.read_held(offset, buf)? {
            return Ok(ReadNow::Pending);
        }
        self.touched.note(&self.map, &range);
        if self.options.readahead
            && let Some(stream) = self.readahead.passed(range.start, range.end)
        {
            self.look_ahead(Some(stream), &range);
        }
        Ok(ReadNow::Ready(index(end - offset)))
    }
}

impl BlobSource for LayerBlob {
    fn len(&self) -> u64 {
        self.map.decoded_len()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow> {
        self.read_local(offset, buf)
    }

    fn ensure(
        self: Arc<Self>,
        offset: u64,
        len: u64,
        cause: Cause,
    ) -> BoxFuture<'static, Result<(), SourceError>> {
        let range = offset..offset.saturating_add(len).min(self.map.decoded_len());
        if range.is_empty() {
            return Box::pin(async { Ok(()) });
        }
        // Reads are answered page by page, and a page may hold the end of one chunk and the
        // beginning of the next.
        let pages = pages_of(&range);
        let reader = Reader::enter(&self);
        let waits = self.want(pages.start * PAGE..pages.end * PAGE, cause);
        if cause == Cause::Demand && self.options.readahead {
            self.look_ahead(None, &range);
        }
        Box::pin(async move {
            let reader = reader;
            for wait in waits {
                // The table answers every waiter before it forgets it.
                wait.await.unwrap_or_else(|_| {
                    Err(SourceError {
                        errno: rustix::io::Errno::IO.raw_os_error(),
                        message: format!("{}: the cache was closed", reader.0.wire.name),
                    })
                })?;
            }
            Ok(())
        })
    }
}

/// A reader that waits, counted until it goes.
struct Reader(Arc<LayerBlob>);

impl Reader {
    fn enter(blob: &Arc<LayerBlob>) -> Self {
        blob.readers.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(blob))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Listener for LayerBlob {
    fn arrived(&self, range: Range<u64>, cause: Cause) {
        self.on_arrived(&range, cause);
    }

    fn ended(&self, fetch: Ended, result: Result<(), FetchError>) {
        self.on_ended(&fetch, result);
    }
}

impl Drop for LayerBlob {
    fn drop(&mut self) {
        self.wire.shut();
        self.wire.scheduler.memory.drop_layer(self.in_memory);
    }
}

impl fmt::Debug for LayerBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerBlob")
            .field("wire", &self.wire)
            .field("decoded_len", &self.map.decoded_len())
            .field("present_payload", &self.present_payload)
            .finish_non_exhaustive()
    }
}

pub(crate) fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}
