//! Who may use the link: one object per node, shared by all blobs.
//!
//! - **Readers and indexes** never wait here. A layer bounds its own requests in flight (so that a
//!   stalled source holds only its own), and the client bounds them per host.
//! - **Start lists** are bounded by bytes outstanding on the node.
//! - **Hydration** runs at line rate on an idle link. While readers are active at most
//!   [`SchedulerOptions::hydration_busy_bytes`] are outstanding, and none is begun while a fetch
//!   for a reader, a start list or an index is outstanding unless those used less than half of the
//!   link in the last 200 ms. (Waiting for silence would not work: a stream of single faults never
//!   pauses.)
//! - A fetch without progress for a second is **stalled** and counts against nobody: one dead
//!   source delays no other.
//!
//! The link is measured as it is used: the highest rate seen lately and the shortest time to a
//! first byte; their product is how much must be outstanding to keep it busy.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
};

use super::{disk::Disk, memory::Memory, pool::Pool};
use crate::source::Cause;

/// How long a fetch may be silent before it no longer counts.
const STALLED_AFTER: Duration = Duration::from_secs(1);
/// How long after the last reader's byte the link counts as in use by readers.
const READERS_LINGER: Duration = Duration::from_millis(300);
const SLOT: Duration = Duration::from_millis(50);
/// 200 ms.
const DEMAND_SLOTS: u64 = 4;
/// 10 s.
const RATE_SLOTS: usize = 200;

/// Limits of the node. The defaults suit links from 100 Mbit/s to 10 Gbit/s.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Threads that inflate and verify.
    pub decode_workers: usize,
    /// Readers' requests in flight per layer.
    pub requests_per_layer: usize,
    /// Start list bytes outstanding on the node.
    pub prefetch_bytes: u64,
    /// Hydration bytes outstanding while readers or start lists are active.
    pub hydration_busy_bytes: u64,
    /// Hydration bytes outstanding on an otherwise idle link (more if the link holds more).
    pub hydration_idle_bytes: u64,
    /// Ordered passes (inflate, hash, compare) that run at the same time.
    pub passes: usize,
    /// Memory for what readers wait for while the disk takes nothing.
    pub memory_bytes: u64,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            decode_workers: cores,
            requests_per_layer: 32,
            prefetch_bytes: 32 << 20,
            hydration_busy_bytes: 256 << 10,
            hydration_idle_bytes: 4 << 20,
            passes: cores.div_ceil(2),
            memory_bytes: 32 << 20,
        }
    }
}

/// The node's scheduler. Hand the same one to every layer.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) runtime: Handle,
    pub(crate) options: SchedulerOptions,
    pub(crate) pool: Arc<Pool>,
    pub(crate) passes: Arc<Semaphore>,
    link: Mutex<Link>,
    changed: Notify,
    /// Folders in use by a cache of this process.
    folders: Arc<Mutex<HashSet<PathBuf>>>,
    /// By device number.
    disks: Mutex<HashMap<u64, Arc<Disk>>>,
    pub(crate) memory: Memory,
}

/// How the disk of the caches is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskReport {
    /// It takes no bytes just now: readers are served from memory, hydration waits.
    pub full: bool,
    /// Writes that failed.
    pub refused_writes: u64,
    /// Decoded bytes that were verified, could not be stored, and were served from memory.
    pub unstored_bytes: u64,
    /// Decoded bytes that are held in memory now because they could not be stored.
    pub memory_bytes: u64,
}

/// The right to use a folder. Two caches in one folder would make each other's maps lie.
#[derive(Debug)]
pub(crate) struct FolderClaim {
    folders: Arc<Mutex<HashSet<PathBuf>>>,
    path: PathBuf,
}

impl Drop for FolderClaim {
    fn drop(&mut self) {
        self.folders.lock().remove(&self.path);
    }
}

#[derive(Debug)]
struct Flying {
    cause: Cause,
    outstanding: u64,
    begun: Instant,
    moved: Instant,
    first_byte: bool,
}

impl Flying {
    fn stalled(&self, now: Instant) -> bool {
        now.duration_since(self.moved) > STALLED_AFTER
    }

    /// Whether a start waits for it.
    fn urgent(&self) -> bool {
        self.cause != Cause::Hydration
    }
}

#[derive(Debug)]
struct Link {
    flying: HashMap<u64, Flying>,
    next_id: u64,
    origin: Instant,
    /// (slot number, bytes, readers' bytes), newest last.
    slots: VecDeque<(u64, u64, u64)>,
    round_trip: Option<Duration>,
    last_reader: Option<Instant>,
}

impl Scheduler {
    /// A scheduler whose work runs on `runtime`.
    pub fn new(runtime: Handle, options: SchedulerOptions) -> Arc<Self> {
        Arc::new(Self {
            pool: Arc::new(Pool::new(runtime.clone(), options.decode_workers)),
            passes: Arc::new(Semaphore::new(options.passes.max(1))),
            memory: Memory::new(options.memory_bytes),
            disks: Mutex::default(),
            runtime,
            options,
            link: Mutex::new(Link::new(Instant::now())),
            changed: Notify::new(),
            folders: Arc::default(),
        })
    }

    /// The right to use a folder, unless somebody has it.
    pub(crate) fn claim_folder(&self, path: &Path) -> io::Result<FolderClaim> {
        let path = path.canonicalize()?;
        if !self.folders.lock().insert(path.clone()) {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "the folder is in use by a cache that is not closed yet",
            ));
        }
        Ok(FolderClaim {
            folders: Arc::clone(&self.folders),
            path,
        })
    }

    /// The file system that a folder is on.
    pub(crate) fn disk(&self, folder: &Path) -> io::Result<Arc<Disk>> {
        let device = std::fs::metadata(folder)?.dev();
        let mut disks = self.disks.lock();
        let disk = disks
            .entry(device)
            .or_insert_with(|| Disk::new(self.runtime.clone()));
        Ok(Arc::clone(disk))
    }

    /// How the disk of the caches is doing.
    pub fn disk_report(&self) -> DiskReport {
        let disks = self.disks.lock();
        DiskReport {
            full: disks.values().any(|disk| disk.is_full()),
            refused_writes: disks.values().map(|disk| disk.refused_writes()).sum(),
            unstored_bytes: self.memory.bytes_in(),
            memory_bytes: self.memory.bytes(),
        }
    }

    /// Bytes that keep the link busy for one round trip, as measured so far.
    pub fn bandwidth_delay_bytes(&self) -> u64 {
        self.link.lock().bandwidth_delay()
    }

    /// How large a hydration request should be right now.
    pub(crate) fn hydration_request(&self) -> u64 {
        let link = self.link.lock();
        if link.busy(Instant::now()) {
            self.options.hydration_busy_bytes / 2
        } else {
            (self.options.hydration_idle_bytes / 4).max(link.bandwidth_delay())
        }
    }

    /// Whether so little is on its way that guessing costs nobody anything.
    pub(crate) fn may_guess(&self, bytes: u64) -> bool {
        let link = self.link.lock();
        let others = link.flying.values().filter(|f| f.cause != Cause::Hydration);
        others.map(|f| f.outstanding).sum::<u64>() <= 2 * bytes
    }

    /// Registers a fetch that may start at once.
    pub(crate) fn enter(self: &Arc<Self>, cause: Cause, bytes: u64) -> Ticket {
        let id = self.link.lock().add(cause, bytes, Instant::now());
        Ticket {
            scheduler: Arc::clone(self),
            id,
        }
    }

    /// Waits until a background fetch of `bytes` may start.
    pub(crate) async fn admit(self: &Arc<Self>, cause: Cause, bytes: u64) -> Ticket {
        self.admit_if(cause, bytes, |_| true).await
    }

    /// Waits until hydration may fetch `bytes`; `idle_only`: not before readers are silent.
    pub(crate) async fn admit_hydration(self: &Arc<Self>, bytes: u64, idle_only: bool) -> Ticket {
        let silent = |link: &Link| !idle_only || !link.busy(Instant::now());
        self.admit_if(Cause::Hydration, bytes, silent).await
    }

    async fn admit_if(
        self: &Arc<Self>,
        cause: Cause,
        bytes: u64,
        also: impl Fn(&Link) -> bool,
    ) -> Ticket {
        loop {
            let changed = self.changed.notified();
            {
                let mut link = self.link.lock();
                let now = Instant::now();
                if also(&link) && link.allows(cause, bytes, &self.options, now) {
                    let id = link.add(cause, bytes, now);
                    return Ticket {
                        scheduler: Arc::clone(self),
                        id,
                    };
                }
            }
            // The rules depend on time as well.
            let _ = tokio::time::timeout(SLOT, changed).await;
        }
    }
}

impl Link {
    fn new(origin: Instant) -> Self {
        Self {
            flying: HashMap::new(),
            next_id: 0,
            origin,
            slots: VecDeque::new(),
            round_trip: None,
            last_reader: None,
        }
    }

    fn add(&mut self, cause: Cause, bytes: u64, now: Instant) -> u64 {
        self.next_id += 1;
        if matches!(cause, Cause::Demand | Cause::Metadata) {
            self.last_reader = Some(now);
        }
        self.flying.insert(
            self.next_id,
            Flying {
                cause,
                outstanding: bytes,
                begun: now,
                moved: now,
                first_byte: false,
            },
        );
        self.next_id
    }

    /// Whether a start waits for them.
    fn arrived(&mut self, id: u64, bytes: u64, now: Instant) -> bool {
        let mut urgent = false;
        let mut waited = None;
        if let Some(flying) = self.flying.get_mut(&id) {
            flying.outstanding = flying.outstanding.saturating_sub(bytes);
            flying.moved = now;
            urgent = flying.urgent();
            if matches!(flying.cause, Cause::Demand | Cause::Metadata) {
                self.last_reader = Some(now);
            }
            if !flying.first_byte {
                flying.first_byte = true;
                waited = Some(now.duration_since(flying.begun));
            }
        }
        if let Some(waited) = waited {
            // The minimum, forgotten slowly: queueing must not pass for distance.
            let aged = self.round_trip.map(|old| old + old / 64);
            self.round_trip = Some(aged.map_or(waited, |old| old.min(waited)));
        }
        self.count(bytes, urgent, now);
        urgent
    }

    fn slot(&self, now: Instant) -> u64 {
        let slots = now.duration_since(self.origin).as_millis() / SLOT.as_millis();
        u64::try_from(slots).unwrap_or(u64::MAX)
    }

    fn count(&mut self, bytes: u64, urgent: bool, now: Instant) {
        let slot = self.slot(now);
        if self.slots.back().is_none_or(|last| last.0 < slot) {
            self.slots.push_back((slot, 0, 0));
            if self.slots.len() > RATE_SLOTS {
                self.slots.pop_front();
            }
        }
        if let Some(last) = self.slots.back_mut() {
            last.1 += bytes;
            last.2 += if urgent { bytes } else { 0 };
        }
    }

    /// The most bytes that two neighbouring slots carried lately, per slot: one slot alone is
    /// inflated by what queued up in buffers.
    fn peak(&self) -> u64 {
        let slots = self.slots.iter();
        slots
            .clone()
            .zip(slots.skip(1))
            .filter(|(a, b)| a.0 + 1 == b.0)
            .map(|(a, b)| u64::midpoint(a.1, b.1))
            .max()
            .unwrap_or(0)
    }

    fn bandwidth_delay(&self) -> u64 {
        let Some(round_trip) = self.round_trip else {
            return 0;
        };
        let millis = u64::try_from(round_trip.as_millis()).unwrap_or(u64::MAX);
        let slot = u64::try_from(SLOT.as_millis()).unwrap_or(1);
        (self.peak().saturating_mul(millis) / slot).min(16 << 20)
    }

    /// Whether readers or start lists use the link.
    fn busy(&self, now: Instant) -> bool {
        self.last_reader
            .is_some_and(|at| now.duration_since(at) < READERS_LINGER)
            || self
                .flying
                .values()
                .any(|f| f.cause != Cause::Hydration && !f.stalled(now))
    }

    fn allows(&self, cause: Cause, bytes: u64, options: &SchedulerOptions, now: Instant) -> bool {
        let outstanding: u64 = self
            .flying
            .values()
            .filter(|f| f.cause == cause && !f.stalled(now))
            .map(|f| f.outstanding)
            .sum();
        let fits = |limit: u64| outstanding == 0 || outstanding + bytes <= limit;
        match cause {
            Cause::Metadata | Cause::Demand => true,
            Cause::Prefetch => fits(options.prefetch_bytes),
            Cause::Hydration if self.busy(now) => {
                fits(options.hydration_busy_bytes) && self.readers_leave_half(now)
            }
            Cause::Hydration => fits(options.hydration_idle_bytes.max(2 * self.bandwidth_delay())),
        }
    }

    fn readers_leave_half(&self, now: Instant) -> bool {
        if !self.flying.values().any(|f| f.urgent() && !f.stalled(now)) {
            return true;
        }
        let since = self.slot(now).saturating_sub(DEMAND_SLOTS);
        let used: u64 = self
            .slots
            .iter()
            .filter(|slot| slot.0 > since)
            .map(|slot| slot.2)
            .sum();
        used * 2 <= self.peak() * DEMAND_SLOTS
    }
}

/// A fetch in the scheduler's books; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Ticket {
    scheduler: Arc<Scheduler>,
    id: u64,
}

impl Ticket {
    /// Corrects how many bytes are outstanding.
    pub(crate) fn resize(&self, bytes: u64) {
        if let Some(flying) = self.scheduler.link.lock().flying.get_mut(&self.id) {
            flying.outstanding = bytes;
        }
    }

    /// Notes that body bytes arrived.
    pub(crate) fn arrived(&self, bytes: u64) {
        let urgent = self
            .scheduler
            .link
            .lock()
            .arrived(self.id, bytes, Instant::now());
        if !urgent {
            self.scheduler.changed.notify_waiters();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut link = self.scheduler.link.lock();
        link.flying.remove(&self.id);
        drop(link);
        self.scheduler.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    fn at(link: &Link, ms: u64) -> Instant {
        link.origin + Duration::from_millis(ms)
    }

    fn options() -> SchedulerOptions {
        SchedulerOptions {
            hydration_busy_bytes: 256 * K,
            hydration_idle_bytes: 4096 * K,
            prefetch_bytes: 1024 * K,
            ..SchedulerOptions::default()
        }
    }

    /// A link that hydration has filled at 10 KiB a millisecond until `ms`.
    fn measured(ms: u64) -> Link {
        let mut link = Link::new(Instant::now());
        let id = link.add(Cause::Hydration, 1 << 40, at(&link, 0));
        for step in 1..=ms {
            link.arrived(id, 10 * K, at(&link, step));
        }
        link.flying.clear();
        link
    }

    #[test]
    fn hydration_fills_an_idle_link_and_keeps_low_beside_readers() {
        let mut link = measured(1000);
        let now = at(&link, 1001);
        let limits = options();
        assert!(link.allows(Cause::Hydration, 1024 * K, &limits, now));
        link.add(Cause::Hydration, 1024 * K, now);
        assert!(link.allows(Cause::Hydration, 1024 * K, &limits, now));
        let reader = link.add(Cause::Demand, 64 * K, now);
        assert!(
            !link.allows(Cause::Hydration, 128 * K, &limits, now),
            "too much is out"
        );
        link.flying.retain(|id, _| *id == reader);
        assert!(
            link.allows(Cause::Hydration, 128 * K, &limits, now),
            "readers used nothing yet"
        );
        assert!(
            link.allows(Cause::Demand, 1 << 40, &limits, now),
            "readers never wait"
        );
    }

    #[test]
    fn nothing_begins_while_readers_use_more_than_half() {
        for (per_ms, allowed) in [(4 * K, true), (6 * K, false)] {
            let mut link = measured(1000);
            let reader = link.add(Cause::Demand, 1 << 40, at(&link, 1000));
            for step in 1001..=1249 {
                link.arrived(reader, per_ms, at(&link, step));
            }
            let now = at(&link, 1249);
            assert_eq!(
                link.allows(Cause::Hydration, 128 * K, &options(), now),
                allowed
            );
            // Between two single faults the link counts as in use, but is free to be used.
            link.flying.clear();
            assert!(link.allows(Cause::Hydration, 128 * K, &options(), now));
            link.add(Cause::Hydration, 128 * K, now);
            link.add(Cause::Hydration, 128 * K, now);
            assert!(!link.allows(Cause::Hydration, 128 * K, &options(), now));
        }
    }

    #[test]
    fn what_stalls_does_not_count() {
        let mut link = measured(1000);
        let begun = at(&link, 1000);
        for cause in [Cause::Demand, Cause::Prefetch, Cause::Hydration] {
            link.add(cause, 1 << 40, begun);
        }
        let limits = options();
        let soon = at(&link, 1500);
        assert!(!link.allows(Cause::Prefetch, 1024 * K, &limits, soon));
        assert!(!link.allows(Cause::Hydration, 1024 * K, &limits, soon));
        let later = at(&link, 2500);
        assert!(link.allows(Cause::Prefetch, 1024 * K, &limits, later));
        assert!(link.allows(Cause::Hydration, 1024 * K, &limits, later));
        assert!(!link.busy(later));
    }

    #[test]
    fn the_link_is_measured_by_its_best() {
        let mut link = measured(1000);
        assert_eq!(
            link.bandwidth_delay(),
            10 * K,
            "the first byte took a millisecond"
        );
        let slow = link.add(Cause::Demand, K, at(&link, 1000));
        link.arrived(slow, K, at(&link, 1900));
        assert!(link.bandwidth_delay() < 11 * K, "a queue is no distance");
    }
}
