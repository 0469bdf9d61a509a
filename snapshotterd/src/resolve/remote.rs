//! The seam to the registry: what resolving an image needs of it.

use std::sync::Arc;

use formats::digest::Digest;
use storage::{
    ranges::{FetchError, RangeSource, report},
    registry::RegistryError,
    source::BoxFuture,
};

/// Why a registry did not deliver.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct RemoteError {
    /// Registry, repository, what was asked, what happened.
    pub detail: String,
    /// Trying again later may help.
    pub transient: bool,
}

/// A manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl RemoteError {
    /// What a failed fetch says, without naming again what was asked for.
    pub fn of_fetch(error: &FetchError) -> Self {
        let detail = match error {
            FetchError::Source { source, .. } => match source.downcast_ref::<RegistryError>() {
                Some(error) => error.brief(),
                None => report(&**source),
            },
            other => report(other),
        };
        Self {
            detail,
            transient: error.is_transient(),
        }
    }
}

impl From<RegistryError> for RemoteError {
    fn from(error: RegistryError) -> Self {
        Self {
            detail: error.brief(),
            transient: error.is_transient(),
        }
    }
}

/// Where images come from. Implementations bound their own waiting.
pub trait Remote: Send + Sync + 'static {
    /// A manifest by digest, from the repository that `image` names; checked against the digest.
    fn manifest(
        &self,
        image: &str,
        digest: Digest,
    ) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>>;

    /// The manifest that a name leads to now, for this host's platform. Names move: what it says
    /// is a hint, to be checked against digests.
    fn named(&self, image: &str) -> BoxFuture<'static, Result<Document, RemoteError>>;

    /// A small blob (an image config), checked against its digest.
    fn document(
        &self,
        image: &str,
        digest: Digest,
        len: u64,
    ) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>>;

    /// What failed last, and is being tried again, with a manifest or blob of the repository that
    /// `image` names, if anything did.
    fn trouble(&self, image: &str, digest: Digest) -> Option<String>;

    /// Ranges of a layer blob of `len` bytes. Asks nobody yet.
    fn blob(
        &self,
        image: &str,
        digest: Digest,
        len: u64,
    ) -> Result<Arc<dyn RangeSource>, RemoteError>;
}
