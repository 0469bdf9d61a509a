//! The layers whose bytes are in use.
//!
//! A mounted layer keeps its device open for as long as it is mounted, but its chunk map is only
//! in memory while somebody reads it: the handle that BlobFs gets ([`LayerNodes`]) opens the cache
//! when a read comes, and [`Blobs::close_idle`] closes caches that nobody has used for a while.

mod nodes;

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use formats::{digest::Digest, limits::Limits, stargz::StargzLayer};
use parking_lot::Mutex;
use storage::{
    cache::{CacheOptions, LayerBlob, Scheduler, TrafficByCause, Wire, WireOptions},
    hydrate::Phase,
    ranges::report,
    source::SourceError,
};
use tracing::{debug, warn};

pub use self::nodes::LayerNodes;
use super::{
    dir::LayerDir,
    index::{self, IndexError},
    origin::OriginSource,
    record::{LayerNumber, LayerRecord},
    table::LayerTable,
};
use crate::resolve::remote::Remote;

/// How long an opener waits for a cache that used the folder before.
const FOLDER_PATIENCE: Duration = Duration::from_secs(5);
const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

/// What opening a layer's cache needs.
#[derive(Clone)]
pub struct Opener {
    /// `<root>/layers`.
    pub layers: PathBuf,
    /// The tables.
    pub table: Arc<LayerTable>,
    /// The registry.
    pub remote: Arc<dyn Remote>,
    /// The node's scheduler.
    pub scheduler: Arc<Scheduler>,
    /// Bounds for parsing.
    pub limits: Limits,
    /// Set when an index was parsed: much memory was used for a moment.
    pub parsed: Arc<AtomicBool>,
}

impl Opener {
    /// The layer's directory.
    pub fn dir(&self, number: LayerNumber) -> LayerDir {
        LayerDir::new(&self.layers, number)
    }

    /// Reads and parses a layer's index. Blocks.
    pub fn load(&self, record: &LayerRecord) -> Result<StargzLayer, IndexError> {
        self.parsed.store(true, Ordering::Relaxed);
        index::load(&self.dir(record.number), record, &self.limits)
    }

    /// Opens the compressed side. A cache that used the folder before may still be ending: that is
    /// waited for, but not for ever.
    pub async fn wire(&self, record: &Arc<LayerRecord>) -> io::Result<Arc<Wire>> {
        self.wire_within(record, FOLDER_PATIENCE).await
    }

    async fn wire_within(
        &self,
        record: &Arc<LayerRecord>,
        patience: Duration,
    ) -> io::Result<Arc<Wire>> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(2);
        loop {
            let (opener, record) = (self.clone(), Arc::clone(record));
            let opened = tokio::task::spawn_blocking(move || opener.open_wire(&record))
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error)));
            match opened {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy
                        && begun.elapsed() < patience =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(100));
                }
                other => return other,
            }
        }
    }

    fn open_wire(&self, record: &LayerRecord) -> io::Result<Arc<Wire>> {
        let name = describe(record);
        let source = OriginSource::new(
            record.number,
            name.clone(),
            record.blob_len,
            Arc::clone(&self.table),
            Arc::clone(&self.remote),
        );
        let options = WireOptions {
            dir: self.dir(record.number).blob(),
            identity: Digest::of(record.identity.to_string().as_bytes()),
            name,
        };
        Wire::open(options, Arc::new(source), Arc::clone(&self.scheduler))
    }

    /// Opens the cache of a layer whose index is here.
    async fn open(&self, number: LayerNumber) -> Result<Arc<LayerBlob>, String> {
        let record = self
            .table
            .layer(number)
            .ok_or_else(|| format!("layer {number} is not known"))?;
        let wire = self.wire(&record).await.map_err(|error| report(&error))?;
        let opener = self.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let layer = opener.load(&record).map_err(|error| report(&error))?;
            LayerBlob::open(wire, Arc::new(layer.map), CacheOptions::default())
                .map_err(|error| report(&error))
        });
        opened.await.unwrap_or_else(|error| Err(error.to_string()))
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener")
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

/// Names a layer in logs and errors.
pub fn describe(record: &LayerRecord) -> String {
    let image = record
        .origins
        .first()
        .map_or("(no image)", |origin| origin.image.as_str());
    format!("{image} layer {}", record.identity.layer)
}

/// One layer's cache while it may be open.
#[derive(Debug)]
struct Slot {
    number: LayerNumber,
    blob: ArcSwapOption<LayerBlob>,
    opening: tokio::sync::Mutex<()>,
    /// Milliseconds after `born` of the last use.
    used_ms: AtomicU64,
    born: Instant,
    /// Open device files on BlobFs.
    handles: AtomicU64,
}

impl Slot {
    fn touch(&self) {
        let ms = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.used_ms.store(ms, Ordering::Relaxed);
    }

    fn idle(&self) -> Duration {
        self.born
            .elapsed()
            .saturating_sub(Duration::from_millis(self.used_ms.load(Ordering::Relaxed)))
    }
}

/// Bytes and requests by cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    causes: [(u64, u64); 4],
}

impl Totals {
    /// Adds what one cache has counted.
    pub fn add(&mut self, traffic: &TrafficByCause) {
        let all = [
            traffic.metadata,
            traffic.demand,
            traffic.prefetch,
            traffic.hydration,
        ];
        for (sum, one) in self.causes.iter_mut().zip(all) {
            sum.0 += one.bytes;
            sum.1 += one.requests;
        }
    }

    /// Cause, bytes, requests.
    pub fn by_cause(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        ["metadata", "demand", "prefetch", "hydration"]
            .into_iter()
            .zip(self.causes)
            .map(|(cause, (bytes, requests))| (cause, bytes, requests))
    }
}

/// The open layers of the node.
pub struct Blobs {
    opener: Opener,
    slots: Mutex<HashMap<LayerNumber, Arc<Slot>>>,
    /// What caches that are closed by now have counted.
    closed: Mutex<Totals>,
}

impl Blobs {
    /// Nothing is open yet.
    pub fn new(opener: Opener) -> Self {
        Self {
            opener,
            slots: Mutex::default(),
            closed: Mutex::default(),
        }
    }

    /// What all caches have counted since the start.
    pub fn totals(&self) -> Totals {
        let mut totals = *self.closed.lock();
        for (_, blob) in self.all() {
            totals.add(&blob.status().traffic);
        }
        totals
    }

    /// What opens them.
    pub fn opener(&self) -> &Opener {
        &self.opener
    }

    /// The cache of a layer; opens it where it is not open. No network.
    pub async fn get(&self, number: LayerNumber) -> Result<Arc<LayerBlob>, SourceError> {
        let slot = self.slot(number);
        slot.touch();
        if let Some(blob) = slot.blob.load_full() {
            return Ok(blob);
        }
        let _one = slot.opening.lock().await;
        if let Some(blob) = slot.blob.load_full() {
            return Ok(blob);
        }
        let opened = self.opener.open(number).await;
        let blob = opened.map_err(|message| SourceError {
            errno: EIO,
            message,
        })?;
        slot.blob.store(Some(Arc::clone(&blob)));
        Ok(blob)
    }

    /// The cache of a layer if it is open.
    pub fn open(&self, number: LayerNumber) -> Option<Arc<LayerBlob>> {
        self.slots.lock().get(&number)?.blob.load_full()
    }

    /// Takes over a cache that was opened while its layer was resolved.
    pub fn adopt(&self, number: LayerNumber, blob: Arc<LayerBlob>) {
        let slot = self.slot(number);
        slot.touch();
        slot.blob.store(Some(blob));
    }

    /// All open caches.
    pub fn all(&self) -> Vec<(LayerNumber, Arc<LayerBlob>)> {
        let slots = self.slots.lock();
        slots
            .values()
            .filter_map(|slot| Some((slot.number, slot.blob.load_full()?)))
            .collect()
    }

    /// Whether the kernel holds the layer's device on BlobFs open.
    pub fn has_handles(&self, number: LayerNumber) -> bool {
        let slots = self.slots.lock();
        slots
            .get(&number)
            .is_some_and(|slot| slot.handles.load(Ordering::Acquire) > 0)
    }

    /// Closes caches that were not used for `idle` and in which nothing goes on.
    pub async fn close_idle(&self, idle: Duration) {
        let slots: Vec<Arc<Slot>> = self.slots.lock().values().cloned().collect();
        for slot in slots {
            if slot.idle() >= idle {
                self.close_slot(&slot).await;
            }
        }
        self.slots.lock().retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot.blob.load().is_some()
                || slot.handles.load(Ordering::Acquire) > 0
        });
    }

    /// Closes the cache of a layer that is about to be deleted. False if something goes on in it.
    pub async fn close(&self, number: LayerNumber) -> bool {
        let slot = self.slots.lock().get(&number).cloned();
        let Some(slot) = slot else { return true };
        self.close_slot(&slot).await;
        let closed = slot.blob.load().is_none();
        if closed {
            self.slots.lock().remove(&number);
        }
        closed
    }

    /// Makes everything durable, for a clean stop.
    pub async fn flush(&self) {
        for (number, blob) in self.all() {
            if let Err(error) = blob.close().await {
                warn!(layer = %number, %error, "cannot close a layer's cache");
            }
        }
    }

    async fn close_slot(&self, slot: &Slot) {
        // Whoever opens waits until the old one is gone: two of them must not share a folder.
        let _one = slot.opening.lock().await;
        let Some(blob) = slot.blob.load_full() else {
            return;
        };
        let status = blob.status();
        let busy = matches!(
            status.hydration.phase,
            Phase::Fetching | Phase::Proving | Phase::Retrying
        );
        let quiet = !busy && status.inflight_requests == 0 && status.waiting_readers == 0;
        // Ours, the slot's, and nobody else's.
        if !quiet || Arc::strong_count(&blob) > 2 {
            return;
        }
        slot.blob.store(None);
        if Arc::strong_count(&blob) > 1 {
            // A read has it just now.
            slot.blob.store(Some(blob));
            return;
        }
        if let Err(error) = blob.close().await {
            warn!(layer = %slot.number, %error, "cannot close a layer's cache");
        }
        self.closed.lock().add(&blob.status().traffic);
        debug!(layer = %slot.number, "cache closed");
    }

    fn slot(&self, number: LayerNumber) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(number).or_insert_with(|| {
            Arc::new(Slot {
                number,
                blob: ArcSwapOption::empty(),
                opening: tokio::sync::Mutex::new(()),
                used_ms: AtomicU64::new(0),
                born: Instant::now(),
                handles: AtomicU64::new(0),
            })
        });
        Arc::clone(slot)
    }
}

impl std::fmt::Debug for Blobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blobs")
            .field("slots", &self.slots.lock().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
