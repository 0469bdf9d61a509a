//! Where everything lies. Layout 1; a change of any constant here is a new layout version, except
//! that the header page up to the reader slots never changes: the holder reads it whatever comes
//! after.

use std::ops::Range;

/// Version of this layout.
pub(crate) const LAYOUT: u32 = 1;
/// "SDFTABLE", little-endian.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"SDFTABLE");

/// The header page.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Byte offset of the reader slots in the header page.
pub(crate) const READERS_OFFSET: usize = 512;
/// Length of a reader slot: tid, start time, generation, reserved; 8 bytes each.
pub(crate) const READER_BYTES: usize = 32;
/// Reader slots, and landings.
pub(crate) const MAX_READERS: usize = 16;

/// Byte offset of the first landing.
pub(crate) const LANDING_OFFSET: usize = 8192;
/// Length of a landing, the least that the kernel accepts.
pub(crate) const LANDING_BYTES: usize = crate::sys::abi::MIN_READ_BUFFER;

/// Whether tables are made by the thousand: in this crate's unit tests, and when fuzzing.
const SMALL: bool = cfg!(any(test, feature = "fuzzing"));

/// Byte offset of the file-handle table.
pub(crate) const HANDLES_OFFSET: usize = LANDING_OFFSET + MAX_READERS * LANDING_BYTES;
/// Length of a handle: tag, node.
pub(crate) const HANDLE_BYTES: usize = 16;
/// Handles. Few in small tables.
pub(crate) const MAX_HANDLES: usize = if SMALL { 512 } else { 65_536 };

/// Everything before the records; mapped in one piece.
pub(crate) const HEAD_BYTES: usize = HANDLES_OFFSET + MAX_HANDLES * HANDLE_BYTES;
/// Byte offset of the first record.
pub(crate) const RECORDS_OFFSET: usize = HEAD_BYTES;
/// Length of a record.
pub(crate) const RECORD_BYTES: usize = 128;
/// Records added at a time. Few in small tables.
pub(crate) const SEGMENT_RECORDS: usize = if SMALL { 512 } else { 65_536 };
/// Length of a segment of records.
pub(crate) const SEGMENT_BYTES: usize = SEGMENT_RECORDS * RECORD_BYTES;
/// A table has room for a million requests; the kernel sends no more than 65,535 at a time, plus
/// one for each thread that waits in a lookup or an open.
pub(crate) const MAX_SEGMENTS: usize = 16;

const _: () = assert!(RECORDS_OFFSET.is_multiple_of(4096) && LANDING_OFFSET >= HEADER_BYTES);

/// Byte range of a reader's landing.
pub(crate) fn landing(reader: usize) -> Range<usize> {
    let start = LANDING_OFFSET + reader * LANDING_BYTES;
    start..start + LANDING_BYTES
}

/// The header page.
pub(crate) mod header {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{
        HANDLES_OFFSET, LANDING_BYTES, LANDING_OFFSET, LAYOUT, MAGIC, MAX_HANDLES, MAX_READERS,
        MAX_SEGMENTS, READERS_OFFSET, RECORD_BYTES, RECORDS_OFFSET, SEGMENT_RECORDS,
    };
    use crate::{
        sys::{abi, map::SharedMap},
        table::TableError,
    };

    // Word indexes.
    const AT_MAGIC: usize = 0;
    const AT_LAYOUT: usize = 1;
    const AT_GENERATION: usize = 2;
    const AT_SEGMENTS: usize = 3;
    const AT_GEOMETRY: usize = 4;
    const AT_CHECKSUM: usize = 14;
    const AT_INIT_SAVED: usize = 15;
    const AT_INIT_REPLY: usize = 16;
    const AT_INIT_OFFER: usize = 24;
    const AT_INIT_CHECKSUM: usize = 32;
    const AT_FLAGS: usize = 33;

    const HANDLES_LOST: u64 = 1;

    fn geometry() -> [u64; 9] {
        [
            READERS_OFFSET,
            MAX_READERS,
            LANDING_OFFSET,
            LANDING_BYTES,
            HANDLES_OFFSET,
            MAX_HANDLES,
            RECORDS_OFFSET,
            SEGMENT_RECORDS,
            RECORD_BYTES,
        ]
        .map(|n| n as u64)
    }

    fn layout_checksum() -> u64 {
        let fixed = [MAGIC, abi::word(LAYOUT, 0)];
        checksum(fixed.into_iter().chain(geometry()))
    }

    /// FNV-1a over the words' bytes: against torn and foreign memory, not against malice.
    fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
        words
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            })
    }

    pub(crate) fn format(head: &SharedMap) {
        let words = head.words();
        words[AT_LAYOUT].store(abi::word(LAYOUT, 0), Ordering::Relaxed);
        words[AT_GENERATION].store(0, Ordering::Relaxed);
        words[AT_SEGMENTS].store(1, Ordering::Relaxed);
        for (word, value) in words[AT_GEOMETRY..].iter().zip(geometry()) {
            word.store(value, Ordering::Relaxed);
        }
        words[AT_CHECKSUM].store(layout_checksum(), Ordering::Relaxed);
        words[AT_INIT_SAVED].store(0, Ordering::Relaxed);
        words[AT_MAGIC].store(MAGIC, Ordering::Release);
    }

    pub(crate) fn verify(head: &SharedMap) -> Result<(), TableError> {
        let words = head.words();
        let magic = words[AT_MAGIC].load(Ordering::Acquire);
        let layout = abi::low(words[AT_LAYOUT].load(Ordering::Relaxed));
        if magic != MAGIC || layout != LAYOUT {
            return Err(TableError::Unknown { magic, layout });
        }
        let expected = words[AT_CHECKSUM].load(Ordering::Relaxed);
        let stored = words[AT_GEOMETRY..].iter().take(geometry().len());
        let actual = checksum(
            [magic, words[AT_LAYOUT].load(Ordering::Relaxed)]
                .into_iter()
                .chain(stored.map(|w| w.load(Ordering::Relaxed))),
        );
        if expected != actual || actual != layout_checksum() {
            return Err(TableError::Checksum {
                part: "layout",
                expected,
                actual,
            });
        }
        let segments = words[AT_SEGMENTS].load(Ordering::Acquire);
        if segments == 0 || segments > MAX_SEGMENTS as u64 {
            return Err(TableError::Unknown { magic, layout });
        }
        if words[AT_INIT_SAVED].load(Ordering::Acquire) != 0 {
            let expected = words[AT_INIT_CHECKSUM].load(Ordering::Relaxed);
            let actual = checksum(
                words[AT_INIT_REPLY..AT_INIT_CHECKSUM]
                    .iter()
                    .map(|w| w.load(Ordering::Relaxed)),
            );
            if expected != actual {
                return Err(TableError::Checksum {
                    part: "INIT",
                    expected,
                    actual,
                });
            }
        }
        Ok(())
    }

    pub(crate) fn generation(head: &SharedMap) -> &AtomicU64 {
        &head.words()[AT_GENERATION]
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "verified to be at most MAX_SEGMENTS"
    )]
    pub(crate) fn segments(head: &SharedMap) -> usize {
        head.words()[AT_SEGMENTS].load(Ordering::Acquire) as usize
    }

    pub(crate) fn set_segments(head: &SharedMap, count: usize) {
        head.words()[AT_SEGMENTS].store(count as u64, Ordering::Release);
    }

    pub(crate) fn saved_init(head: &SharedMap) -> Option<[u64; 8]> {
        let words = head.words();
        (words[AT_INIT_SAVED].load(Ordering::Acquire) != 0)
            .then(|| std::array::from_fn(|i| words[AT_INIT_REPLY + i].load(Ordering::Relaxed)))
    }

    pub(crate) fn save_init(head: &SharedMap, offer: &[u64; 8], reply: &[u64; 8]) {
        let words = head.words();
        for (i, (offer, reply)) in offer.iter().zip(reply).enumerate() {
            words[AT_INIT_OFFER + i].store(*offer, Ordering::Relaxed);
            words[AT_INIT_REPLY + i].store(*reply, Ordering::Relaxed);
        }
        let sum = checksum(reply.iter().chain(offer).copied());
        words[AT_INIT_CHECKSUM].store(sum, Ordering::Relaxed);
        words[AT_INIT_SAVED].store(1, Ordering::Release);
    }

    pub(crate) fn handles_lost(head: &SharedMap) -> bool {
        head.words()[AT_FLAGS].load(Ordering::Acquire) & HANDLES_LOST != 0
    }

    pub(crate) fn set_handles_lost(head: &SharedMap) {
        head.words()[AT_FLAGS].fetch_or(HANDLES_LOST, Ordering::AcqRel);
    }
}
