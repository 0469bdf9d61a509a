//! Whole blobs, checked against their digest while they pass.

use bytes::{Bytes, BytesMut};
use formats::digest::Digest;
use sha2::{Digest as _, Sha256};

use super::{FetchError, RangeBody, RangeSource};
use crate::source::Cause;

/// A whole blob in order. The last call of [`Self::next_chunk`] fails if the digest is wrong, so
/// nothing may be made of the bytes before it has returned `None`.
pub struct VerifiedBody {
    body: Option<RangeBody>,
    origin: String,
    expected: Digest,
    hash: Sha256,
    is_checked: bool,
}

impl VerifiedBody {
    /// Starts to read all of `source`.
    pub async fn open(
        source: &dyn RangeSource,
        digest: Digest,
        cause: Cause,
    ) -> Result<Self, FetchError> {
        let body = if source.is_empty() {
            None
        } else {
            Some(source.fetch(0..source.len(), cause).await?)
        };
        Ok(Self {
            body,
            origin: source.origin(),
            expected: digest,
            hash: Sha256::new(),
            is_checked: false,
        })
    }

    /// The next bytes; `None` when all have come and are right.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        if let Some(body) = &mut self.body
            && let Some(chunk) = body.next_chunk().await?
        {
            self.hash.update(&chunk);
            return Ok(Some(chunk));
        }
        if !self.is_checked {
            let actual = Digest::finish(std::mem::take(&mut self.hash));
            if actual != self.expected {
                // The hash is gone: the error must come again.
                self.hash.update(b"\0");
                return Err(FetchError::Digest {
                    origin: self.origin.clone(),
                    expected: self.expected,
                    actual,
                });
            }
            self.is_checked = true;
        }
        Ok(None)
    }

    /// All bytes, in memory.
    pub async fn collect(mut self) -> Result<Bytes, FetchError> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.next_chunk().await? {
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }
}

impl std::fmt::Debug for VerifiedBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedBody")
            .field("origin", &self.origin)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}
