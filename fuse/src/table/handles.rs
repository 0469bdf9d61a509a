//! The file-handle table: what OPEN gave out and RELEASE has not taken back.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    RecordIndex, Request, Table,
    layout::{HANDLE_BYTES, HANDLES_OFFSET, MAX_HANDLES},
    steps::arrow,
};
use crate::sys::{
    abi,
    map::{SharedMap, WORD},
};

/// Slots that may be given out.
#[derive(Debug, Default)]
pub(super) struct Free {
    recycled: Vec<u32>,
    fresh: u32,
}

/// Flag of a recorded OPEN (no flag of open(2) is as high): its handle's entry was made.
pub(super) const HANDLE_MADE: u32 = 1 << 31;

/// A handle that an OPEN is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) fh: u64,
    /// It was not in the table before.
    pub(crate) new: bool,
}

/// A handle that a RELEASE closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed {
    /// The node it was open on.
    pub(crate) node: u64,
}

impl Table {
    /// Opens a handle on `node` for an OPEN. `None`: all are in use.
    ///
    /// The record gets the handle's number, the table its entry, the record the mark that the
    /// entry was made; only then the OPEN may be answered. So a replay finds or makes the same
    /// handle and none is left behind; and it does not make a handle again whose answer went out
    /// and which was released since, while the record of its OPEN was not yet free.
    pub(crate) fn grant_handle(
        &self,
        record: RecordIndex,
        request: &Request,
        node: u64,
    ) -> Option<Granted> {
        if request.fh != 0 && request.flags & HANDLE_MADE != 0 {
            return Some(Granted {
                fh: request.fh,
                new: false,
            });
        }
        let fh = if request.fh == 0 {
            let index = self.handles.lock().take()?;
            let reuse = abi::low(entry(self.head(), index)[0].load(Ordering::Relaxed) >> 1);
            let fh = abi::word(index + 1, reuse.wrapping_add(1));
            self.set_record_handle(record, fh);
            arrow("record has the handle");
            fh
        } else {
            request.fh
        };
        let new = self.make_handle(fh, node);
        arrow("table has the handle");
        self.mark_handle_made(record, request);
        arrow("record knows it");
        Some(Granted { fh, new })
    }

    /// Makes an entry, if it is not there. False: it was there.
    fn make_handle(&self, fh: u64, node: u64) -> bool {
        let Some((index, reuse)) = split(fh) else {
            return false;
        };
        let words = entry(self.head(), index);
        let open = u64::from(reuse) << 1 | 1;
        if words[0].load(Ordering::Acquire) == open {
            return false;
        }
        words[1].store(node, Ordering::Relaxed);
        words[0].store(open, Ordering::Release);
        true
    }

    /// Closes a handle. `None`: it is not open (a repeated RELEASE, or one of a lost table).
    pub(crate) fn close_handle(&self, fh: u64) -> Option<Closed> {
        let (index, reuse) = split(fh)?;
        let words = entry(self.head(), index);
        let node = words[1].load(Ordering::Relaxed);
        let closed = u64::from(reuse) << 1;
        words[0]
            .compare_exchange(closed | 1, closed, Ordering::AcqRel, Ordering::Relaxed)
            .ok()?;
        self.handles.lock().recycled.push(index);
        Some(Closed { node })
    }

    /// The nodes of all open handles, one entry each.
    pub(crate) fn open_nodes(&self) -> Vec<u64> {
        let (head, fresh) = (self.head(), self.handles.lock().fresh);
        (0..fresh)
            .map(|index| entry(head, index))
            .filter(|words| words[0].load(Ordering::Acquire) & 1 == 1)
            .map(|words| words[1].load(Ordering::Relaxed))
            .collect()
    }

    /// Rebuilds the free list. A handle that only an unanswered OPEN names counts as free here;
    /// replays therefore come before new opens, and take theirs off the list by
    /// [`Table::claim_handle`].
    pub(super) fn find_free_handles(&self) {
        let head = self.head();
        let used = |index: &u32| entry(head, *index)[0].load(Ordering::Acquire) & 1 == 1;
        let count = u32::try_from(MAX_HANDLES).unwrap_or(u32::MAX);
        let fresh = (0..count).rev().find(used).map_or(0, |last| last + 1);
        *self.handles.lock() = Free {
            recycled: (0..fresh).rev().filter(|index| !used(index)).collect(),
            fresh,
        };
    }

    /// Takes the slot of a recorded handle off the free list.
    pub(crate) fn claim_handle(&self, fh: u64) {
        let Some((index, _)) = split(fh) else {
            return;
        };
        let mut free = self.handles.lock();
        while free.fresh <= index {
            let fresh = free.fresh;
            free.recycled.push(fresh);
            free.fresh += 1;
        }
        free.recycled.retain(|other| *other != index);
    }
}

impl Free {
    fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.recycled.pop() {
            return Some(index);
        }
        let index = self.fresh;
        if index as usize >= MAX_HANDLES {
            return None;
        }
        self.fresh += 1;
        Some(index)
    }
}

fn split(fh: u64) -> Option<(u32, u32)> {
    let index = abi::low(fh).checked_sub(1)?;
    ((index as usize) < MAX_HANDLES).then_some((index, abi::high(fh)))
}

fn entry(head: &SharedMap, index: u32) -> &[AtomicU64] {
    let start = (HANDLES_OFFSET + index as usize * HANDLE_BYTES) / WORD;
    &head.words()[start..start + HANDLE_BYTES / WORD]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::scratch;

    fn open(table: &Table, record: RecordIndex, node: u64) -> u64 {
        let granted = table.grant_handle(record, &Request::default(), node);
        let granted = granted.unwrap();
        assert!(granted.new);
        granted.fh
    }

    #[test]
    fn release_is_idempotent_and_numbers_do_not_come_back() {
        let table = Table::open(scratch(), 0).unwrap();
        let record = table.reserve().unwrap();
        table.write(record, &Request::default());
        let first = open(&table, record, 7);
        assert_eq!(table.open_nodes(), [7]);
        assert_eq!(table.close_handle(first), Some(Closed { node: 7 }));
        assert_eq!(table.close_handle(first), None);
        let second = open(&table, record, 8);
        assert_ne!(first, second);
        assert_eq!(
            table.close_handle(first),
            None,
            "an old number closes nothing"
        );
        assert_eq!(table.open_nodes(), [8]);
        for foreign in [0, u64::MAX, 65_537] {
            assert_eq!(table.close_handle(foreign), None);
        }
    }

    #[test]
    fn a_successor_knows_open_handles_and_keeps_recorded_ones() {
        let fd = scratch();
        let table = Table::open(fd.try_clone().unwrap(), 0).unwrap();
        let record = table.reserve().unwrap();
        table.write(record, &Request::default());
        let kept = open(&table, record, 7);
        let closed = open(&table, record, 8);
        table.close_handle(closed);
        drop(table);
        let table = Table::open(fd, 1).unwrap();
        assert_eq!(table.open_nodes(), [7]);
        // A record names handle number 3 of slot 5, which never reached the table.
        let recorded = abi::word(6, 3);
        table.claim_handle(recorded);
        let mut request = Request {
            fh: recorded,
            ..Request::default()
        };
        let again = |request: &Request| table.grant_handle(record, request, 9).unwrap();
        let (fh, new) = (recorded, true);
        assert_eq!(again(&request), Granted { fh, new });
        assert_eq!(again(&request), Granted { fh, new: false });
        table.close_handle(fh);
        request.flags = HANDLE_MADE;
        assert_eq!(
            again(&request),
            Granted { fh, new: false },
            "it was released"
        );
        assert_eq!(table.open_nodes(), [7]);
        let mut given = vec![kept, recorded];
        for _ in 0..8 {
            given.push(open(&table, record, 1));
        }
        given.sort_unstable();
        given.dedup();
        assert_eq!(given.len(), 10);
    }
}
