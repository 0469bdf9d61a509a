//! The seam between whoever can deliver ranges of a blob (a registry, a local file, memory) and
//! whoever keeps them (the cache).
//!
//! A source delivers exactly what its [`RangeBody`] announces, or an error: [`RangeBody`] itself
//! counts, so that a short or long stream of any source is caught here. What is *in* the bytes is
//! not checked here: verification by digest is the receiver's.

use std::{
    error::Error,
    fmt::{self, Write as _},
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use formats::digest::Digest;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};

pub use self::verified::VerifiedBody;
use crate::source::{BoxFuture, Cause};

mod verified;

/// Something that can deliver any range of one blob.
pub trait RangeSource: Send + Sync + 'static {
    /// Length of the blob in bytes, as its descriptor states it.
    fn len(&self) -> u64;

    /// Whether the blob has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the blob comes from, for errors and logs (`registry/repository@digest`, a path).
    fn origin(&self) -> String;

    /// Starts a fetch of `range` (not empty, within the blob). The body may deliver *more* than
    /// was asked for, and may begin earlier: [`RangeBody::range`] tells. Completes when the source
    /// has accepted the request; transient failures have then been retried already, and so they
    /// are while the body is read. Dropping the body gives the fetch up.
    fn fetch(
        &self,
        range: Range<u64>,
        cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>>;
}

/// What went wrong with a fetch, coarsely: what to do about it depends on this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FetchFailure {
    /// No answer, or the connection broke: worth another try later.
    Unreachable,
    /// The source asks to be left alone for a while, or is failing (408, 429, 5xx).
    Busy,
    /// No or wrong credentials (401, 403).
    Denied,
    /// The source does not have the blob (404, 410).
    Missing,
    /// The source says something that contradicts the descriptor or the protocol.
    Invalid,
    /// Local I/O failed.
    Local,
}

/// Why a range could not be fetched.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The caller asked for bytes that the blob does not have, or for none.
    #[error("bytes {}..{} of {origin} were asked for, which has {len} bytes", range.start, range.end)]
    OutOfBounds {
        /// The blob.
        origin: String,
        /// What was asked for.
        range: Range<u64>,
        /// Length of the blob.
        len: u64,
    },
    /// The source delivered fewer or more bytes than it announced.
    #[error("{origin} announced bytes {}..{} but delivered up to {reached}", range.start, range.end)]
    Length {
        /// The blob.
        origin: String,
        /// What was announced.
        range: Range<u64>,
        /// Offset that the delivered bytes reached.
        reached: u64,
    },
    /// The blob is larger than what may be held in memory.
    #[error("{origin} has {len} bytes, at most {limit} are read into memory")]
    TooLarge {
        /// The blob.
        origin: String,
        /// Its length.
        len: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A whole blob is not what its digest says.
    #[error("{origin} has digest {actual} instead of {expected}")]
    Digest {
        /// The blob.
        origin: String,
        /// What it should be.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
    /// The source failed for good, or its retries are used up.
    #[error("cannot fetch bytes {}..{} of {origin}", range.start, range.end)]
    Source {
        /// The blob.
        origin: String,
        /// What was asked for; its start is the first byte not delivered.
        range: Range<u64>,
        /// What kind of failure it is.
        failure: FetchFailure,
        /// The error of the source.
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
}

impl FetchError {
    /// What kind of failure it is.
    pub fn failure(&self) -> FetchFailure {
        match self {
            Self::OutOfBounds { .. }
            | Self::Length { .. }
            | Self::TooLarge { .. }
            | Self::Digest { .. } => FetchFailure::Invalid,
            Self::Source { failure, .. } => *failure,
        }
    }

    /// Whether the same fetch may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.failure(),
            FetchFailure::Unreachable | FetchFailure::Busy
        )
    }

    /// The error and all its sources in one line, as a reader's log wants it.
    pub fn report(&self) -> String {
        report(self)
    }
}

/// An error and all its sources, joined by `: `.
pub fn report(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a String cannot fail.
        let _ = write!(line, ": {error}");
        source = error.source();
    }
    line
}

/// What a fetch has cost so far. Counted by the source, read by the receiver.
#[derive(Debug, Default)]
pub struct Meter {
    requests: AtomicU64,
    wire_bytes: AtomicU64,
}

impl Meter {
    /// Counts one request sent.
    pub fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts body bytes received, including those that are thrown away.
    pub fn add_bytes(&self, bytes: u64) {
        self.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Requests sent so far: more than one after retries, redirects or resumption.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Body bytes received so far.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }
}

/// The bytes of one fetch, in order.
pub struct RangeBody {
    origin: String,
    range: Range<u64>,
    position: u64,
    meter: Arc<Meter>,
    chunks: BoxStream<'static, Result<Bytes, FetchError>>,
    failed: bool,
}

impl RangeBody {
    /// A body that delivers `range` of `origin` from `chunks`. `chunks` may be cut in any way but
    /// must hold the bytes of `range` in order, all of them and no more.
    pub fn new(
        origin: String,
        range: Range<u64>,
        meter: Arc<Meter>,
        chunks: BoxStream<'static, Result<Bytes, FetchError>>,
    ) -> Self {
        Self {
            origin,
            position: range.start,
            range,
            meter,
            chunks,
            failed: false,
        }
    }

    /// The range of the blob that this body delivers: it contains the range asked for.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Offset in the blob of the byte that the next chunk starts with.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// What the fetch has cost so far.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The next bytes, never empty; `None` when all of [`Self::range`] has been delivered. After
    /// an error there is nothing more: fetch again from [`Self::position`].
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        if self.failed {
            return Err(self.length_error(self.position));
        }
        let result = self.next_checked().await;
        self.failed = result.is_err();
        result
    }

    async fn next_checked(&mut self) -> Result<Option<Bytes>, FetchError> {
        if self.position == self.range.end {
            return Ok(None);
        }
        while let Some(chunk) = self.chunks.next().await {
            let chunk = chunk?;
            if chunk.is_empty() {
                continue;
            }
            let reached = self.position.saturating_add(chunk.len() as u64);
            if reached > self.range.end {
                return Err(self.length_error(reached));
            }
            self.position = reached;
            return Ok(Some(chunk));
        }
        Err(self.length_error(self.position))
    }

    /// All bytes of `wanted`, in memory. `wanted` must lie within what is still to be delivered.
    pub async fn collect(mut self, wanted: Range<u64>) -> Result<Bytes, FetchError> {
        if wanted.start < self.position || wanted.end > self.range.end {
            return Err(FetchError::OutOfBounds {
                origin: self.origin,
                range: wanted,
                len: self.range.end,
            });
        }
        let mut out = BytesMut::new();
        while self.position < wanted.end {
            let start = self.position;
            let Some(chunk) = self.next_chunk().await? else {
                break;
            };
            // Both offsets into the chunk are at most its length, a usize.
            let clip = |offset: u64| {
                usize::try_from(offset.saturating_sub(start))
                    .unwrap_or(usize::MAX)
                    .min(chunk.len())
            };
            let part = chunk.slice(clip(wanted.start)..clip(wanted.end));
            if out.is_empty() && part.len() as u64 == wanted.end - wanted.start {
                return Ok(part);
            }
            out.extend_from_slice(&part);
        }
        Ok(out.freeze())
    }

    fn length_error(&self, reached: u64) -> FetchError {
        FetchError::Length {
            origin: self.origin.clone(),
            range: self.range.clone(),
            reached,
        }
    }
}

impl fmt::Debug for RangeBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeBody")
            .field("origin", &self.origin)
            .field("range", &self.range)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// Checks a range that is about to be fetched from a blob of `len` bytes.
pub fn check_bounds(origin: &str, range: &Range<u64>, len: u64) -> Result<(), FetchError> {
    if range.start >= range.end || range.end > len {
        return Err(FetchError::OutOfBounds {
            origin: origin.to_owned(),
            range: range.clone(),
            len,
        });
    }
    Ok(())
}

/// How much [`FileSource`] reads at a time.
const FILE_CHUNK_BYTES: u64 = 1 << 20;

/// A blob that is a local file (an OCI layout, a content store).
#[derive(Clone, Debug)]
pub struct FileSource {
    path: PathBuf,
    file: Arc<File>,
    len: u64,
}

impl FileSource {
    /// Opens the file at `path`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path)?;
        let len = file.metadata()?.len();
        Ok(Self {
            path,
            file: Arc::new(file),
            len,
        })
    }
}

impl RangeSource for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        let (origin, file, len) = (self.origin(), Arc::clone(&self.file), self.len);
        Box::pin(async move {
            check_bounds(&origin, &range, len)?;
            let meter = Arc::new(Meter::default());
            meter.add_request();
            let state = (range.clone(), origin.clone(), file, Arc::clone(&meter));
            let chunks = stream::try_unfold(state, |(rest, origin, file, meter)| async move {
                if rest.is_empty() {
                    return Ok(None);
                }
                let chunk = read_file_chunk(Arc::clone(&file), rest.clone())
                    .await
                    .map_err(|source| FetchError::Source {
                        origin: origin.clone(),
                        range: rest.clone(),
                        failure: FetchFailure::Local,
                        source: Arc::new(source),
                    })?;
                let read = chunk.len() as u64;
                meter.add_bytes(read);
                let rest = rest.start + read..rest.end;
                Ok(Some((chunk, (rest, origin, file, meter))))
            });
            Ok(RangeBody::new(origin, range, meter, chunks.boxed()))
        })
    }
}

async fn read_file_chunk(file: Arc<File>, rest: Range<u64>) -> io::Result<Bytes> {
    let want = FILE_CHUNK_BYTES.min(rest.end - rest.start);
    tokio::task::spawn_blocking(move || {
        let want = usize::try_from(want).map_err(io::Error::other)?;
        let mut buf = vec![0; want];
        file.read_exact_at(&mut buf, rest.start)?;
        Ok(Bytes::from(buf))
    })
    .await
    .map_err(io::Error::other)?
}

/// A blob that is in memory: small blobs, and tests.
#[derive(Clone, Debug)]
pub struct MemorySource {
    origin: String,
    bytes: Bytes,
}

impl MemorySource {
    /// A blob of these bytes; `origin` names it in errors.
    pub fn new(origin: impl Into<String>, bytes: impl Into<Bytes>) -> Self {
        Self {
            origin: origin.into(),
            bytes: bytes.into(),
        }
    }
}

impl RangeSource for MemorySource {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        let Self { origin, bytes } = self.clone();
        Box::pin(async move {
            check_bounds(&origin, &range, bytes.len() as u64)?;
            let meter = Arc::new(Meter::default());
            meter.add_request();
            meter.add_bytes(range.end - range.start);
            // Within the length of `bytes`, a usize, as just checked.
            let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            let part = bytes.slice(index(range.start)..index(range.end));
            let chunks = stream::once(async move { Ok(part) }).boxed();
            Ok(RangeBody::new(origin, range, meter, chunks))
        })
    }
}

#[cfg(test)]
mod tests;
