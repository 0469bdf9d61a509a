//! From the compressed bytes of a member to verified chunks.

use formats::{
    blobmap::Chunk,
    digest::Digest,
    gzip::{GzipError, Inflater},
    stargz::{ChunkError, decode_chunk},
};

use super::bits::index;

/// How a blob's members are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codec {
    /// gzip members (eStargz).
    Gzip,
    /// No compression: a member is its decoded bytes.
    Stored,
}

/// Why a chunk's bytes are not what the index promises.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CorruptError {
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    #[error(transparent)]
    Gzip(#[from] GzipError),
    #[error("the member has {actual} bytes, the chunk ends at {expected}")]
    Short { expected: u64, actual: u64 },
    #[error("digest mismatch: expected {expected}, got {actual}")]
    Digest { expected: Digest, actual: Digest },
}

/// Gives the chunks of one member, one after the other.
pub(crate) enum Member<'a> {
    Stored(&'a [u8]),
    /// A member with one chunk.
    Single(&'a [u8]),
    /// A member that several chunks share is inflated once.
    Shared {
        inflater: Box<Inflater>,
        rest: &'a [u8],
    },
}

impl Codec {
    /// Begins with a member whose bytes `compressed` starts with. Chunks must then be asked for in
    /// order.
    pub(crate) fn member(self, compressed: &[u8], chunks: usize) -> Member<'_> {
        match self {
            Self::Stored => Member::Stored(compressed),
            Self::Gzip if chunks == 1 => Member::Single(compressed),
            Self::Gzip => Member::Shared {
                inflater: Box::new(Inflater::new(u64::MAX)),
                rest: compressed,
            },
        }
    }
}

impl Member<'_> {
    /// Decodes one chunk into `out` and verifies it.
    pub(crate) fn decode(&mut self, chunk: &Chunk, out: &mut Vec<u8>) -> Result<(), CorruptError> {
        match self {
            Self::Single(compressed) => return Ok(decode_chunk(compressed, chunk, out)?),
            Self::Stored(bytes) => {
                let end = chunk.inner.saturating_add(u64::from(chunk.len));
                let part = bytes.get(index(chunk.inner)..index(end));
                out.clear();
                out.extend_from_slice(part.ok_or(CorruptError::Short {
                    expected: end,
                    actual: bytes.len() as u64,
                })?);
            }
            Self::Shared { inflater, rest } => {
                let end = chunk.inner.saturating_add(u64::from(chunk.len));
                out.clear();
                out.resize(index(u64::from(chunk.len)), 0);
                while inflater.produced() < end {
                    let at = inflater.produced();
                    // What lies before the chunk is inflated into the same buffer and overwritten.
                    let room = if at < chunk.inner {
                        let skip = index(chunk.inner - at).min(out.len());
                        &mut out[..skip]
                    } else {
                        &mut out[index(at - chunk.inner)..]
                    };
                    let progress = inflater.inflate(rest, room)?;
                    *rest = &rest[progress.consumed..];
                    if progress.produced == 0 && rest.is_empty() {
                        return Err(CorruptError::Short {
                            expected: end,
                            actual: at,
                        });
                    }
                }
            }
        }
        let actual = Digest::of(out);
        if actual == chunk.digest {
            return Ok(());
        }
        Err(CorruptError::Digest {
            expected: chunk.digest,
            actual,
        })
    }
}
