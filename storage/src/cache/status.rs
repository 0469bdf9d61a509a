//! A snapshot of one layer for `image status`, metrics and `why`.

use std::{sync::atomic::Ordering, time::Instant};

use serde::Serialize;

use super::{
    counters::{Event, TrafficByCause},
    layer::LayerBlob,
};
use crate::hydrate::Progress;

/// Waiting chunks listed at most.
const WAITING_LISTED: usize = 64;

/// Where a layer stands.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Image and layer.
    pub layer: String,
    /// Length of the compressed blob.
    pub blob_bytes: u64,
    /// Compressed bytes that are local (0 once the wire was dropped).
    pub wire_bytes: u64,
    /// Decoded bytes of all chunks.
    pub payload_bytes: u64,
    /// Decoded bytes that are local and verified.
    pub local_bytes: u64,
    /// `local_bytes` of `payload_bytes`, in percent; 100 for a layer without files.
    pub percent_local: f64,
    /// Bytes that both files occupy on disk.
    pub disk_bytes: u64,
    /// What was received, by cause.
    pub traffic: TrafficByCause,
    /// Bytes fetched although another fetch would have brought them later.
    pub duplicate_bytes: u64,
    /// Bytes on their way.
    pub inflight_bytes: u64,
    /// Fetches on their way.
    pub inflight_requests: usize,
    /// Chunks decoded and verified since open.
    pub decoded_chunks: u64,
    /// Bytes of those.
    pub decoded_bytes: u64,
    /// Nanoseconds spent on that, over all threads.
    pub decode_nanos: u64,
    /// Chunks whose bytes did not have their digest, refetched ones included.
    pub corrupt_chunks: u64,
    /// Fetches that failed after all retries.
    pub failed_fetches: u64,
    /// Reads answered with an error.
    pub failed_reads: u64,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
    /// The last things that went wrong, oldest first.
    pub events: Vec<Event>,
    /// Readers waiting now.
    pub waiting_readers: usize,
    /// What they wait for (bounded).
    pub waiting: Vec<WaitingChunk>,
    /// The ordered pass.
    pub hydration: Progress,
}

/// Something readers wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WaitingChunk {
    /// Index of the (first) chunk.
    pub chunk: usize,
    /// Where it lies in the decoded address space.
    pub decoded_offset: u64,
    /// First byte of the blob needed for it.
    pub remote_start: u64,
    /// End of the bytes needed for it.
    pub remote_end: u64,
    /// How many readers wait.
    pub readers: usize,
    /// For how long, in milliseconds.
    pub waiting_ms: u64,
}

impl LayerBlob {
    /// Where this layer stands now.
    pub fn status(&self) -> Status {
        let counters = &self.wire.counters;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let local_bytes = read(&self.present_payload);
        let (inflight_bytes, inflight_requests) = self.wire.in_flight();
        let waiting = self.waiting();
        Status {
            layer: self.wire.name.clone(),
            blob_bytes: self.wire.blob_len(),
            wire_bytes: self.wire.present_bytes(),
            payload_bytes: self.payload_bytes,
            local_bytes,
            percent_local: percent(local_bytes, self.payload_bytes),
            disk_bytes: self.wire.allocated() + self.store.allocated(),
            traffic: counters.traffic(),
            duplicate_bytes: read(&counters.duplicate_bytes),
            inflight_bytes,
            inflight_requests,
            decoded_chunks: read(&counters.decoded_chunks),
            decoded_bytes: read(&counters.decoded_bytes),
            decode_nanos: read(&counters.decode_nanos),
            corrupt_chunks: read(&counters.corrupt_chunks),
            failed_fetches: read(&counters.failed_fetches),
            failed_reads: read(&counters.failed_reads),
            last_error: self.last_error.lock().clone(),
            events: counters.events(),
            waiting_readers: self.readers.load(Ordering::Relaxed),
            waiting,
            hydration: self.hydration_progress(),
        }
    }

    fn waiting(&self) -> Vec<WaitingChunk> {
        let now = Instant::now();
        let tasks = self.tasks.lock();
        let listed = tasks.iter().filter_map(|(group, task)| {
            let readers = task.waiters.iter().filter(|w| !w.is_closed()).count();
            let remote = self.group_remote(*group);
            (readers > 0).then(|| WaitingChunk {
                chunk: *group,
                decoded_offset: self.map.chunks()[*group].decoded.0,
                remote_start: remote.start,
                remote_end: remote.end,
                readers,
                waiting_ms: u64::try_from(now.duration_since(task.since).as_millis())
                    .unwrap_or(u64::MAX),
            })
        });
        listed.take(WAITING_LISTED).collect()
    }
}

/// Hundredths are enough, and integers of this size survive the conversion.
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 100.0;
    }
    let hundredths = u128::from(part) * 10_000 / u128::from(whole);
    f64::from(u32::try_from(hundredths).unwrap_or(10_000)) / 100.0
}
