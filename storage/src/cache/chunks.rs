//! Single flight: who waits for which group of chunks, and what is being decoded.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering,
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{
    bits::index,
    codec::CorruptError,
    layer::LayerBlob,
    pool::{Outputs, Scratch, Urgency, room},
    wire::Ended,
};
use crate::{
    ranges::{FetchError, FetchFailure},
    source::{Cause, SourceError},
};

type Answer = Result<(), SourceError>;

/// Groups that are neither absent nor present, by the index of their first chunk.
pub(crate) type Tasks = BTreeMap<usize, Task>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Wire,
    Queued,
    Decoding,
    /// Being fetched and decoded into memory, because the disk takes nothing.
    Memory,
}

#[derive(Debug)]
pub(crate) struct Task {
    stage: Stage,
    urgency: Urgency,
    cause: Cause,
    /// Its wire blocks were forgotten once already.
    refetched: bool,
    /// A fetch that it relied on failed once already.
    retried: bool,
    pub(crate) since: Instant,
    pub(crate) waiters: Vec<oneshot::Sender<Answer>>,
}

impl Task {
    fn new(stage: Stage, urgency: Urgency, cause: Cause) -> Self {
        Self {
            stage,
            urgency,
            cause,
            refetched: false,
            retried: false,
            since: Instant::now(),
            waiters: Vec::new(),
        }
    }
}

/// Why a group could not be decoded.
enum Failure {
    Corrupt {
        chunk: usize,
        error: CorruptError,
    },
    Io(io::Error),
    /// It is right, but the disk does not take it.
    Unstored(io::Error),
    Panicked,
}

impl LayerBlob {
    /// Has the absent groups of a decoded range fetched and decoded; one receiver for each.
    pub(crate) fn want(&self, range: Range<u64>, cause: Cause) -> Vec<oneshot::Receiver<Answer>> {
        let urgency = match cause {
            Cause::Demand | Cause::Metadata => Urgency::Reader,
            Cause::Prefetch => Urgency::Soon,
            Cause::Hydration => Urgency::Spare,
        };
        let mut waits = Vec::new();
        let mut needed: Vec<Range<u64>> = Vec::new();
        let mut ready = Vec::new();
        let mut past_disk = Vec::new();
        // What readers wait for may be in memory; what is to stay must be stored.
        let held = urgency == Urgency::Reader && self.held.load(Ordering::Acquire) > 0;
        {
            let mut tasks = self.tasks.lock();
            let mut last = None;
            for number in self.absent(range) {
                let group = self.group_start(number);
                if last == Some(group) {
                    continue;
                }
                last = Some(group);
                // Bits are set before a task is removed, under this lock: look again.
                if self.group_present(group) || held && self.is_held(number) {
                    continue;
                }
                let task = tasks
                    .entry(group)
                    .or_insert_with(|| Task::new(Stage::Wire, urgency, cause));
                let (tx, rx) = oneshot::channel();
                task.waiters.push(tx);
                waits.push(rx);
                let more_urgent = urgency < task.urgency;
                task.urgency = task.urgency.min(urgency);
                task.cause = task.cause.min(cause);
                match task.stage {
                    Stage::Wire => {
                        let remote = self.group_remote(group);
                        if self.wire.has(remote.clone()) {
                            task.stage = Stage::Queued;
                            ready.push((group, task.urgency));
                        } else if task.urgency == Urgency::Reader && self.wire.disk.is_full() {
                            task.stage = Stage::Memory;
                            past_disk.push(group);
                        } else {
                            needed.push(remote);
                        }
                    }
                    // A second job at the higher urgency; whichever comes second finds nothing.
                    Stage::Queued if more_urgent => ready.push((group, task.urgency)),
                    Stage::Queued | Stage::Decoding | Stage::Memory => {}
                }
            }
        }
        if cause == Cause::Demand {
            for remote in &needed {
                tracing::trace!(layer = self.wire.name, ?remote, "reader waits for");
            }
        }
        self.fetch(&needed, cause);
        self.queue(ready);
        self.bring_to_memory(past_disk);
        waits
    }

    /// Decodes, when there is time, what of a remote range is in the wire but not in `data`.
    pub(crate) fn decode_present(&self, range: Range<u64>) {
        self.on_arrived(&range, Cause::Demand);
    }

    /// Bytes of the wire have become present: decode the groups that are complete now.
    pub(crate) fn on_arrived(&self, range: &Range<u64>, cause: Cause) {
        let came_along = match cause {
            Cause::Demand => Some(Urgency::Spare),
            Cause::Prefetch => Some(Urgency::Soon),
            // The ordered pass decodes what hydration brings; until then the wire has it.
            Cause::Metadata | Cause::Hydration => None,
        };
        let mut ready = Vec::new();
        {
            let mut tasks = self.tasks.lock();
            self.for_groups(range, |group| match tasks.get_mut(&group) {
                Some(task) if task.stage == Stage::Wire => {
                    if self.wire.has(self.group_remote(group)) {
                        task.stage = Stage::Queued;
                        ready.push((group, task.urgency));
                    }
                }
                Some(_) => {}
                None => {
                    if let Some(urgency) = came_along
                        && !self.group_present(group)
                        && self.wire.has(self.group_remote(group))
                    {
                        tasks.insert(group, Task::new(Stage::Queued, urgency, cause));
                        ready.push((group, urgency));
                    }
                }
            });
        }
        self.queue(ready);
    }

    /// A fetch is over. Groups that still lack bytes which nothing else brings are asked for again;
    /// a group fails with the first fetch that was made for readers while it waited, or with the
    /// second one of any kind.
    pub(crate) fn on_ended(&self, fetch: &Ended, result: Result<(), FetchError>) {
        let mut ready = Vec::new();
        let mut again = Vec::new();
        let mut failed = Vec::new();
        let mut past_disk = Vec::new();
        let unstored = result
            .as_ref()
            .is_err_and(|error| error.failure() == FetchFailure::Local);
        {
            let mut tasks = self.tasks.lock();
            let for_readers = matches!(fetch.cause, Cause::Demand | Cause::Metadata);
            self.for_groups(&fetch.range, |group| {
                let Some(task) = tasks.get_mut(&group) else {
                    return;
                };
                if task.stage != Stage::Wire {
                    return;
                }
                let remote = self.group_remote(group);
                if self.wire.has(remote.clone()) {
                    task.stage = Stage::Queued;
                    ready.push((group, task.urgency));
                } else if self.wire.covered(remote.clone()) {
                    // Other fetches bring the rest.
                } else if result.is_ok() {
                    again.push(remote);
                } else if unstored {
                    past_disk.push(group);
                } else if task.retried || for_readers && fetch.begun >= task.since {
                    failed.extend(tasks.remove(&group).map(|task| (group, task)));
                } else {
                    task.retried = true;
                    again.push(remote);
                }
            });
        }
        self.queue(ready);
        for group in past_disk {
            self.unstored(group, "the disk is full");
        }
        if !again.is_empty() {
            self.fetch(&again, Cause::Demand);
        }
        if let Err(error) = result {
            let why = error.report();
            for (group, task) in failed {
                let remote = self.group_remote(group);
                let what = format!("cannot fetch bytes {}..{}: {why}", remote.start, remote.end);
                self.fail(group, task.waiters, &what);
            }
        }
    }

    fn queue(&self, ready: Vec<(usize, Urgency)>) {
        for (group, urgency) in ready {
            // `self` is always behind the Arc that `me` belongs to.
            let Some(blob) = self.me.upgrade() else {
                return;
            };
            self.wire
                .scheduler
                .pool
                .submit(urgency, move |scratch| blob.run_job(group, scratch));
        }
    }

    fn run_job(&self, group: usize, scratch: &mut Scratch) {
        if self.wire.is_closed() {
            // Nothing may be written any more; who waits is left to a successor.
            return;
        }
        {
            let mut tasks = self.tasks.lock();
            match tasks.get_mut(&group) {
                Some(task) if task.stage == Stage::Queued => task.stage = Stage::Decoding,
                _ => return,
            }
        }
        // A panic must not leave readers waiting; the scratch buffers hold plain bytes.
        let result = catch_unwind(AssertUnwindSafe(|| {
            self.decode_from_wire(group, scratch, None)
        }))
        .unwrap_or(Err(Failure::Panicked));
        self.decoded(group, result);
    }

    /// As [`Self::run_job`], with room in memory for chunks that the disk does not take; `fetched`
    /// is the group's member unless it is in the wire.
    pub(crate) fn run_in_memory(
        &self,
        group: usize,
        fetched: Option<Vec<u8>>,
        mut room: OwnedSemaphorePermit,
        scratch: &mut Scratch,
    ) {
        if self.wire.is_closed() {
            return;
        }
        let work = || match fetched {
            Some(member) => {
                let mut out = scratch.outputs();
                self.decode_member(group, &member, &mut out, Some(&mut room))
            }
            None => self.decode_from_wire(group, scratch, Some(&mut room)),
        };
        let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Failure::Panicked));
        self.decoded(group, result);
    }

    fn decoded(&self, group: usize, result: Result<(), Failure>) {
        match result {
            Ok(()) => {
                let task = self.tasks.lock().remove(&group);
                for waiter in task.into_iter().flat_map(|task| task.waiters) {
                    // The reader may have gone.
                    let _ = waiter.send(Ok(()));
                }
            }
            Err(failure) => self.decode_failed(group, failure),
        }
    }

    fn decode_from_wire(
        &self,
        group: usize,
        scratch: &mut Scratch,
        memory: Option<&mut OwnedSemaphorePermit>,
    ) -> Result<(), Failure> {
        let remote = self.group_remote(group);
        let mut compressed = std::mem::take(&mut scratch.compressed);
        let member = room(&mut compressed, index(remote.end - remote.start));
        let read = self.wire.read(member, remote.start).map_err(Failure::Io);
        let result =
            read.and_then(|()| self.decode_member(group, member, &mut scratch.outputs(), memory));
        scratch.compressed = compressed;
        result
    }

    fn decode_member(
        &self,
        group: usize,
        compressed: &[u8],
        out: &mut Outputs<'_>,
        mut memory: Option<&mut OwnedSemaphorePermit>,
    ) -> Result<(), Failure> {
        let begun = Instant::now();
        let counters = &self.wire.counters;
        let numbers = self.group(group);
        let chunks = &self.map.chunks()[numbers.clone()];
        let mut member = self
            .options
            .codec
            .open(compressed, chunks, out.decompressor, out.decoded);
        for (number, chunk) in numbers.zip(chunks) {
            if self.store.bits.get(number as u64) {
                continue;
            }
            let bytes = member
                .chunk(chunk, out.piece)
                .map_err(|error| Failure::Corrupt {
                    chunk: number,
                    error,
                })?;
            match &mut memory {
                // Not tried again and again: the disk says when it takes something.
                Some(memory) if self.wire.disk.is_full() => self.hold(number, bytes, memory),
                Some(memory) => {
                    if self.keep(number, chunk, bytes).is_err() {
                        self.hold(number, bytes, memory);
                    }
                }
                None => self.keep(number, chunk, bytes).map_err(Failure::Unstored)?,
            }
            counters.decoded_chunks.fetch_add(1, Ordering::Relaxed);
            counters
                .decoded_bytes
                .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
        }
        let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counters.decode_nanos.fetch_add(nanos, Ordering::Relaxed);
        Ok(())
    }

    fn decode_failed(&self, group: usize, failure: Failure) {
        let remote = self.group_remote(group);
        let message = match failure {
            Failure::Corrupt { chunk, error } => {
                self.wire
                    .counters
                    .corrupt_chunks
                    .fetch_add(1, Ordering::Relaxed);
                // What was fetched is wrong whatever happens next: no later read may trust it.
                self.wire.forget(remote.clone());
                let message = format!(
                    "chunk {chunk} (decoded offset {}) from bytes {}..{} of {}: {error}",
                    self.map.chunks()[chunk].decoded,
                    remote.start,
                    remote.end,
                    self.wire.origin(),
                );
                let mut tasks = self.tasks.lock();
                if let Some(task) = tasks.get_mut(&group)
                    && !task.refetched
                {
                    task.refetched = true;
                    task.stage = Stage::Wire;
                    drop(tasks);
                    self.note_error(format!("{}: {message}; fetching it again", self.wire.name));
                    let needed = std::slice::from_ref(&remote);
                    self.wire.request(remote.clone(), Cause::Demand, needed);
                    // Another fetch may have brought it before the task said that it waits.
                    self.on_arrived(&remote, Cause::Hydration);
                    return;
                }
                message
            }
            Failure::Unstored(error) => return self.unstored(group, &error.to_string()),
            Failure::Io(error) => format!("chunk {group}: local I/O failed: {error}"),
            Failure::Panicked => format!("chunk {group}: the decoder panicked"),
        };
        let task = self.tasks.lock().remove(&group);
        let waiters = task.map_or_else(Vec::new, |task| task.waiters);
        self.fail(group, waiters, &message);
    }

    /// What readers wait for is served from memory. What others wanted is left: hydration waits for
    /// the disk, and the operator has been told.
    fn unstored(&self, group: usize, why: &str) {
        let mut tasks = self.tasks.lock();
        let Some(task) = tasks.get_mut(&group) else {
            return;
        };
        if task.stage == Stage::Memory {
            return;
        }
        if task.urgency == Urgency::Reader {
            task.stage = Stage::Memory;
            drop(tasks);
            return self.bring_to_memory(vec![group]);
        }
        let waiters = tasks.remove(&group).map_or_else(Vec::new, |t| t.waiters);
        drop(tasks);
        for waiter in waiters {
            let _ = waiter.send(Err(SourceError {
                errno: rustix::io::Errno::IO.raw_os_error(),
                message: format!("{}: cannot be stored: {why}", self.wire.name),
            }));
        }
    }

    /// The group that is brought to memory could not be fetched.
    pub(crate) fn not_brought(&self, group: usize, what: &str) {
        let task = self.tasks.lock().remove(&group);
        let waiters = task.map_or_else(Vec::new, |task| task.waiters);
        self.fail(group, waiters, what);
    }

    /// Why the group is fetched.
    pub(crate) fn cause_of(&self, group: usize) -> Cause {
        let tasks = self.tasks.lock();
        tasks.get(&group).map_or(Cause::Demand, |task| task.cause)
    }

    fn fail(&self, group: usize, waiters: Vec<oneshot::Sender<Answer>>, what: &str) {
        let decoded = self.map.chunks()[group].decoded;
        let message = format!("{} at decoded offset {decoded}: {what}", self.wire.name);
        self.wire
            .counters
            .failed_reads
            .fetch_add(waiters.len() as u64, Ordering::Relaxed);
        self.note_error(message.clone());
        for waiter in waiters {
            // The reader may have gone.
            let _ = waiter.send(Err(SourceError {
                errno: rustix::io::Errno::IO.raw_os_error(),
                message: message.clone(),
            }));
        }
    }

    /// Calls `each` with every group that needs bytes of a remote range.
    fn for_groups(&self, range: &Range<u64>, mut each: impl FnMut(usize)) {
        let chunks = self.map.chunks();
        let first = chunks.partition_point(|c| c.remote_end.0 <= range.start);
        let last = chunks.partition_point(|c| c.remote.0 < range.end);
        let mut number = first;
        while number < last {
            let group = self.group(number);
            each(group.start);
            number = group.end.max(number + 1);
        }
    }

    /// The chunks of the member that holds chunk `number`.
    pub(crate) fn group(&self, number: usize) -> Range<usize> {
        let chunks = self.map.chunks();
        let remote = chunks[number].remote;
        let alone =
            |other: Option<&formats::blobmap::Chunk>| other.is_none_or(|c| c.remote != remote);
        if alone(number.checked_sub(1).and_then(|n| chunks.get(n))) && alone(chunks.get(number + 1))
        {
            return number..number + 1;
        }
        chunks.partition_point(|c| c.remote < remote)
            ..chunks.partition_point(|c| c.remote <= remote)
    }

    fn group_start(&self, number: usize) -> usize {
        self.group(number).start
    }

    fn group_present(&self, group: usize) -> bool {
        let range = self.group(group);
        self.store.bits.all(range.start as u64..range.end as u64)
    }

    /// The remote bytes that are enough for a group. What lies between its member and the next
    /// known one may be much more than the member can have.
    pub(crate) fn group_remote(&self, group: usize) -> Range<u64> {
        let chunks = &self.map.chunks()[self.group(group)];
        let (first, last) = (&chunks[0], &chunks[chunks.len() - 1]);
        let decoded = last.inner.saturating_add(u64::from(last.len));
        let most = decoded.saturating_add(decoded / 8).saturating_add(1 << 20);
        let start = first.remote.0;
        start..last.remote_end.0.min(start.saturating_add(most))
    }
}
