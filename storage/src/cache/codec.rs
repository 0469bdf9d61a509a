//! From the compressed bytes of a member to verified chunks.

use formats::{
    blobmap::Chunk,
    digest::Digest,
    gzip::{GzipError, Inflater},
};
use libdeflater::Decompressor;

use super::{bits::index, pool::room};

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
    Gzip(#[from] GzipError),
    #[error("the member has {actual} bytes, the chunk ends at {expected}")]
    Short { expected: u64, actual: u64 },
    #[error("digest mismatch: expected {expected}, got {actual}")]
    Digest { expected: Digest, actual: Digest },
}

/// Members up to this size are decoded in one go.
const WHOLE_MAX: u64 = 16 << 20;
/// Behind the payload a member holds padding and the headers of what follows in the tar: usually
/// much less than this. Where it is more, the member is decoded as a stream.
const TAIL: usize = 64 << 10;

/// The decoded bytes of one member, as far as its chunks need them.
pub(crate) enum Member<'a> {
    /// All of them.
    Whole(&'a [u8]),
    /// To be inflated chunk by chunk, in order.
    Stream {
        inflater: Box<Inflater>,
        rest: &'a [u8],
    },
}

impl Codec {
    /// Decodes the member that `compressed` begins with, which holds `chunks`.
    pub(crate) fn open<'a>(
        self,
        compressed: &'a [u8],
        chunks: &[Chunk],
        decompressor: &mut Decompressor,
        decoded: &'a mut Vec<u8>,
    ) -> Member<'a> {
        if self == Self::Stored {
            return Member::Whole(compressed);
        }
        let ends = chunks
            .iter()
            .map(|c| c.inner.saturating_add(u64::from(c.len)));
        let needed = ends.max().unwrap_or(0);
        if needed <= WHOLE_MAX {
            let out = room(decoded, index(needed) + TAIL);
            // libdeflate knows whole members only, and it is twice as fast. What it refuses may
            // still hold the chunks: a longer tail, damage behind them.
            if let Ok(produced) = decompressor.gzip_decompress(compressed, out)
                && produced as u64 >= needed
            {
                return Member::Whole(&decoded[..produced]);
            }
        }
        Member::Stream {
            inflater: Box::new(Inflater::new(u64::MAX)),
            rest: compressed,
        }
    }
}

impl Member<'_> {
    /// One chunk, verified. `piece` is room for it. Chunks must be asked for in order.
    pub(crate) fn chunk<'a>(
        &'a mut self,
        chunk: &Chunk,
        piece: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], CorruptError> {
        let end = chunk.inner.saturating_add(u64::from(chunk.len));
        let bytes: &[u8] = match self {
            Self::Whole(bytes) => {
                bytes
                    .get(index(chunk.inner)..index(end))
                    .ok_or(CorruptError::Short {
                        expected: end,
                        actual: bytes.len() as u64,
                    })?
            }
            Self::Stream { inflater, rest } => {
                let out = room(piece, index(u64::from(chunk.len)));
                while inflater.produced() < end {
                    let at = inflater.produced();
                    // What lies before the chunk is inflated into the same room and overwritten.
                    let space = if at < chunk.inner {
                        let skip = index(chunk.inner - at).min(out.len());
                        &mut out[..skip]
                    } else {
                        &mut out[index(at - chunk.inner)..]
                    };
                    let progress = inflater.inflate(rest, space)?;
                    *rest = &rest[progress.consumed..];
                    if progress.produced == 0 && rest.is_empty() {
                        return Err(CorruptError::Short {
                            expected: end,
                            actual: at,
                        });
                    }
                }
                out
            }
        };
        let actual = Digest::of(bytes);
        if actual == chunk.digest {
            return Ok(bytes);
        }
        Err(CorruptError::Digest {
            expected: chunk.digest,
            actual,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use formats::units::{DecodedOffset, RemoteOffset};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let mut out = vec![0; compressor.gzip_compress_bound(bytes.len())];
        let len = compressor.gzip_compress(bytes, &mut out).unwrap();
        out.truncate(len);
        out
    }

    fn chunk(bytes: &[u8], inner: usize, len: usize) -> Chunk {
        Chunk {
            decoded: DecodedOffset(inner as u64),
            len: u32::try_from(len).unwrap(),
            remote: RemoteOffset(0),
            remote_end: RemoteOffset(1 << 30),
            inner: inner as u64,
            digest: Digest::of(&bytes[inner..inner + len]),
        }
    }

    #[test]
    fn whole_and_streamed_members_give_the_same_chunks() {
        let mut bytes = Vec::new();
        for n in 0_u32..100_000 {
            write!(bytes, "{n},").unwrap();
        }
        for (tail, follower) in [(0, false), (TAIL - 1, true), (TAIL + 1, true)] {
            let end = bytes.len() - tail;
            let chunks = [
                chunk(&bytes, 7, 100),
                chunk(&bytes, 200_000, 90_000),
                chunk(&bytes, 300_000, end - 300_000),
            ];
            let mut compressed = gzip(&bytes);
            if follower {
                compressed.extend(gzip(b"another member, then something else"));
                compressed.extend(b"junk");
            }
            let (mut decoded, mut piece) = (Vec::new(), Vec::new());
            let mut decompressor = Decompressor::new();
            let mut member =
                Codec::Gzip.open(&compressed, &chunks, &mut decompressor, &mut decoded);
            assert_eq!(matches!(member, Member::Whole(_)), tail <= TAIL);
            for c in &chunks {
                let at = index(c.inner);
                let got = member.chunk(c, &mut piece).unwrap();
                assert!(got == &bytes[at..at + c.len as usize]);
            }
        }
    }

    #[test]
    fn damage_is_an_error_and_damage_behind_the_chunk_is_not() {
        let bytes = vec![b'x'; 50_000];
        let chunks = [chunk(&bytes, 0, 40_000)];
        let honest = gzip(&bytes);
        let mut decompressor = Decompressor::new();
        let mut decode = |compressed: &[u8]| {
            let (mut decoded, mut piece) = (Vec::new(), Vec::new());
            let mut member = Codec::Gzip.open(compressed, &chunks, &mut decompressor, &mut decoded);
            member.chunk(&chunks[0], &mut piece).map(<[u8]>::to_vec)
        };
        assert!(decode(&honest).is_ok());
        let mut trailer = honest.clone();
        *trailer.last_mut().unwrap() ^= 1;
        assert!(decode(&trailer).is_ok());
        assert!(decode(&honest[..honest.len() / 2]).is_err());
        assert!(decode(b"").is_err());
        let mut body = honest.clone();
        body[14] ^= 0x40;
        assert!(decode(&body).is_err());
        assert!(decode(&gzip(&vec![b'y'; 50_000])).is_err());
    }
}
