//! From the compressed bytes of a member to verified chunks.

use formats::{blobmap::Chunk, digest::Digest};

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
    #[error("{0}")]
    Decode(String),
    #[error("digest mismatch: expected {expected}, got {actual}")]
    Digest { expected: Digest, actual: Digest },
}

impl Codec {
    /// Decodes one chunk of the member that `compressed` begins with into `out` (cleared first)
    /// and verifies it.
    pub(crate) fn decode(
        self,
        compressed: &[u8],
        chunk: &Chunk,
        out: &mut Vec<u8>,
    ) -> Result<(), CorruptError> {
        out.clear();
        match self {
            Self::Gzip => Err(CorruptError::Decode(
                "gzip members cannot be decoded yet: formats::stargz is missing".to_owned(),
            )),
            Self::Stored => {
                let end = chunk.inner.saturating_add(u64::from(chunk.len));
                let range = super::bits::index(chunk.inner)..super::bits::index(end);
                let Some(bytes) = compressed.get(range) else {
                    return Err(CorruptError::Decode(format!(
                        "member has {} bytes, chunk ends at {end}",
                        compressed.len()
                    )));
                };
                out.extend_from_slice(bytes);
                verify(chunk, out)
            }
        }
    }
}

fn verify(chunk: &Chunk, decoded: &[u8]) -> Result<(), CorruptError> {
    let actual = Digest::of(decoded);
    if actual == chunk.digest {
        Ok(())
    } else {
        Err(CorruptError::Digest {
            expected: chunk.digest,
            actual,
        })
    }
}
