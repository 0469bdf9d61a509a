//! One fetch: from the request to the last byte, resumed where a body broke off.

use std::{
    io,
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::sync::{oneshot, watch};

use super::{BLOCK, Ended, Flights, Landing, Wait, Wire, align_down};
use crate::{
    cache::scheduler::Ticket,
    ranges::{FetchError, FetchFailure, RangeBody},
    source::Cause,
};

/// Body bytes written in one go.
const BATCH: usize = 256 << 10;
/// Attempts in a row that may end without one new byte.
const FRUITLESS_MAX: u32 = 2;

/// An entry in the table of fetches under way.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    id: u64,
    cause: Cause,
    begun: Instant,
    start: u64,
    end: u64,
    /// First byte that has not arrived.
    at: u64,
    /// Another fetch brings all of it, so this one ends early.
    superseded: watch::Sender<bool>,
}

impl Flight {
    pub(super) fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// What will become present. The block that the next byte falls into has arrived in part, and
    /// becomes present as a whole. Nothing of a fetch that ends early can be relied on.
    pub(super) fn coming(&self) -> Range<u64> {
        if self.is_superseded() {
            return self.end..self.end;
        }
        align_down(self.at, BLOCK)..self.end
    }

    fn is_superseded(&self) -> bool {
        *self.superseded.borrow()
    }

    /// Completes when another fetch brings all of it.
    async fn superseded(&self) {
        // The sender is in `self`.
        let _ = self.superseded.subscribe().wait_for(|ends| *ends).await;
    }

    pub(super) fn cause(&self) -> Cause {
        self.cause
    }

    pub(super) fn rest(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }
}

impl Flights {
    pub(super) fn begin(&mut self, range: Range<u64>, cause: Cause) -> Flight {
        self.next_id += 1;
        let flight = Flight {
            id: self.next_id,
            cause,
            begun: Instant::now(),
            start: range.start,
            end: range.end,
            at: range.start,
            superseded: watch::Sender::new(false),
        };
        self.active.push(flight.clone());
        flight
    }

    fn entry(&mut self, id: u64) -> Option<&mut Flight> {
        self.active.iter_mut().find(|flight| flight.id == id)
    }
}

/// Where a fetch stands.
struct Progress {
    /// Where the uninterrupted run of received bytes began.
    whole_from: u64,
    /// First byte not received.
    at: u64,
    end: u64,
    /// Bytes and requests of the current body that were counted.
    counted: (u64, u64),
}

impl Wire {
    pub(super) fn launch(&self, flight: Flight, ticket: Option<Ticket>) -> Landing {
        let (done, receiver) = oneshot::channel();
        // `self` is always behind the Arc that `me` belongs to; without one nobody waits.
        if let Some(wire) = self.me.upgrade() {
            self.scheduler.runtime.spawn(async move {
                let closing = wire.closing.notified();
                if wire.is_closed() {
                    return;
                }
                let result = tokio::select! {
                    result = wire.fly(&flight, ticket) => result,
                    // Who waits is not answered: a successor will do that.
                    () = closing => return,
                };
                wire.land(&flight, &result);
                // Nobody has to listen.
                let _ = done.send(result);
            });
        }
        receiver
    }

    async fn fly(
        self: &Arc<Self>,
        flight: &Flight,
        ticket: Option<Ticket>,
    ) -> Result<(), FetchError> {
        // Background fetches were admitted by the scheduler; readers' fetches queue per layer only,
        // so that one stalled source holds nobody else up.
        let _slot = match &ticket {
            Some(_) if self.disk.is_full() => return Err(self.not_stored(flight.start..flight.end)),
            Some(_) => None,
            // Never closed.
            None => self.reader_slots.acquire().await.ok(),
        };
        let ticket = ticket.unwrap_or_else(|| {
            self.scheduler
                .enter(flight.cause, flight.end - flight.start)
        });
        let mut progress = Progress {
            whole_from: flight.start,
            at: flight.start,
            end: flight.end,
            counted: (0, 0),
        };
        let mut fruitless = 0;
        while progress.at < progress.end && !flight.is_superseded() {
            let source = Arc::clone(&self.source.read());
            let answer = tokio::select! {
                answer = source.fetch(progress.at..progress.end, flight.cause) => answer,
                () = flight.superseded() => break,
            };
            let mut body = match answer {
                Ok(body) => body,
                Err(error) => {
                    self.counters.add_traffic(flight.cause, 0, 1);
                    return Err(error);
                }
            };
            let before = progress.at;
            progress.counted = (0, 0);
            self.count(flight, &body, &mut progress);
            self.extend(flight, &body, &mut progress)?;
            if flight.is_superseded() {
                break;
            }
            let result = self.drain(flight, &mut body, &mut progress, &ticket).await;
            self.count(flight, &body, &mut progress);
            match result {
                Ok(()) => {}
                Err(error) if error.failure() == FetchFailure::Local => return Err(error),
                Err(error) => {
                    fruitless = if progress.at > before {
                        0
                    } else {
                        fruitless + 1
                    };
                    if fruitless >= FRUITLESS_MAX {
                        return Err(error);
                    }
                    tracing::debug!(layer = self.name, at = progress.at, %error, "resuming a fetch");
                }
            }
        }
        Ok(())
    }

    /// Counts what the body has cost since the last time.
    fn count(&self, flight: &Flight, body: &RangeBody, progress: &mut Progress) {
        let now = (body.meter().wire_bytes(), body.meter().requests());
        let (bytes, requests) = progress.counted;
        self.counters
            .add_traffic(flight.cause, now.0 - bytes, now.1 - requests);
        progress.counted = now;
    }

    /// A source may deliver more than was asked for, the whole blob even: all of it is kept. Of
    /// several whole blobs under way only the first is read to its end: fetches that began before
    /// it are given up, later ones (for blocks that it has passed) end where they were to end.
    fn extend(
        &self,
        flight: &Flight,
        body: &RangeBody,
        progress: &mut Progress,
    ) -> Result<(), FetchError> {
        let range = body.range();
        if range.start > progress.at || range.end < progress.end || range.end > self.len {
            return Err(FetchError::Length {
                origin: self.origin(),
                range: progress.at..progress.end,
                reached: range.start,
            });
        }
        if range.start == progress.at && range.end == progress.end {
            return Ok(());
        }
        let mut flights = self.flights.lock();
        if flight.is_superseded() {
            // Another one's whole blob: this one's is not read, and keeps its place until it lands.
            return Ok(());
        }
        let mut end = range.end;
        if range == (0..self.len) {
            self.ignores_ranges.store(true, Ordering::Release);
            if flights.whole.is_some_and(|id| id != flight.id) {
                end = progress.end;
            } else {
                flights.whole = Some(flight.id);
                for other in flights.active.iter().filter(|f| f.id != flight.id) {
                    other.superseded.send_replace(true);
                }
            }
        }
        if let Some(entry) = flights.entry(flight.id) {
            entry.start = entry.start.min(range.start);
            entry.at = range.start;
            entry.end = end;
        }
        drop(flights);
        progress.whole_from = progress.whole_from.min(range.start);
        progress.at = range.start;
        progress.end = end;
        Ok(())
    }

    async fn drain(
        self: &Arc<Self>,
        flight: &Flight,
        body: &mut RangeBody,
        progress: &mut Progress,
        ticket: &Ticket,
    ) -> Result<(), FetchError> {
        while progress.at < progress.end {
            let first = tokio::select! {
                first = body.next_chunk() => first?,
                () = flight.superseded() => return Ok(()),
            };
            let Some(first) = first else {
                return Ok(());
            };
            let mut size = first.len();
            let mut parts = vec![first];
            let mut failed = None;
            // Whatever has arrived meanwhile goes along in one write.
            while size < BATCH {
                match body.next_chunk().now_or_never() {
                    Some(Ok(Some(part))) => {
                        size += part.len();
                        parts.push(part);
                    }
                    Some(Err(error)) => {
                        failed = Some(error);
                        break;
                    }
                    Some(Ok(None)) | None => break,
                }
            }
            ticket.arrived(size as u64);
            self.count(flight, body, progress);
            self.store_batch(flight, progress, parts, size as u64)
                .await?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(())
    }

    async fn store_batch(
        self: &Arc<Self>,
        flight: &Flight,
        progress: &mut Progress,
        parts: Vec<Bytes>,
        size: u64,
    ) -> Result<(), FetchError> {
        let wire = Arc::clone(self);
        let (id, cause) = (flight.id, flight.cause);
        let (whole_from, at) = (progress.whole_from, progress.at);
        let written = tokio::task::spawn_blocking(move || {
            let arrived = wire.accept(whole_from, at, &parts)?;
            wire.advance(id, at + size);
            if !arrived.is_empty()
                && let Some(listener) = wire.listener.get().and_then(std::sync::Weak::upgrade)
            {
                listener.arrived(arrived, cause);
            }
            Ok(())
        })
        .await
        .unwrap_or_else(|join| Err(io::Error::other(join)));
        progress.at += size;
        written.map_err(|error: io::Error| FetchError::Source {
            origin: self.store.path().display().to_string(),
            range: at..at + size,
            failure: FetchFailure::Local,
            source: Arc::new(error),
        })
    }

    /// The error of a fetch that is not made because what it brings could not be stored.
    fn not_stored(&self, range: Range<u64>) -> FetchError {
        FetchError::Source {
            origin: self.store.path().display().to_string(),
            range,
            failure: FetchFailure::Local,
            source: Arc::new(io::Error::other("the disk is full")),
        }
    }

    fn advance(&self, id: u64, at: u64) {
        let mut flights = self.flights.lock();
        if let Some(entry) = flights.entry(id) {
            entry.at = at;
        }
        for wait in flights
            .waits
            .extract_if(.., |wait| self.has(wait.range.clone()))
        {
            // The waiter may have gone.
            let _ = wait.done.send(Ok(()));
        }
        drop(flights);
        self.moved.notify_waiters();
    }

    /// Takes a fetch off the table and tells everybody who may have waited for it.
    fn land(&self, flight: &Flight, result: &Result<(), FetchError>) {
        let mut flights = self.flights.lock();
        let range = flights
            .entry(flight.id)
            .map_or_else(|| flight.range(), |entry| entry.range());
        flights.active.retain(|other| other.id != flight.id);
        flights.whole.take_if(|id| *id == flight.id);
        let mut waits = std::mem::take(&mut flights.waits);
        for wait in waits.extract_if(.., |wait| self.has(wait.range.clone())) {
            let _ = wait.done.send(Ok(()));
        }
        // Nobody waits for what nothing brings: neither after a failure nor where a fetch ended
        // early, or brought bytes that were forgotten since.
        let hopeless = |wait: &mut Wait| {
            wait.range.start < range.end
                && range.start < wait.range.end
                && !self.unclaimed(&flights, &wait.range, None).is_empty()
        };
        for wait in waits.extract_if(.., hopeless) {
            let error = match result {
                Ok(()) => self.nothing_under_way(wait.range),
                Err(error) => error.clone(),
            };
            let _ = wait.done.send(Err(error));
        }
        flights.waits = waits;
        drop(flights);
        self.moved.notify_waiters();
        if result.is_err() {
            self.counters.failed_fetches.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(listener) = self.listener.get().and_then(std::sync::Weak::upgrade) {
            let ended = Ended {
                range,
                cause: flight.cause,
                begun: flight.begun,
            };
            listener.ended(ended, result.clone());
        }
    }
}
