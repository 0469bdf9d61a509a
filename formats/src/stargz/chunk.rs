//! Decoding and verifying one chunk.

use sha2::{Digest as _, Sha256};

use crate::{
    blobmap::Chunk,
    digest::Digest,
    gzip::{GzipError, decode_member},
    units::{DecodedOffset, RemoteOffset},
};

/// Why a chunk's compressed bytes do not give the chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// They do not decode.
    #[error("chunk at decoded offset {decoded} (blob offset {remote})")]
    Gzip {
        /// The chunk.
        decoded: DecodedOffset,
        /// Where its member starts in the blob; the offsets of `source` count from there.
        remote: RemoteOffset,
        /// What is wrong.
        source: GzipError,
    },
    /// They decode to something else.
    #[error(
        "chunk at decoded offset {decoded} (blob offset {remote}): expected {expected}, got {actual}"
    )]
    Digest {
        /// The chunk.
        decoded: DecodedOffset,
        /// Where its member starts in the blob.
        remote: RemoteOffset,
        /// What the TOC says.
        expected: Digest,
        /// What the bytes hash to.
        actual: Digest,
    },
}

/// Decodes `chunk` from `compressed`, bytes of the blob from [`Chunk::remote`] on and at most up to
/// [`Chunk::remote_end`] (fewer are enough if they hold the chunk), and checks its digest. `out`
/// then holds exactly the chunk; on an error it holds nothing.
pub fn decode_chunk(compressed: &[u8], chunk: &Chunk, out: &mut Vec<u8>) -> Result<(), ChunkError> {
    out.clear();
    // A u32 of bytes: on the 64-bit systems this runs on, it fits.
    out.resize(usize::try_from(chunk.len).unwrap_or(usize::MAX), 0);
    let result = decode_member(compressed, chunk.inner, out)
        .map_err(|source| ChunkError::Gzip {
            decoded: chunk.decoded,
            remote: chunk.remote,
            source,
        })
        .and_then(|()| {
            let actual = Digest::finish(Sha256::new_with_prefix(&*out));
            if actual == chunk.digest {
                return Ok(());
            }
            Err(ChunkError::Digest {
                decoded: chunk.decoded,
                remote: chunk.remote,
                expected: chunk.digest,
                actual,
            })
        });
    if result.is_err() {
        out.clear();
    }
    result
}
