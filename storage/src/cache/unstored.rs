//! Readers of a layer while the disk takes nothing: their chunks are fetched and decoded into the
//! node's [`Memory`](super::memory::Memory).
//!
//! Nothing here changes what is on disk. A chunk in memory that is read while there is room again is
//! stored then; whatever was dropped meanwhile is fetched as ever.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::{bits::index, layer::LayerBlob, pool::Urgency};

impl LayerBlob {
    /// Fetches (unless they are in the wire) and decodes groups whose tasks say that this happens.
    pub(crate) fn bring_to_memory(&self, groups: Vec<usize>) {
        for group in groups {
            // `self` is always behind the Arc that `me` belongs to.
            let Some(blob) = self.me.upgrade() else {
                return;
            };
            self.wire
                .scheduler
                .runtime
                .spawn(async move { blob.bring(group).await });
        }
    }

    async fn bring(self: Arc<Self>, group: usize) {
        let remote = self.group_remote(group);
        let chunks = &self.map.chunks()[self.group(group)];
        let decoded: u64 = chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
        let brought = async {
            if self.wire.has(remote.clone()) {
                let room = self.wire.scheduler.memory.admit(decoded).await;
                return Ok((None, room));
            }
            let cause = self.cause_of(group);
            let fetched = self.wire.fetch_direct(&remote, decoded, cause).await;
            fetched.map(|(bytes, room)| (Some(bytes), room))
        };
        let brought = tokio::select! {
            brought = brought => brought,
            // Whoever waits is left to a successor.
            () = self.wire.until_closed() => return,
        };
        match brought {
            Ok((fetched, Some(room))) => {
                let pool = Arc::clone(&self.wire.scheduler.pool);
                pool.submit(Urgency::Reader, move |scratch| {
                    self.run_in_memory(group, fetched, room, scratch);
                });
            }
            // Room is given or waited for.
            Ok((_, None)) => {}
            Err(error) => self.not_brought(
                group,
                &format!(
                    "cannot fetch bytes {}..{}: {}",
                    remote.start,
                    remote.end,
                    error.report()
                ),
            ),
        }
    }

    /// Keeps a verified chunk in memory.
    pub(crate) fn hold(&self, number: usize, bytes: &[u8], room: &mut OwnedSemaphorePermit) {
        let memory = &self.wire.scheduler.memory;
        memory.hold(self.in_memory, number, Bytes::copy_from_slice(bytes), room);
        self.held.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn is_held(&self, number: usize) -> bool {
        self.wire.scheduler.memory.has(self.in_memory, number)
    }

    /// Fills `buf` from chunks on disk and in memory; false if any of it is neither here nor there.
    pub(crate) fn read_held(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let end = offset + buf.len() as u64;
        let mut ready = Vec::new();
        for number in self.map.overlapping(offset..end) {
            let bytes = if self.store.bits.get(number as u64) {
                None
            } else {
                match self.wire.scheduler.memory.read(self.in_memory, number) {
                    Some(bytes) => Some(bytes),
                    None => return Ok(false),
                }
            };
            ready.push((number, bytes));
        }
        // What lies between chunks.
        buf.fill(0);
        let mut storable = false;
        for (number, bytes) in ready {
            let chunk = self.map.chunks()[number].decoded_range();
            let (from, to) = (chunk.start.max(offset), chunk.end.min(end));
            let part = &mut buf[index(from - offset)..index(to - offset)];
            match bytes {
                Some(bytes) => {
                    let at = index(from - chunk.start);
                    part.copy_from_slice(&bytes[at..at + part.len()]);
                    storable = true;
                }
                None => self.store.read(part, from)?,
            }
        }
        if storable && !self.wire.disk.is_full() {
            self.store_held();
        }
        Ok(true)
    }

    /// Stores what is in memory, now that the disk takes it.
    fn store_held(&self) {
        if self.storing_held.swap(true, Ordering::AcqRel) {
            return;
        }
        // `self` is always behind the Arc that `me` belongs to.
        let Some(blob) = self.me.upgrade() else {
            return;
        };
        let pool = &self.wire.scheduler.pool;
        pool.submit(Urgency::Spare, move |_| {
            let memory = &blob.wire.scheduler.memory;
            for number in memory.chunks_of(blob.in_memory) {
                let Some(bytes) = memory.read(blob.in_memory, number) else {
                    continue;
                };
                let chunk = &blob.map.chunks()[number];
                if blob.wire.is_closed() || blob.keep(number, chunk, &bytes).is_err() {
                    break;
                }
                memory.drop_chunk(blob.in_memory, number);
            }
            blob.storing_held.store(false, Ordering::Release);
        });
    }
}
