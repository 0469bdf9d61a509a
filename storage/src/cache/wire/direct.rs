//! Fetching into memory, past a disk that takes nothing.

use std::{ops::Range, sync::Arc};

use tokio::sync::OwnedSemaphorePermit;

use super::Wire;
use crate::{
    cache::bits::index,
    ranges::{FetchError, RangeBody},
    source::Cause,
};

/// Attempts in a row that may end without one new byte.
const FRUITLESS_MAX: u32 = 2;

impl Wire {
    /// Fetches all of `range` for readers. Room in memory is waited for once the source has begun to
    /// deliver, for these bytes and `decoded` more, so that a source that does not answer holds
    /// none.
    pub(crate) async fn fetch_direct(
        &self,
        range: &Range<u64>,
        decoded: u64,
        cause: Cause,
    ) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), FetchError> {
        let len = range.end - range.start;
        // Never closed.
        let _slot = self.reader_slots.acquire().await.ok();
        let ticket = self.scheduler.enter(cause, len);
        let mut room = None;
        let mut bytes = Vec::new();
        let mut fruitless = 0;
        while (bytes.len() as u64) < len {
            let source = Arc::clone(&self.source.read());
            let before = bytes.len();
            let rest = range.start + before as u64..range.end;
            let mut body = match source.fetch(rest.clone(), cause).await {
                Ok(body) => body,
                Err(error) => {
                    self.counters.add_traffic(cause, 0, 1);
                    return Err(error);
                }
            };
            let result = loop {
                let chunk = match next_part(&mut body, rest.end, bytes.len(), range.start).await {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                };
                if room.is_none() {
                    room = self.scheduler.memory.admit(len + decoded).await;
                    bytes.reserve_exact(index(len));
                }
                ticket.arrived(chunk.len() as u64);
                bytes.extend_from_slice(&chunk);
            };
            let meter = body.meter();
            self.counters
                .add_traffic(cause, meter.wire_bytes(), meter.requests());
            if bytes.len() > before {
                fruitless = 0;
            } else {
                fruitless += 1;
            }
            if let Err(error) = result
                && fruitless >= FRUITLESS_MAX
            {
                return Err(error);
            }
            if fruitless >= FRUITLESS_MAX {
                return Err(self.nothing_under_way(rest));
            }
        }
        Ok((bytes, room))
    }
}

/// What the body delivers next of `[start + have, end)`; none once it has passed the end. It may
/// begin earlier and end later than it was asked for.
async fn next_part(
    body: &mut RangeBody,
    end: u64,
    have: usize,
    start: u64,
) -> Result<Option<bytes::Bytes>, FetchError> {
    let want = start + have as u64;
    while body.position() < end {
        let at = body.position();
        let Some(chunk) = body.next_chunk().await? else {
            break;
        };
        let clip = |offset: u64| index(offset.saturating_sub(at)).min(chunk.len());
        let part = chunk.slice(clip(want)..clip(end));
        if !part.is_empty() {
            return Ok(Some(part));
        }
    }
    Ok(None)
}
