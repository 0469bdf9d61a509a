//! The one trait through which presenters (`fuse`, later `blockdev`) see a blob's bytes.

use std::{future::Future, io, pin::Pin, sync::Arc};

/// A boxed future that may be sent between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Answer to [`BlobSource::try_read`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadNow {
    /// That many bytes were copied (short only at the end of the blob).
    Ready(usize),
    /// Some of the range is not local yet: call [`BlobSource::ensure`], then read again.
    Pending,
}

/// Why bytes are fetched. Every fetched byte is counted under one cause; demand pre-empts
/// prefetch pre-empts hydration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Footers, indexes, manifests: needed before a mount.
    Metadata,
    /// A reader waits for it.
    Demand,
    /// A start list (landmark) names it.
    Prefetch,
    /// The ordered pass over the whole layer.
    Hydration,
}

/// Why a range cannot be served. The reader sees `errno`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// The errno a reader gets (EIO unless something better is known).
    pub errno: i32,
    /// Names layer and offset and says what was tried.
    pub message: String,
}

/// The decoded bytes of one layer (or of a virtual disk), filled on demand.
pub trait BlobSource: Send + Sync + 'static {
    /// Length of the decoded address space in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `[offset, offset + buf.len())` if all of it is local and verified. Never waits for
    /// the network; may do local file I/O.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow>;

    /// Completes when `[offset, offset + len)` is local and verified, or cannot be served.
    /// Dropping the future does not cancel a fetch others wait for.
    fn ensure(
        self: Arc<Self>,
        offset: u64,
        len: u64,
        cause: Cause,
    ) -> BoxFuture<'static, Result<(), SourceError>>;
}
