//! Bounds every parser is given: a hostile input costs an error, never memory.

/// Limits for parsing one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Uncompressed size of a TOC or another index.
    pub max_index_bytes: u64,
    /// Entries of one layer.
    pub max_entries: u32,
    /// Bytes of one path.
    pub max_path_bytes: u32,
    /// Components of one path.
    pub max_depth: u32,
    /// Decoded bytes of one chunk: a chunk is held in memory to be verified.
    pub max_chunk_bytes: u32,
    /// Decoded bytes of a member up to the end of a chunk in it: they are decoded to reach it.
    pub max_member_bytes: u64,
    /// Names and values of all xattrs of one inode together.
    pub max_xattr_bytes: u32,
    /// Bytes of one PAX header or GNU long name.
    pub max_extension_bytes: u32,
    /// Decoded bytes of a whole layer.
    pub max_decoded_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_index_bytes: 256 << 20,
            max_entries: 4_000_000,
            max_path_bytes: 4096,
            max_depth: 1024,
            max_chunk_bytes: 64 << 20,
            max_member_bytes: 256 << 20,
            max_xattr_bytes: 64 << 10,
            max_extension_bytes: 1 << 20,
            max_decoded_bytes: 1 << 44,
        }
    }
}
