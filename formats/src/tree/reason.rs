//! Why entries make no tree, or one that an index cannot represent.

use crate::tree::TreePath;

/// Why a layer cannot be served from its index alone and needs an ordinary unpack. No fault of the
/// image: an index of this kind cannot represent the layer, or does not bind its bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotLazyReason {
    /// A name, link target or xattr name that an index cannot hold byte for byte.
    #[error("{path}: {field} is not UTF-8 or holds U+FFFD, which an index writes for what is not")]
    NotText {
        /// The entry.
        path: TreePath,
        /// Which of its strings.
        field: &'static str,
    },
    /// Two entries of one name that are not both directories.
    #[error("{path}: the layer has more than one entry of this name")]
    Duplicate {
        /// The name.
        path: TreePath,
    },
    /// A hard link to something that is not an earlier non-directory of the layer.
    #[error("{path}: hard link to {target}, which is no earlier file of the layer")]
    HardLinkTarget {
        /// The link.
        path: TreePath,
        /// What it names.
        target: TreePath,
    },
    /// A path that leads through something that is not a directory.
    #[error("{path}: a parent is not a directory")]
    ParentNotDirectory {
        /// The entry.
        path: TreePath,
    },
    /// A name that no file can have, or one that whiteouts reserve.
    #[error("{path}: {why}")]
    Name {
        /// The entry.
        path: TreePath,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An xattr that overlayfs would take for its own.
    #[error("{path}: carries the overlayfs xattr {key}")]
    OverlayXattr {
        /// The entry.
        path: TreePath,
        /// The xattr.
        key: String,
    },
    /// A device number the kernel has no room for.
    #[error("{path}: device number {major}:{minor} does not exist")]
    DeviceNumber {
        /// The entry.
        path: TreePath,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// An entry type that this version does not know.
    #[error("{path}: unknown entry type {kind:?}")]
    UnknownType {
        /// The entry.
        path: TreePath,
        /// The type as the stream or index spells it.
        kind: String,
    },
    /// A sparse file of a tar archive.
    #[error("{path}: sparse file")]
    Sparse {
        /// The entry.
        path: TreePath,
    },
    /// No digest speaks for these bytes.
    #[error("{path}: the index has no digest for the chunk at {file_offset}")]
    NoChunkDigest {
        /// The file.
        path: TreePath,
        /// Where in the file.
        file_offset: u64,
    },
    /// A digest of another algorithm than SHA-256.
    #[error("{path}: the index has an unsupported digest for the chunk at {file_offset}")]
    UnsupportedDigest {
        /// The file.
        path: TreePath,
        /// Where in the file.
        file_offset: u64,
    },
    /// A chunk larger than this node verifies in memory.
    #[error("{path}: the chunk at {file_offset} has {len} bytes, the limit is {limit}")]
    ChunkTooLarge {
        /// The file.
        path: TreePath,
        /// Where in the file.
        file_offset: u64,
        /// Its decoded length, or the decoded length of its member up to its end.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A stargz layer of the first generation, whose index carries no trust.
    #[error("legacy stargz: its index has no digests that a manifest binds")]
    LegacyFormat,
    /// The index is in another image, which this version does not read.
    #[error("the index is stored outside the layer")]
    ExternalToc,
}

/// Why an entry was not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The layer cannot be represented by an index (and for some reasons not at all).
    #[error(transparent)]
    NotLazy(#[from] NotLazyReason),
    /// A limit was passed.
    #[error("{path}: {what} {actual} passes the limit of {limit}")]
    Limit {
        /// The entry.
        path: TreePath,
        /// What was counted.
        what: &'static str,
        /// Its value.
        actual: u64,
        /// The bound.
        limit: u64,
    },
}
