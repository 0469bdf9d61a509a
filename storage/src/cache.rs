//! The range-request cache: the hot path of lazy layers.
//!
//! # On disk
//!
//! One folder per layer identity (layer digest, format, index digest), given by the caller:
//!
//! | file | what it is |
//! |---|---|
//! | `wire` | sparse; the compressed blob, each byte at its own offset, as fetched |
//! | `wire.map` | one bit per 4 KiB block of `wire` |
//! | `data` | sparse; the decoded address space, the EROFS device |
//! | `data.map` | one bit per chunk of `data` |
//! | `proof.json` | the outcome of the ordered pass, see [`crate::hydrate`] |
//! | `clean` | there after a clean close |
//!
//! A bit reaches disk only after the data it speaks of: copy the bits, fdatasync the data, write
//! the map, fdatasync the map. So after any stop, clean or not, what the maps on disk say is true;
//! at worst the last second of work is fetched or decoded again. A map whose header is not exactly
//! the expected one (another identity, another chunk table, damage) is removed and the cache
//! starts empty. A test replays power loss at any point of the recorded sequence of writes, sector by
//! sector, with failing syncs among them (`crash.rs`).
//!
//! The wire bytes are kept until the ordered pass is over (ADR 0001): the pass then costs no
//! second fetch, a restart resumes from them, and the order of fetching is free.
//!
//! # In memory
//!
//! [`Wire`] knows blocks and fetches. Anybody asks it for ranges; it fetches what is missing and
//! not on its way. [`LayerBlob`] knows chunks: who waits for which, what is being decoded. Both
//! keep their tables under a short lock that is never held over I/O. Chunks of one gzip member
//! form a group, the unit of decoding. The life of a group:
//!
//! ```text
//! absent ──reader──► waiting for wire ──last block arrived──► queued ──► decoding ──► present
//!    │                       ▲                                  ▲           │
//!    └──bytes came along─────│──────────────────────────────────┘           │ digest mismatch, once:
//!                            └──────────────── forget its blocks, fetch ────┘ again; then EIO
//! ```
//!
//! Concurrent readers of a group share one entry: one fetch, one inflate. Dropping a reader's
//! future drops a channel end and nothing else. A reader of local bytes tests bits and calls
//! pread; it takes no lock and allocates nothing.
//!
//! # Who goes first
//!
//! Requests for readers go out at once, bounded per layer. What comes along in the same windows is
//! decoded when no reader's chunk waits. Start lists and hydration are admitted by the node's
//! [`Scheduler`]. Inflating and hashing runs on a bounded pool that never waits for the network.
//!
//! # A disk that takes nothing
//!
//! A write that fails costs no reader an error: while the disk counts as full, groups go from
//! absent or queued to *memory*, are fetched past the wire, verified, and served from a bounded
//! store that the node's layers share. Bits are set for nothing that did not land. A failed sync
//! takes back every bit that was not durable before it.
//!
//! # What is never done
//!
//! No byte is served before its chunk's digest matched; no hole is ever read as zeros (a short
//! file is an error); nothing is retried for ever: an error names layer, chunk, offsets and
//! digests, and the next read tries again.

mod bits;
mod chunks;
mod codec;
mod counters;
#[cfg(test)]
mod crash;
mod disk;
pub(crate) mod files;
mod index;
mod layer;
mod mapfile;
mod memory;
mod plan;
mod pool;
mod readahead;
mod scheduler;
mod status;
mod store;
mod touched;
mod unstored;
mod wire;

use std::time::Duration;

pub(crate) use self::bits::index as to_index;
pub use self::{
    codec::Codec,
    counters::{Event, Traffic, TrafficByCause},
    index::{IndexError, RawToc},
    layer::{CacheOptions, LayerBlob, OpenError, Verify},
    plan::PlanOptions,
    scheduler::{DiskReport, Scheduler, SchedulerOptions},
    status::{Status, WaitingChunk},
    wire::{Wire, WireOptions},
};

/// How long what was fetched or decoded may be lost in a crash.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
