//! Who fetches what: everything asked for is fetched once.

use std::{io, ops::Range, slice, sync::Arc, sync::atomic::Ordering};

use tokio::sync::oneshot;

use super::{BLOCK, Flight, Flights, Landing, Wait, Wire, align_down};
use crate::{
    cache::scheduler::Ticket,
    ranges::{FetchError, FetchFailure},
    source::Cause,
};

/// The largest single request for readers.
const REQUEST_MAX: u64 = 4 << 20;
/// A reader waits for a fetch that will reach its range within this many bytes.
const PATIENCE: u64 = 512 << 10;
/// Share of the blob that may be fetched twice so that readers need not wait (1/100).
pub(super) const DUPLICATE_SHARE: u64 = 100;

impl Wire {
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
        if self.disk.is_full() {
            return;
        }
        self.start(range, Cause::Demand, slice::from_ref(range), None);
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
            self.request(range.clone(), cause, slice::from_ref(&range));
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

    pub(super) fn nothing_under_way(&self, range: Range<u64>) -> FetchError {
        FetchError::Source {
            origin: self.origin(),
            range,
            failure: FetchFailure::Unreachable,
            source: Arc::new(io::Error::other("the fetch ended before these bytes")),
        }
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
    pub(super) fn unclaimed(
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
