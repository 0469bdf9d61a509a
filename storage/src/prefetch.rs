//! Start lists: the part of a layer that its publisher put in front because a start needs it.
//!
//! The range is fetched in a few large segments in order. The next segment is asked for while at
//! least a round trip's worth of the one before is still to come, so that no round trip is exposed
//! and bytes arrive (nearly) in the order in which a start wants them. Chunks are decoded as their
//! bytes arrive.

use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, atomic::Ordering},
};

use formats::{stargz::StartList, units::RemoteOffset};
use tokio::sync::watch;

use crate::{
    cache::{LayerBlob, Wire},
    ranges::FetchError,
    source::Cause,
};

/// The least that is asked for at once.
const SEGMENT: u64 = 2 << 20;
const SEGMENT_MAX: u64 = 8 << 20;
/// The next segment is asked for when this much of the one before is still to come.
const LEAD: u64 = 1 << 20;

/// How far a start list has come.
#[derive(Clone, Debug, Default)]
pub enum Prefetch {
    /// Nobody asked for it.
    #[default]
    Idle,
    /// Segments are still to be asked for.
    Issuing,
    /// All has been asked for; hydration may begin.
    Issued,
    /// All is in the wire.
    Done,
    /// A segment could not be fetched; what is missing is fetched on demand.
    Failed(FetchError),
}

impl Prefetch {
    /// Whether everything that will be asked for has been asked for.
    pub fn is_issued(&self) -> bool {
        !matches!(self, Self::Issuing)
    }

    /// Whether nothing more will come.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_))
    }
}

impl Wire {
    /// Begins to fetch the first `bytes` of the blob before anything is known about it, together
    /// with the index. Costs nothing extra where the whole layer is wanted anyway.
    pub fn fetch_head(&self, bytes: u64) {
        // A wire is always behind an Arc.
        let Some(wire) = self.me.upgrade() else {
            return;
        };
        self.scheduler.runtime.spawn(async move {
            let state = watch::Sender::new(Prefetch::Issuing);
            if let Err(error) = wire.fetch_ahead(bytes, &state).await {
                tracing::debug!(layer = wire.name, %error, "cannot fetch the head of the layer");
            }
        });
    }

    /// Fetches `[0, end)` in order; `state` turns to issued on the way.
    async fn fetch_ahead(
        self: &Arc<Self>,
        end: u64,
        state: &watch::Sender<Prefetch>,
    ) -> Result<(), FetchError> {
        let end = end.min(self.blob_len());
        let mut flying = VecDeque::new();
        let mut at = 0;
        loop {
            let moved = self.moved();
            let lead = LEAD.max(2 * self.scheduler.bandwidth_delay_bytes());
            while self.rest_of(Cause::Prefetch) <= lead
                && let Some(run) = self.next_unclaimed(at..end)
            {
                let size = (2 * lead)
                    .clamp(SEGMENT, SEGMENT_MAX)
                    .min(run.end - run.start);
                let ticket = self.scheduler.admit(Cause::Prefetch, size).await;
                let Some((run, done)) = self.claim(at..end, size, Cause::Prefetch, ticket) else {
                    break;
                };
                at = run.end;
                flying.push_back(done);
            }
            if self.next_unclaimed(at..end).is_none() {
                state.send_if_modified(|state| {
                    let issuing = matches!(state, Prefetch::Issuing);
                    if issuing {
                        *state = Prefetch::Issued;
                    }
                    issuing
                });
            }
            let Some(front) = flying.front_mut() else {
                break;
            };
            tokio::select! {
                result = front => {
                    flying.pop_front();
                    // The sender answers before it goes.
                    result.unwrap_or(Ok(()))?;
                }
                () = moved => {}
            }
        }
        // What others were already fetching when we passed by.
        self.obtain(0..end, Cause::Prefetch).await
    }
}

impl LayerBlob {
    /// Begins to fetch and decode `[0, end)` of the blob, the part before the landmark. Once per
    /// blob; later calls change nothing.
    pub fn prefetch(self: &Arc<Self>, end: RemoteOffset) {
        let begun = self.prefetch.send_if_modified(|state| {
            let idle = matches!(state, Prefetch::Idle);
            if idle {
                *state = Prefetch::Issuing;
            }
            idle
        });
        if !begun {
            return;
        }
        let end = end.0.min(self.wire.blob_len());
        self.prefetch_end.store(end, Ordering::Relaxed);
        // What is local already, fetched with the index perhaps.
        self.on_arrived(&(0..end), Cause::Prefetch);
        let blob = Arc::clone(self);
        self.wire.scheduler.runtime.spawn(async move {
            let result = blob.wire.fetch_ahead(end, &blob.prefetch).await;
            // That the disk is full has been said once for all layers.
            if let Err(error) = &result
                && !blob.wire.disk.is_full()
            {
                blob.note_error(format!(
                    "{}: the start list is incomplete: {}",
                    blob.wire.name,
                    error.report()
                ));
            }
            blob.prefetch
                .send_replace(result.map_or_else(Prefetch::Failed, |()| Prefetch::Done));
        });
    }

    /// Begins with what the layer's own start list names, if it has one.
    pub fn prefetch_list(self: &Arc<Self>, list: &StartList) {
        if let StartList::Until(end) = list {
            self.prefetch(*end);
        }
    }

    /// How far the start list has come.
    pub fn prefetch_state(&self) -> Prefetch {
        self.prefetch.borrow().clone()
    }

    /// Completes when the start list is in the wire or has failed; never if none was given.
    pub fn prefetch_done(&self) -> impl Future<Output = Prefetch> + Send + 'static {
        let mut state = self.prefetch.subscribe();
        async move {
            match state.wait_for(Prefetch::is_over).await {
                Ok(state) => state.clone(),
                // The blob is gone.
                Err(_) => Prefetch::Idle,
            }
        }
    }
}
