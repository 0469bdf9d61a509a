//! Fetching what is missing of a layer, near the readers first.

use std::{
    ops::Range,
    sync::{Arc, Weak},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::watch;

use super::Mode;
use crate::{cache::LayerBlob, ranges::FetchError, source::Cause};

/// How far behind a reader's last place to go on before looking for a newer one.
const NEAR: u64 = 4 << 20;
/// Requests in flight per layer.
const REQUESTS: usize = 8;

/// Fetches until every byte of the blob is local. Fails when a fetch failed. `None` if the blob
/// was dropped meanwhile.
///
/// Every fetch fails that is begun while the disk takes nothing; the caller waits then.
pub(super) async fn pump(
    blob: &Weak<LayerBlob>,
    mode: &mut watch::Receiver<Mode>,
) -> Option<Result<(), FetchError>> {
    let mut flying = FuturesUnordered::new();
    loop {
        let strong = blob.upgrade()?;
        let wire = Arc::clone(strong.wire());
        // Whatever moves after this is noticed below.
        let moved = wire.moved();
        if wire.is_closed() {
            return None;
        }
        let all = 0..wire.blob_len();
        let off = *mode.borrow() == Mode::Off;
        if !off
            && flying.len() < REQUESTS
            && let Some(place) = next_place(&strong)
        {
            let scheduler = Arc::clone(&strong.wire.scheduler);
            let size = scheduler
                .hydration_request()
                .min(place.end - place.start)
                .max(4096);
            let idle_only = *mode.borrow() == Mode::Idle;
            drop(strong);
            let ticket = tokio::select! {
                ticket = scheduler.admit_hydration(size, idle_only) => ticket,
                Some(result) = flying.next(), if !flying.is_empty() => {
                    if let Some(failed) = failure(result) {
                        return Some(Err(failed));
                    }
                    continue;
                }
                changed = mode.changed() => {
                    changed.ok()?;
                    continue;
                }
            };
            let strong = blob.upgrade()?;
            // Somebody else may have asked for it meanwhile: then look for another place.
            if let Some((_, done)) = strong.wire.claim(place, size, Cause::Hydration, ticket) {
                flying.push(done);
            }
            continue;
        }
        if wire.has(all) {
            return Some(Ok(()));
        }
        drop(strong);
        tokio::select! {
            Some(result) = flying.next(), if !flying.is_empty() => {
                if let Some(failed) = failure(result) {
                    return Some(Err(failed));
                }
            }
            changed = mode.changed() => changed.ok()?,
            // Others' fetches bring the rest; should one fail, what it leaves is ours to fetch.
            () = moved => {}
        }
    }
}

fn failure(
    result: Result<Result<(), FetchError>, tokio::sync::oneshot::error::RecvError>,
) -> Option<FetchError> {
    result.ok()?.err()
}

/// Where to fetch next: behind the readers' latest places, else at the first gap.
fn next_place(blob: &LayerBlob) -> Option<Range<u64>> {
    let len = blob.wire.blob_len();
    while let Some(hint) = blob.take_hint() {
        let near = hint..len.min(hint.saturating_add(NEAR));
        if let Some(run) = blob.wire.next_unclaimed(near) {
            blob.give_hint(hint);
            return Some(run);
        }
    }
    blob.wire.next_unclaimed(0..len)
}
