//! Fetching a layer's index: one request for the end of the blob, sized by a guess.

use std::{io, ops::Range};

use formats::{
    limits::Limits,
    stargz::{FooterError, FooterKind, MAX_FOOTER_LEN, TocError, inflate_toc, parse_footer},
    tree::NotLazyReason,
    units::RemoteOffset,
};

use super::{bits::index, wire::Wire};
use crate::{ranges::FetchError, source::Cause};

/// The index of an eStargz layer as it lies in the blob, not yet checked against any digest.
#[derive(Clone, Debug)]
pub struct RawToc {
    /// The JSON, exactly as in the tar entry: what the TOC digest is taken over.
    pub json: Vec<u8>,
    /// Where the TOC's member begins.
    pub toc_offset: RemoteOffset,
}

/// Why a layer's index cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The end of the blob could not be fetched.
    #[error("{layer}: cannot fetch the index")]
    Fetch {
        /// The layer.
        layer: String,
        /// What failed.
        #[source]
        source: FetchError,
    },
    /// The blob does not end in a footer.
    #[error("{layer}: no eStargz footer")]
    Footer {
        /// The layer.
        layer: String,
        /// What is wrong.
        #[source]
        source: FooterError,
    },
    /// The layer is of a kind that is not served lazily.
    #[error("{layer}: not lazy")]
    NotLazy {
        /// The layer.
        layer: String,
        /// Why.
        #[source]
        source: NotLazyReason,
    },
    /// What the footer points at is larger than allowed.
    #[error("{layer}: the index takes bytes {}..{} of the blob, more than {limit}", range.start, range.end)]
    TooLarge {
        /// The layer.
        layer: String,
        /// Where it lies.
        range: Range<u64>,
        /// What is allowed.
        limit: u64,
    },
    /// What the footer points at is no index.
    #[error("{layer}: the index at {toc_offset} cannot be read")]
    Toc {
        /// The layer.
        layer: String,
        /// Where it lies.
        toc_offset: RemoteOffset,
        /// What is wrong.
        #[source]
        source: TocError,
    },
    /// Local I/O failed.
    #[error("{layer}: cannot read what was fetched")]
    Io {
        /// The layer.
        layer: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

/// Blobs up to this size are asked for as a whole.
const SMALL: u64 = 32 << 10;
/// What a new connection delivers in its first flight (ten segments, RFC 6928) without headers.
const FIRST_FLIGHT: u64 = 14 << 10;

/// How much of the end of a blob of `len` bytes to ask for first: TOCs are 0.5 to 1 % of a
/// layer, more if its files are tiny. Too much costs time at line rate and, on a new connection,
/// a round trip for each doubling of its window; too little costs one round trip.
fn first_guess(len: u64) -> u64 {
    if len <= SMALL {
        return len;
    }
    (len / 96).clamp(FIRST_FLIGHT, 2 << 20)
}

impl Wire {
    /// Fetches footer and TOC: one request, a second one only if the TOC is larger than guessed.
    /// The bytes stay in the wire. Nothing is fetched that is local already.
    ///
    /// The bytes are not bound to anything yet: the caller compares the JSON with the TOC digest,
    /// and calls [`Self::forget_index`] if it does not match.
    pub async fn fetch_index(&self, limits: &Limits) -> Result<RawToc, IndexError> {
        let len = self.blob_len();
        self.guess_head();
        let tail = self.obtain_tail(len - first_guess(len)).await?;
        let footer_at = tail.len() - tail.len().min(index(MAX_FOOTER_LEN));
        let layer = || self.name.clone();
        let footer =
            parse_footer(&tail[footer_at..], len).map_err(|source| IndexError::Footer {
                layer: layer(),
                source,
            })?;
        if let Some(source) = footer.not_lazy() {
            return Err(IndexError::NotLazy {
                layer: layer(),
                source,
            });
        }
        debug_assert_eq!(footer.kind, FooterKind::EStargz, "all others are not lazy");
        let range = footer.toc_range(len);
        if range.end - range.start > limits.max_index_bytes {
            return Err(IndexError::TooLarge {
                layer: layer(),
                range,
                limit: limits.max_index_bytes,
            });
        }
        let tail_start = len - tail.len() as u64;
        let tail = if range.start < tail_start {
            self.obtain_tail(range.start).await?
        } else {
            tail
        };
        let tail_start = len - tail.len() as u64;
        let member = &tail[index(range.start - tail_start)..index(range.end - tail_start)];
        let json = inflate_toc(member, limits).map_err(|source| IndexError::Toc {
            layer: layer(),
            toc_offset: footer.toc_offset,
            source,
        })?;
        Ok(RawToc {
            json,
            toc_offset: footer.toc_offset,
        })
    }

    /// Forgets the end of the blob from `toc_offset` on, because it is not the index that it should
    /// be, so that another attempt fetches it again.
    pub fn forget_index(&self, toc_offset: RemoteOffset) {
        self.forget(toc_offset.0..self.blob_len());
    }

    /// The index of an optimised layer will say that the start wants the layer's first bytes. A
    /// little of them, asked for together with the index on a connection of its own, hides a round
    /// trip and that connection's slow start. Only for large layers and on a quiet node: an image of
    /// forty layers has better use for its link.
    fn guess_head(&self) {
        let head = (self.blob_len() / 64).clamp(256 << 10, 1 << 20);
        if self.blob_len() >= 8 << 20 && self.scheduler.may_guess(head) {
            self.fetch_head(head);
        }
    }

    async fn obtain_tail(&self, start: u64) -> Result<Vec<u8>, IndexError> {
        let range = start..self.blob_len();
        self.obtain(range.clone(), Cause::Metadata)
            .await
            .map_err(|source| IndexError::Fetch {
                layer: self.name.clone(),
                source,
            })?;
        let mut tail = vec![0; index(range.end - range.start)];
        // At most a few MB that were written a moment ago: from the page cache.
        self.read(&mut tail, start)
            .map_err(|source| IndexError::Io {
                layer: self.name.clone(),
                source,
            })?;
        Ok(tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_are_bounded_by_blob_and_reason() {
        assert_eq!(first_guess(100), 100);
        assert_eq!(first_guess(32 << 10), 32 << 10);
        assert_eq!(first_guess(1 << 20), 14 << 10);
        assert_eq!(first_guess(96 << 20), 1 << 20);
        assert_eq!(first_guess(10 << 30), 2 << 20);
    }
}
