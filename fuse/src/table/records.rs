//! Landings and records: steps 4 to 7 of the protocol.

use std::{
    collections::HashSet,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    Table, TableError, allocate,
    handles::HANDLE_MADE,
    layout::{
        LANDING_BYTES, MAX_READERS, MAX_SEGMENTS, RECORD_BYTES, RECORDS_OFFSET, SEGMENT_BYTES,
        SEGMENT_RECORDS, header, landing,
    },
    steps::arrow,
};
use crate::sys::{
    abi::{self, op},
    map::WORD,
};

/// Index of a record in its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RecordIndex(u32);

/// What a record keeps of a request: all that its answer depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// The kernel's number; an answer carries it.
    pub(crate) unique: u64,
    pub(crate) opcode: u32,
    /// Open flags; of a recorded OPEN with `HANDLE_MADE`.
    pub(crate) flags: u32,
    pub(crate) node: u64,
    /// File handle; of an OPEN the one given out, 0 before that.
    pub(crate) fh: u64,
    /// Offset of a READ or READDIR; the interrupted unique of an INTERRUPT.
    pub(crate) offset: u64,
    /// Length of a READ or READDIR, of a LOOKUP's name.
    pub(crate) size: u32,
    /// The requesting thread.
    pub(crate) pid: u32,
    /// When it was read from the device, CLOCK_BOOTTIME in nanoseconds.
    pub(crate) started_ns: u64,
    /// The beginning of a LOOKUP's name, the whole of an INIT.
    pub(crate) payload: [u64; 8],
}

impl Request {
    /// The name of a LOOKUP, if it is short enough to be one of ours.
    pub(crate) fn name(&self) -> Option<Vec<u8>> {
        let len = usize::try_from(self.size).ok()?;
        let bytes = self.payload.iter().flat_map(|word| word.to_le_bytes());
        (len <= 64).then(|| bytes.take(len).collect())
    }

    /// Whether the kernel waits for an answer to it.
    pub(crate) fn wants_reply(&self) -> bool {
        !matches!(
            self.opcode,
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT | op::NOTIFY_REPLY
        )
    }
}

const PENDING: u64 = 1;

/// The state word of an unanswered record: `generation << 8 | 1`. FREE is 0.
fn pending(generation: u64) -> u64 {
    generation << 8 | PENDING
}

/// Records that may be used, known to the daemon alone.
#[derive(Debug, Default)]
pub(super) struct Free {
    recycled: Vec<u32>,
    fresh: u32,
    capacity: u32,
}

impl Table {
    /// Step 4: the landing is empty.
    pub(crate) fn clear_landing(&self, reader: usize) {
        self.landing_words(reader)[1].store(0, Ordering::Release);
    }

    /// What a landing holds, if anything.
    pub(crate) fn landed(&self, reader: usize) -> Option<Request> {
        let words = self.landing_words(reader);
        if words[1].load(Ordering::Acquire) == 0 {
            return None;
        }
        let at = |index: usize| words[index].load(Ordering::Relaxed);
        let (len, opcode) = (abi::low(at(0)), abi::high(at(0)));
        let mut request = Request {
            unique: at(1),
            opcode,
            node: at(2),
            pid: abi::low(at(4)),
            started_ns: boottime_ns(),
            ..Request::default()
        };
        let body = (len as usize)
            .min(LANDING_BYTES)
            .saturating_sub(abi::IN_HEADER);
        match opcode {
            op::READ | op::READDIR => {
                request.fh = at(5);
                request.offset = at(6);
                request.size = abi::low(at(7));
            }
            op::RELEASE | op::RELEASEDIR => request.fh = at(5),
            op::OPEN => request.flags = abi::low(at(5)) & !HANDLE_MADE,
            op::INTERRUPT => request.offset = at(5),
            op::LOOKUP => {
                // The name ends with a zero byte.
                request.size = u32::try_from(body.saturating_sub(1)).unwrap_or(u32::MAX);
                request.payload = std::array::from_fn(|i| at(5 + i));
            }
            op::INIT => {
                // Old kernels send less; what is not sent is zero.
                request.payload = std::array::from_fn(|i| {
                    let word = at(5 + i);
                    match body.saturating_sub(i * WORD) {
                        0..4 => 0,
                        4..8 => u64::from(abi::low(word)),
                        _ => word,
                    }
                });
            }
            _ => {}
        }
        Some(request)
    }

    /// Step 5, all of it: the landed request gets a record, then the landing is emptied.
    pub(crate) fn record(&self, reader: usize, request: &Request) -> io::Result<RecordIndex> {
        let record = self.reserve()?;
        self.write(record, request);
        arrow("record written, still free");
        self.state(record)
            .store(pending(self.generation()), Ordering::Release);
        arrow("record pending, landing full");
        self.clear_landing(reader);
        arrow("landing empty");
        Ok(record)
    }

    /// Step 6, after the answer: the record is free. False: a newer generation owns it.
    pub(crate) fn free(&self, record: RecordIndex) -> bool {
        let freed = self
            .state(record)
            .compare_exchange(
                pending(self.generation()),
                0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok();
        if freed {
            self.records.lock().recycled.push(record.0);
        }
        freed
    }

    /// Steps 7 and 12: makes every unanswered request this generation's and returns them, landings
    /// turned into records without duplicates.
    pub(crate) fn take_over(&self) -> Result<Vec<(RecordIndex, Request)>, TableError> {
        let mut open = Vec::new();
        let mut known = HashSet::new();
        let capacity = self.records.lock().capacity;
        for record in (0..capacity).map(RecordIndex) {
            let state = self.state(record).load(Ordering::Acquire);
            if state == 0 {
                continue;
            }
            // An answer of the former daemon may still free it at this moment.
            let ours = pending(self.generation());
            if self
                .state(record)
                .compare_exchange(state, ours, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                self.records.lock().recycled.push(record.0);
                continue;
            }
            let request = self.read(record);
            known.insert(request.unique);
            open.push((record, request));
            arrow("record taken over");
        }
        for reader in 0..MAX_READERS {
            let Some(request) = self.landed(reader) else {
                continue;
            };
            if request.wants_reply() && known.insert(request.unique) {
                open.push((self.record(reader, &request)?, request));
            } else {
                self.clear_landing(reader);
            }
            arrow("landing taken over");
        }
        for (_, request) in &open {
            if request.opcode == op::OPEN && request.fh != 0 {
                self.claim_handle(request.fh);
            }
        }
        Ok(open)
    }

    /// A record nobody uses; the table grows if there is none.
    pub(crate) fn reserve(&self) -> io::Result<RecordIndex> {
        let mut free = self.records.lock();
        if let Some(index) = free.recycled.pop() {
            return Ok(RecordIndex(index));
        }
        if free.fresh == free.capacity {
            self.grow(&mut free)?;
        }
        free.fresh += 1;
        Ok(RecordIndex(free.fresh - 1))
    }

    /// Fills a record without making it count.
    pub(crate) fn write(&self, record: RecordIndex, request: &Request) {
        let words = self.record_words(record);
        let values = [
            request.unique,
            abi::word(request.opcode, request.flags),
            request.node,
            request.fh,
            request.offset,
            abi::word(request.size, request.pid),
            request.started_ns,
        ];
        let values = values.into_iter().chain(request.payload);
        for (word, value) in words[1..].iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
    }

    pub(super) fn set_record_handle(&self, record: RecordIndex, fh: u64) {
        self.record_words(record)[4].store(fh, Ordering::Release);
    }

    pub(super) fn mark_handle_made(&self, record: RecordIndex, request: &Request) {
        let marked = abi::word(request.opcode, request.flags | HANDLE_MADE);
        self.record_words(record)[2].store(marked, Ordering::Release);
    }

    /// Rebuilds the free list; refuses a table with a state that does not exist.
    pub(super) fn find_free_records(&self) -> Result<(), TableError> {
        let capacity = header::segments(self.head()) * SEGMENT_RECORDS;
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        let (mut recycled, mut fresh) = (Vec::new(), 0);
        for index in 0..capacity {
            let state = self.state(RecordIndex(index)).load(Ordering::Acquire);
            if state == 0 {
                continue;
            }
            let (code, generation) = (state & 0xff, state >> 8);
            if code != PENDING || generation > self.generation() {
                return Err(TableError::Record {
                    index,
                    state,
                    generation: self.generation(),
                });
            }
            recycled.extend(fresh..index);
            fresh = index + 1;
        }
        recycled.reverse();
        *self.records.lock() = Free {
            recycled,
            fresh,
            capacity,
        };
        Ok(())
    }

    fn read(&self, record: RecordIndex) -> Request {
        let words = self.record_words(record);
        let at = |index: usize| words[index].load(Ordering::Relaxed);
        Request {
            unique: at(1),
            opcode: abi::low(at(2)),
            flags: abi::high(at(2)),
            node: at(3),
            fh: at(4),
            offset: at(5),
            size: abi::low(at(6)),
            pid: abi::high(at(6)),
            started_ns: at(7),
            payload: std::array::from_fn(|i| at(8 + i)),
        }
    }

    fn grow(&self, free: &mut Free) -> io::Result<()> {
        let segments = header::segments(self.head());
        if segments == MAX_SEGMENTS {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let offset = (RECORDS_OFFSET + segments * SEGMENT_BYTES) as u64;
        allocate(self.fd(), offset, SEGMENT_BYTES as u64)?;
        self.map_segment(segments)?;
        header::set_segments(self.head(), segments + 1);
        free.capacity += u32::try_from(SEGMENT_RECORDS).unwrap_or(0);
        tracing::info!(records = free.capacity, "the request table has grown");
        Ok(())
    }

    fn state(&self, record: RecordIndex) -> &AtomicU64 {
        &self.record_words(record)[0]
    }

    fn record_words(&self, record: RecordIndex) -> &[AtomicU64] {
        let (segment, index) = (
            record.0 as usize / SEGMENT_RECORDS,
            record.0 as usize % SEGMENT_RECORDS,
        );
        // An index comes from the free list, which covers mapped segments only.
        let words = self.segments[segment].get().map_or(&[][..], |m| m.words());
        let start = index * RECORD_BYTES / WORD;
        &words[start..start + RECORD_BYTES / WORD]
    }

    fn landing_words(&self, reader: usize) -> &[AtomicU64] {
        let bytes = landing(reader);
        &self.head().words()[bytes.start / WORD..bytes.end / WORD]
    }
}

/// Now, on the clock that goes on in suspend.
pub(crate) fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::table::{format, scratch};

    #[test]
    fn a_full_table_grows_and_a_successor_sees_all_of_it() {
        let fd = scratch();
        let table = Table::open(fd.try_clone().unwrap(), 0).unwrap();
        let count = SEGMENT_RECORDS as u64 + 10;
        for unique in 1..=count {
            let request = Request {
                unique,
                opcode: op::READ,
                ..Request::default()
            };
            table.record(0, &request).unwrap();
        }
        drop(table);
        let table = Table::open(fd, 1).unwrap();
        let open = table.take_over().unwrap();
        assert_eq!(open.len() as u64, count);
        assert_eq!(open.last().unwrap().1.unique, count);
        assert!(open.iter().all(|(record, _)| table.free(*record)));
        assert!(table.take_over().unwrap().is_empty());
    }

    #[test]
    fn an_old_generation_frees_nothing_that_was_taken_over() {
        let fd = scratch();
        let old = Table::open(fd.try_clone().unwrap(), 1).unwrap();
        let request = Request {
            unique: 5,
            opcode: op::READ,
            ..Request::default()
        };
        let record = old.record(0, &request).unwrap();
        let new = Table::open(fd, 2).unwrap();
        assert_eq!(new.take_over().unwrap(), [(record, request)]);
        assert!(!old.free(record));
        assert!(new.free(record));
        assert!(!new.free(record));
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let fd = scratch();
        let state = {
            let table = Table::open(fd.try_clone().unwrap(), 1).unwrap();
            let record = table.reserve().unwrap();
            table.state(record).store(pending(2), Ordering::Relaxed);
            table.state(record).load(Ordering::Relaxed)
        };
        let refused = Table::open(fd.try_clone().unwrap(), 1);
        assert!(
            matches!(refused, Err(TableError::Record { index: 0, state: s, .. }) if s == state)
        );
        let table = Table::open(fd.try_clone().unwrap(), 2).unwrap();
        table.save_init(&[1; 8], &[2; 8]);
        assert_eq!(table.saved_init(), Some([2; 8]));
        table.head().words()[17].store(3, Ordering::Relaxed);
        drop(table);
        let refused = Table::open(fd, 2);
        assert!(matches!(
            refused,
            Err(TableError::Checksum { part: "INIT", .. })
        ));

        let memfd = || {
            let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
            rustix::fs::memfd_create("table", flags).unwrap()
        };
        let empty = Table::open(memfd(), 0);
        assert!(matches!(empty, Err(TableError::Truncated { .. })));
        let foreign = memfd();
        format(std::os::fd::AsFd::as_fd(&foreign)).unwrap();
        rustix::io::pwrite(&foreign, b"?", 0).unwrap();
        let foreign = Table::open(foreign, 0);
        assert!(matches!(foreign, Err(TableError::Unknown { .. })));
    }

    proptest! {
        #[test]
        fn a_record_gives_back_what_was_written(
            numbers in prop::array::uniform5(any::<u64>()),
            halves in prop::array::uniform4(any::<u32>()),
            payload in prop::array::uniform8(any::<u64>()),
        ) {
            let table = Table::open(scratch(), 0).unwrap();
            let request = Request {
                unique: numbers[0],
                opcode: halves[0],
                flags: halves[1],
                node: numbers[1],
                fh: numbers[2],
                offset: numbers[3],
                size: halves[2],
                pid: halves[3],
                started_ns: numbers[4],
                payload,
            };
            let record = table.reserve().unwrap();
            table.write(record, &request);
            prop_assert_eq!(table.read(record), request);
        }

        /// Whatever the kernel (or a torn copy) leaves in a landing: no panic, no loop.
        #[test]
        fn any_landing_can_be_taken_over(words in prop::collection::vec(any::<u64>(), 64)) {
            let table = Table::open(scratch(), 1).unwrap();
            for (word, value) in table.landing_words(2).iter().zip(&words) {
                word.store(*value, Ordering::Relaxed);
            }
            let open = table.take_over().unwrap();
            prop_assert!(open.len() <= 1);
            prop_assert!(table.landed(2).is_none());
        }
    }
}
