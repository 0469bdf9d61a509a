//! What the client has done so far, by cause.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::source::Cause;

const CAUSES: [Cause; 4] = [
    Cause::Metadata,
    Cause::Demand,
    Cause::Prefetch,
    Cause::Hydration,
];

/// Requests and bytes of one cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CauseStats {
    /// HTTP requests sent, redirects and retries included, token requests not.
    pub requests: u64,
    /// Bytes of reply bodies received.
    pub bytes: u64,
}

/// Counters of a client since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientStats {
    by_cause: [CauseStats; 4],
    /// Requests for bearer tokens.
    pub token_requests: u64,
    /// Redirects followed.
    pub redirects: u64,
    /// Requests that were sent again after a transient failure, resumed bodies included.
    pub retries: u64,
    /// TCP connections made.
    pub connections: u64,
    /// Bytes of blobs and manifests sent.
    pub pushed_bytes: u64,
}

impl ClientStats {
    /// The share of one cause.
    pub fn cause(&self, cause: Cause) -> CauseStats {
        self.by_cause[index(cause)]
    }

    /// All causes together.
    pub fn total(&self) -> CauseStats {
        let mut total = CauseStats::default();
        for stats in &self.by_cause {
            total.requests += stats.requests;
            total.bytes += stats.bytes;
        }
        total
    }
}

/// The counters behind [`ClientStats`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: [AtomicU64; 4],
    bytes: [AtomicU64; 4],
    pub(super) token_requests: AtomicU64,
    pub(super) redirects: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) pushed_bytes: AtomicU64,
}

impl Counters {
    pub(super) fn add_request(&self, cause: Cause) {
        add(&self.requests[index(cause)], 1);
    }

    pub(super) fn add_bytes(&self, cause: Cause, bytes: u64) {
        add(&self.bytes[index(cause)], bytes);
    }

    pub(super) fn snapshot(&self, connections: u64) -> ClientStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ClientStats {
            by_cause: CAUSES.map(|cause| CauseStats {
                requests: load(&self.requests[index(cause)]),
                bytes: load(&self.bytes[index(cause)]),
            }),
            token_requests: load(&self.token_requests),
            redirects: load(&self.redirects),
            retries: load(&self.retries),
            connections,
            pushed_bytes: load(&self.pushed_bytes),
        }
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn index(cause: Cause) -> usize {
    match cause {
        Cause::Metadata => 0,
        Cause::Demand => 1,
        Cause::Prefetch => 2,
        Cause::Hydration => 3,
    }
}
