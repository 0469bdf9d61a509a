//! Verified chunks that could not be stored, for readers: bounded, shared by all layers of a node.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a permit stands for.
const UNIT: u64 = 1 << 10;
/// A chunk that nobody has read stays this long, so that whoever waited for it finds it.
const UNREAD_STAYS: Duration = Duration::from_secs(10);
/// How often one that waits for memory looks for something to drop.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A layer in this process, and the index of a chunk.
type Key = (u64, usize);

/// Memory for chunks that the disk does not take.
#[derive(Debug)]
pub(crate) struct Memory {
    units: u32,
    free: Arc<Semaphore>,
    held: Mutex<Held>,
    next_layer: AtomicU64,
    bytes_in: AtomicU64,
}

#[derive(Debug, Default)]
struct Held {
    chunks: BTreeMap<Key, Entry>,
    /// Least recently used first.
    order: BTreeMap<u64, Key>,
    next: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    bytes: Bytes,
    order: u64,
    since: Instant,
    read: bool,
    room: Option<OwnedSemaphorePermit>,
}

impl Memory {
    pub(crate) fn new(limit: u64) -> Self {
        let most = u64::try_from(Semaphore::MAX_PERMITS).unwrap_or(u64::MAX);
        let units = (limit / UNIT).clamp(1, most.min(u32::MAX.into()));
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        Self {
            units,
            free: Arc::new(Semaphore::new(usize::try_from(units).unwrap_or(1))),
            held: Mutex::default(),
            next_layer: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
        }
    }

    /// A number for a layer's chunks.
    pub(crate) fn layer(&self) -> u64 {
        self.next_layer.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> u64 {
        self.held.lock().bytes
    }

    /// Bytes ever held.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in.load(Ordering::Relaxed)
    }

    /// Waits for room for `bytes`, in order of arrival; more than there is at all gets all of it.
    pub(crate) async fn admit(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = self.units_of(bytes);
        let mut room = pin!(Arc::clone(&self.free).acquire_many_owned(units));
        loop {
            tokio::select! {
                biased;
                // Never closed.
                room = &mut room => return room.ok(),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            self.make_room(units);
        }
    }

    /// Keeps a chunk in room that was admitted for it and others.
    pub(crate) fn hold(
        &self,
        layer: u64,
        chunk: usize,
        bytes: Bytes,
        room: &mut OwnedSemaphorePermit,
    ) {
        let units = self.units_of(bytes.len() as u64);
        // All that is left, for a group that is larger than the memory.
        let units = room.num_permits().min(usize::try_from(units).unwrap_or(0));
        let room = room.split(units);
        self.bytes_in
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut held = self.held.lock();
        held.remove((layer, chunk));
        held.bytes += bytes.len() as u64;
        let order = held.turn((layer, chunk));
        let entry = Entry {
            bytes,
            order,
            since: Instant::now(),
            read: false,
            room,
        };
        held.chunks.insert((layer, chunk), entry);
    }

    pub(crate) fn has(&self, layer: u64, chunk: usize) -> bool {
        self.held.lock().chunks.contains_key(&(layer, chunk))
    }

    /// A chunk, for a reader.
    pub(crate) fn read(&self, layer: u64, chunk: usize) -> Option<Bytes> {
        let mut held = self.held.lock();
        let order = held.chunks.get(&(layer, chunk))?.order;
        held.order.remove(&order);
        let order = held.turn((layer, chunk));
        let entry = held.chunks.get_mut(&(layer, chunk))?;
        entry.order = order;
        entry.read = true;
        Some(entry.bytes.clone())
    }

    /// Drops a chunk: it is stored by now.
    pub(crate) fn drop_chunk(&self, layer: u64, chunk: usize) {
        self.held.lock().remove((layer, chunk));
    }

    /// Drops a layer's chunks.
    pub(crate) fn drop_layer(&self, layer: u64) {
        let mut held = self.held.lock();
        let keys: Vec<Key> = held
            .chunks
            .range((layer, 0)..=(layer, usize::MAX))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            held.remove(key);
        }
    }

    /// The layer's chunks that are held.
    pub(crate) fn chunks_of(&self, layer: u64) -> Vec<usize> {
        let held = self.held.lock();
        held.chunks
            .range((layer, 0)..=(layer, usize::MAX))
            .map(|((_, chunk), _)| *chunk)
            .collect()
    }

    fn units_of(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT).max(1)).map_or(self.units, |n| n.min(self.units))
    }

    /// Drops what was used longest ago, until `units` are free or the rest must stay.
    fn make_room(&self, units: u32) {
        let wanted = usize::try_from(units).unwrap_or(usize::MAX);
        let mut freed = self.free.available_permits();
        let mut held = self.held.lock();
        let droppable: Vec<Key> = held
            .order
            .values()
            .filter(|key| {
                held.chunks
                    .get(*key)
                    .is_some_and(|entry| entry.read || entry.since.elapsed() >= UNREAD_STAYS)
            })
            .copied()
            .collect();
        for key in droppable {
            if freed >= wanted {
                break;
            }
            let room = held.remove(key).and_then(|entry| entry.room);
            freed += room.map_or(0, |room| room.num_permits());
        }
    }
}

impl Held {
    fn turn(&mut self, key: Key) -> u64 {
        self.next += 1;
        self.order.insert(self.next, key);
        self.next
    }

    fn remove(&mut self, key: Key) -> Option<Entry> {
        let entry = self.chunks.remove(&key)?;
        self.order.remove(&entry.order);
        self.bytes -= entry.bytes.len() as u64;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_read_makes_room_and_what_was_not_stays_a_while() {
        let memory = Memory::new(4 << 10);
        let layer = memory.layer();
        let mut room = memory.admit(4 << 10).await.unwrap();
        for chunk in 0..4 {
            memory.hold(layer, chunk, Bytes::from(vec![1; 1 << 10]), &mut room);
        }
        drop(room);
        assert_eq!(memory.read(layer, 2).unwrap().len(), 1 << 10);
        let one = memory.admit(1 << 10).await.unwrap();
        assert_eq!(memory.chunks_of(layer), [0, 1, 3], "the one that was read");
        memory.make_room(4);
        assert_eq!(
            memory.chunks_of(layer).len(),
            3,
            "nobody has read these yet"
        );
        drop(one);
        memory.drop_layer(layer);
        assert_eq!(memory.bytes(), 0);
        let all = memory.admit(1 << 40).await.unwrap();
        assert_eq!(all.num_permits(), 4, "more than there is gets all of it");
    }
}
