//! Where the bytes of a layer's decoded address space come from.

use core::ops::Range;

use crate::{
    digest::Digest,
    units::{ChunkIdx, DecodedOffset, RemoteOffset},
};

/// One independently decodable and verifiable stretch of the decoded address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where its bytes lie in the decoded address space.
    pub decoded: DecodedOffset,
    /// How many decoded bytes it has; never 0.
    pub len: u32,
    /// Start of the compressed member that holds it.
    pub remote: RemoteOffset,
    /// First remote byte certainly not needed to decode it (the next known member, or the index).
    pub remote_end: RemoteOffset,
    /// Decoded bytes to skip inside the member.
    pub inner: u64,
    /// SHA-256 of the decoded bytes.
    pub digest: Digest,
}

impl Chunk {
    /// The decoded range.
    pub fn decoded_range(&self) -> Range<u64> {
        self.decoded.0..self.decoded.0 + u64::from(self.len)
    }

    /// The remote range that is enough to decode it.
    pub fn remote_range(&self) -> Range<u64> {
        self.remote.0..self.remote_end.0
    }
}

/// All chunks of a layer, ordered by both decoded and remote position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobMap {
    chunks: Vec<Chunk>,
    decoded_len: u64,
}

impl BlobMap {
    /// Builds a map. `chunks` must be sorted by decoded offset, must not overlap, and must end
    /// within `decoded_len`; returns `None` otherwise.
    pub fn new(chunks: Vec<Chunk>, decoded_len: u64) -> Option<Self> {
        let mut end = 0;
        for chunk in &chunks {
            if chunk.len == 0 || chunk.decoded.0 < end || chunk.remote_end < chunk.remote {
                return None;
            }
            end = chunk.decoded.0.checked_add(u64::from(chunk.len))?;
        }
        (end <= decoded_len && u32::try_from(chunks.len()).is_ok()).then_some(Self {
            chunks,
            decoded_len,
        })
    }

    /// Length of the decoded address space: the size of the cache file and of the EROFS device.
    pub fn decoded_len(&self) -> u64 {
        self.decoded_len
    }

    /// All chunks in decoded order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// One chunk.
    pub fn chunk(&self, index: ChunkIdx) -> Option<&Chunk> {
        self.chunks.get(index.index())
    }

    /// The chunks that overlap a decoded range. Gaps between chunks read as zeros by definition.
    pub fn overlapping(&self, range: Range<u64>) -> Range<usize> {
        let first = self
            .chunks
            .partition_point(|c| c.decoded.0 + u64::from(c.len) <= range.start);
        let last = self.chunks.partition_point(|c| c.decoded.0 < range.end);
        first..last.max(first)
    }
}
