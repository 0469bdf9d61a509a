//! Newtypes for the two address spaces of a layer, so that they cannot be mixed up.

use core::fmt;

/// A byte offset in the remote (compressed) blob, as the registry serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteOffset(pub u64);

/// A byte offset in a layer's decoded address space (the cache file, the EROFS device).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DecodedOffset(pub u64);

/// Index of a chunk in a [`BlobMap`](crate::blobmap::BlobMap).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIdx(pub u32);

impl fmt::Display for RemoteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for DecodedOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl ChunkIdx {
    /// The index as a `usize`.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
