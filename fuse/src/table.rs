//! The shared memory in which every request is recorded before it is worked on.
//!
//! One memfd per session, made by the holder, mapped by the daemon. What a killed daemon leaves in
//! it is enough for the next one to answer every request that the kernel still waits for; the
//! order of the stores is what makes that true, and `model` (tests) tries every place to die.
//! docs/transport.md draws it byte by byte.

mod fence;
mod handles;
pub(crate) mod layout;
mod records;
pub(crate) mod steps;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{OnceLock, atomic::Ordering},
};

use parking_lot::Mutex;

pub(crate) use fence::Fence;
pub(crate) use handles::Granted;
pub(crate) use records::{RecordIndex, Request, boottime_ns};

use crate::sys::map::{SharedMap, WORD};
use layout::{
    HEAD_BYTES, HEADER_BYTES, MAX_READERS, MAX_SEGMENTS, RECORDS_OFFSET, SEGMENT_BYTES, header,
};

/// Why a table cannot be used. The session then goes on with a new table and a RESEND.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The file is too short for what its header says.
    #[error("the table has {actual} bytes, its header says {expected}")]
    Truncated {
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },
    /// Not a table, or one of a layout this version does not know.
    #[error("magic {magic:#018x} with layout {layout} is no table known here")]
    Unknown {
        /// First word.
        magic: u64,
        /// Layout version.
        layout: u32,
    },
    /// A checksum does not match.
    #[error("the {part} checksum is {actual:#018x}, the table says {expected:#018x}")]
    Checksum {
        /// Which part.
        part: &'static str,
        /// Stored.
        expected: u64,
        /// Computed.
        actual: u64,
    },
    /// A record is in no state that exists.
    #[error("record {index} has state {state:#x} in generation {generation}")]
    Record {
        /// Its index.
        index: u32,
        /// The state word.
        state: u64,
        /// The generation of the table.
        generation: u64,
    },
    /// It could not be mapped.
    #[error("map the table")]
    Map(#[from] io::Error),
}

/// The table of one session in the hands of the daemon that serves it.
#[derive(Debug)]
pub(crate) struct Table {
    fd: OwnedFd,
    head: SharedMap,
    segments: [OnceLock<SharedMap>; MAX_SEGMENTS],
    generation: u64,
    records: Mutex<records::Free>,
    handles: Mutex<handles::Free>,
}

impl Table {
    /// Maps and verifies a table that this process now owns under `generation`.
    pub(crate) fn open(fd: OwnedFd, generation: u64) -> Result<Self, TableError> {
        let actual = size(fd.as_fd())?;
        check_size(HEAD_BYTES as u64, actual)?;
        let head = SharedMap::new(&fd, 0, HEAD_BYTES)?;
        header::verify(&head)?;
        let count = header::segments(&head);
        check_size(
            RECORDS_OFFSET as u64 + count as u64 * SEGMENT_BYTES as u64,
            actual,
        )?;
        let table = Self {
            fd,
            head,
            segments: [const { OnceLock::new() }; MAX_SEGMENTS],
            generation,
            records: Mutex::default(),
            handles: Mutex::default(),
        };
        for index in 0..count {
            table.map_segment(index)?;
        }
        table.find_free_records()?;
        table.find_free_handles();
        Ok(table)
    }

    /// Makes the landing of a reader present and locks it, so that the kernel's copy into it
    /// cannot fault. False: populated, but the memlock limit forbids locking it.
    pub(crate) fn prepare_landing(&self, reader: usize) -> bool {
        if cfg!(feature = "must-fail") {
            return true;
        }
        let range = layout::landing(reader);
        if let Err(e) = self.head.populate(range.clone()) {
            // Before 5.14 there is no call for it; a store does it page by page. The last word of
            // a page is never part of a request (those are shorter).
            for page in range.clone().step_by(4096) {
                self.head.words()[(page + 4096) / WORD - 1].store(0, Ordering::Relaxed);
            }
            tracing::debug!(error = %e, "landing populated by hand");
        }
        self.head.lock(range).is_ok()
    }

    /// The memory that holds the header and the landings.
    pub(crate) fn head(&self) -> &SharedMap {
        &self.head
    }

    /// The generation this daemon serves under.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The file, to give it to a new holder.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The INIT reply that was sent, or is about to be.
    pub(crate) fn saved_init(&self) -> Option<[u64; 8]> {
        header::saved_init(&self.head)
    }

    /// Saves the INIT reply (and what the kernel had offered) before it is sent.
    pub(crate) fn save_init(&self, offered: &[u64; 8], reply: &[u64; 8]) {
        header::save_init(&self.head, offered, reply);
    }

    /// Whether handles given out by a former daemon are unknown, because its table was lost.
    pub(crate) fn handles_lost(&self) -> bool {
        header::handles_lost(&self.head)
    }

    /// Notes that handles given out before are unknown from now on.
    pub(crate) fn set_handles_lost(&self) {
        header::set_handles_lost(&self.head);
    }

    fn map_segment(&self, index: usize) -> io::Result<()> {
        let offset = (RECORDS_OFFSET + index * SEGMENT_BYTES) as u64;
        let map = SharedMap::new(&self.fd, offset, SEGMENT_BYTES)?;
        let slot = self
            .segments
            .get(index)
            .ok_or_else(|| io::Error::other("more segments than a table can have"))?;
        // Only one thread maps a given segment: the one that opens, or grows under the lock.
        slot.get_or_init(|| map);
        Ok(())
    }
}

/// Makes an empty memfd a table of generation 0. The holder does this: the pages are then charged
/// to it and not to a daemon that comes and goes.
pub(crate) fn format(fd: BorrowedFd<'_>) -> io::Result<()> {
    let len = (RECORDS_OFFSET + SEGMENT_BYTES) as u64;
    allocate(fd, 0, len)?;
    rustix::fs::fcntl_add_seals(fd, rustix::fs::SealFlags::SHRINK)?;
    let head = SharedMap::new(fd, 0, HEADER_BYTES)?;
    header::format(&head);
    Ok(())
}

fn allocate(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    rustix::fs::fallocate(fd, rustix::fs::FallocateFlags::empty(), offset, len)?;
    Ok(())
}

fn size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::fstat(fd)?;
    u64::try_from(stat.st_size).map_err(io::Error::other)
}

fn check_size(expected: u64, actual: u64) -> Result<(), TableError> {
    if actual < expected {
        return Err(TableError::Truncated { expected, actual });
    }
    Ok(())
}

/// Most reader threads a table has room for.
pub(crate) const READERS: usize = MAX_READERS;

#[cfg(any(test, feature = "fuzzing"))]
#[expect(clippy::unwrap_used, reason = "for tests and fuzzing only")]
pub(crate) fn scratch() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("table", flags).unwrap();
    format(fd.as_fd()).unwrap();
    fd
}

#[cfg(test)]
mod model;
