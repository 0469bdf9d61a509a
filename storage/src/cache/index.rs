//! Fetching a layer's index: one request for the end of the blob, sized by a guess.

use formats::{limits::Limits, units::RemoteOffset};

use super::wire::Wire;
use crate::ranges::FetchError;

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
    /// This build cannot read it.
    #[error("{layer}: {what}")]
    Unsupported {
        /// The layer.
        layer: String,
        /// What is missing.
        what: String,
    },
}

/// How much of the end of a blob of `len` bytes to ask for first: TOCs are 1 to 2 % of a layer.
pub(crate) fn first_guess(len: u64) -> u64 {
    (len / 64).clamp(64 << 10, 2 << 20).min(len)
}

impl Wire {
    /// Fetches footer and TOC: one request, a second one only if the TOC is larger than guessed.
    /// The bytes stay in the wire. Nothing is fetched that is local already.
    #[expect(clippy::unused_async, reason = "the footer parser is not there yet")]
    pub async fn fetch_index(&self, _limits: &Limits) -> Result<RawToc, IndexError> {
        Err(IndexError::Unsupported {
            layer: self.name.clone(),
            what: format!(
                "TOCs cannot be read yet (would fetch the last {} bytes)",
                first_guess(self.blob_len())
            ),
        })
    }
}
