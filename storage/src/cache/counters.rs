//! What a blob has cost and what went wrong, for metrics, `image status` and `why`.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use parking_lot::Mutex;
use serde::Serialize;

use crate::source::Cause;

const EVENTS_KEPT: usize = 32;

/// Bytes and requests of one cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Body bytes received from the source, thrown-away ones included.
    pub bytes: u64,
    /// Requests sent, retries included.
    pub requests: u64,
}

/// Traffic by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TrafficByCause {
    /// Index and footer.
    pub metadata: Traffic,
    /// Readers waited for it, or it came along with what they waited for.
    pub demand: Traffic,
    /// Start lists.
    pub prefetch: Traffic,
    /// The pass over the whole layer.
    pub hydration: Traffic,
}

impl TrafficByCause {
    /// Everything received.
    pub fn total(&self) -> Traffic {
        let all = [self.metadata, self.demand, self.prefetch, self.hydration];
        Traffic {
            bytes: all.iter().map(|t| t.bytes).sum(),
            requests: all.iter().map(|t| t.requests).sum(),
        }
    }
}

/// Something that an operator should be able to see later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When, in milliseconds since the epoch.
    pub at_ms: u64,
    /// Names layer, chunk, offset, expected and actual digest where they apply.
    pub message: String,
}

/// Counters of one layer. All of them only grow.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    traffic: [(AtomicU64, AtomicU64); 4],
    pub(crate) duplicate_bytes: AtomicU64,
    pub(crate) decoded_bytes: AtomicU64,
    pub(crate) decoded_chunks: AtomicU64,
    pub(crate) decode_nanos: AtomicU64,
    pub(crate) corrupt_chunks: AtomicU64,
    pub(crate) failed_fetches: AtomicU64,
    pub(crate) failed_reads: AtomicU64,
    events: Mutex<VecDeque<Event>>,
}

const fn slot(cause: Cause) -> usize {
    match cause {
        Cause::Metadata => 0,
        Cause::Demand => 1,
        Cause::Prefetch => 2,
        Cause::Hydration => 3,
    }
}

impl Counters {
    pub(crate) fn add_traffic(&self, cause: Cause, bytes: u64, requests: u64) {
        let (b, r) = &self.traffic[slot(cause)];
        b.fetch_add(bytes, Ordering::Relaxed);
        r.fetch_add(requests, Ordering::Relaxed);
    }

    pub(crate) fn traffic(&self) -> TrafficByCause {
        let read = |cause| {
            let (b, r) = &self.traffic[slot(cause)];
            Traffic {
                bytes: b.load(Ordering::Relaxed),
                requests: r.load(Ordering::Relaxed),
            }
        };
        TrafficByCause {
            metadata: read(Cause::Metadata),
            demand: read(Cause::Demand),
            prefetch: read(Cause::Prefetch),
            hydration: read(Cause::Hydration),
        }
    }

    pub(crate) fn event(&self, message: String) {
        tracing::warn!("{message}");
        let at_ms = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        let mut events = self.events.lock();
        if events.len() == EVENTS_KEPT {
            events.pop_front();
        }
        events.push_back(Event { at_ms, message });
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.lock().iter().cloned().collect()
    }
}
