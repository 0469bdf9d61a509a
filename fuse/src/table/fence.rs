//! Who reads the device, and how a generation ends.
//!
//! A reader writes its slot and then looks at the generation; the holder waits until no recorded
//! reader is left, raises the generation and then looks at the slots again. Both with sequential
//! consistency, so one of the two sees the other: no thread of an old daemon reads the device once
//! a new one was told to.

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use super::{
    Table,
    layout::{HEADER_BYTES, MAX_READERS, READER_BYTES, READERS_OFFSET, header},
};
use crate::{
    process::ThreadId,
    sys::map::{SharedMap, WORD},
};

impl Table {
    /// Enters the calling thread as reader `slot`. False: a newer generation has taken over.
    pub(crate) fn enter_reader(&self, slot: usize) -> io::Result<bool> {
        let me = ThreadId::current()?;
        let words = reader(self.head(), slot);
        words[1].store(me.started, Ordering::Relaxed);
        words[2].store(self.generation(), Ordering::Relaxed);
        words[0].store(me.tid.into(), Ordering::Release);
        fence(Ordering::SeqCst);
        if header::generation(self.head()).load(Ordering::SeqCst) == self.generation() {
            return Ok(true);
        }
        self.leave_reader(slot);
        Ok(false)
    }

    /// Takes the calling thread out of reader slot `slot`.
    pub(crate) fn leave_reader(&self, slot: usize) {
        reader(self.head(), slot)[0].store(0, Ordering::Release);
    }

    /// Empties all reader slots: those of a former daemon, whose threads the holder saw gone.
    pub(crate) fn forget_readers(&self) {
        for slot in 0..MAX_READERS {
            self.leave_reader(slot);
        }
    }
}

/// The holder's view of a table: the header page, whatever the layout behind it.
#[derive(Debug)]
pub(crate) struct Fence {
    header: SharedMap,
}

impl Fence {
    /// Maps the header page.
    pub(crate) fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self {
            header: SharedMap::new(fd, 0, HEADER_BYTES)?,
        })
    }

    /// Recorded readers that are not known to be gone.
    pub(crate) fn readers(&self) -> io::Result<Vec<u32>> {
        let mut left = Vec::new();
        for slot in 0..MAX_READERS {
            let words = reader(&self.header, slot);
            let tid = words[0].load(Ordering::Acquire);
            let Ok(tid) = u32::try_from(tid) else {
                continue; // not a tid, so nobody
            };
            let started = words[1].load(Ordering::Relaxed);
            if tid != 0 && !(ThreadId { tid, started }).is_gone()? {
                left.push(tid);
            }
        }
        Ok(left)
    }

    /// Raises the generation. Call when [`Fence::readers`] was empty, then look once more.
    pub(crate) fn advance(&self) -> u64 {
        let generation = header::generation(&self.header).fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        generation
    }
}

fn reader(head: &SharedMap, slot: usize) -> &[AtomicU64] {
    let start = (READERS_OFFSET + slot * READER_BYTES) / WORD;
    &head.words()[start..start + READER_BYTES / WORD]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::scratch;

    #[test]
    fn a_reader_holds_the_fence_until_it_is_gone() {
        let fd = scratch();
        let fence = Fence::new(&fd).unwrap();
        assert_eq!(fence.advance(), 1);
        let table = Table::open(fd, 1).unwrap();
        let (entered, leave) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(table.enter_reader(3).unwrap());
                entered.wait();
                // It dies without leaving its slot, as under SIGKILL.
                leave.wait();
            });
            entered.wait();
            assert_eq!(fence.readers().unwrap().len(), 1);
            leave.wait();
        });
        while !fence.readers().unwrap().is_empty() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_late_reader_of_an_old_generation_does_not_enter() {
        let fd = scratch();
        let fence = Fence::new(&fd).unwrap();
        fence.advance();
        let table = Table::open(fd, 1).unwrap();
        fence.advance();
        assert!(!table.enter_reader(0).unwrap());
        assert!(fence.readers().unwrap().is_empty());
    }
}
