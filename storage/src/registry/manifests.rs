//! Manifests: from a tag to a digest, from an index to the manifest of a platform.

use std::sync::Arc;

use bytes::Bytes;
use formats::{
    digest::Digest,
    oci::{
        Document, HostPlatform, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest, OciError,
        media_type::MANIFEST_TYPES,
    },
};
use http::{
    HeaderMap, HeaderValue, Method,
    header::{ACCEPT, CONTENT_TYPE},
};

use super::{
    RegistryClient,
    endpoint::{Endpoint, Need},
    error::{Object, RegistryError, Target},
    exchange::{Call, body_error},
    reference::{Reference, Repository},
    scope,
};
use crate::{
    ranges::{FetchError, RangeSource as _, VerifiedBody},
    source::Cause,
};

/// An index may hold indexes; nobody nests them deeper.
const MAX_INDEX_DEPTH: usize = 3;

/// A manifest or index as the registry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// What the registry says it is; without parameters, empty if it does not say.
    pub media_type: String,
    /// The document, byte for byte.
    pub bytes: Bytes,
}

/// An image for one platform.
#[derive(Clone, Debug)]
pub struct Image {
    /// What the reference names: an index, or the manifest itself.
    pub root: Resolved,
    /// The manifest chosen.
    pub manifest: Resolved,
    /// The manifest, parsed.
    pub parsed: Manifest,
}

/// Why an image cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A document is not what it should be.
    #[error("manifest {digest} of {repository} cannot be used")]
    Document {
        /// Where it is.
        repository: Repository,
        /// Which one.
        digest: Digest,
        /// What is wrong.
        #[source]
        source: Arc<OciError>,
    },
    /// The index has nothing for the platform.
    #[error("index {digest} of {repository} has no manifest for {platform}")]
    Platform {
        /// Where it is.
        repository: Repository,
        /// The index.
        digest: Digest,
        /// What was looked for.
        platform: String,
    },
    /// Indexes within indexes without end.
    #[error("index {digest} of {repository} holds indexes nested deeper than {MAX_INDEX_DEPTH}")]
    TooDeep {
        /// Where it is.
        repository: Repository,
        /// The index.
        digest: Digest,
    },
}

impl ImageError {
    /// Whether the same may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Registry(error) if error.is_transient())
    }
}

impl RegistryClient {
    /// What a reference names: its digest, media type and bytes. With a digest in the reference,
    /// the bytes are verified against it.
    pub async fn resolve(&self, reference: &Reference) -> Result<Resolved, RegistryError> {
        let name = reference.manifest_name();
        self.manifest(reference.repository(), &name, reference.digest())
            .await
    }

    /// A manifest or index by digest, verified.
    pub async fn manifest_by_digest(
        &self,
        repository: &Repository,
        digest: Digest,
    ) -> Result<Resolved, RegistryError> {
        let name = digest.to_string();
        self.manifest(repository, &name, Some(digest)).await
    }

    /// The image for a platform: the manifest that the reference names or that the index it names
    /// holds for the platform.
    pub async fn image(
        &self,
        reference: &Reference,
        platform: &HostPlatform,
    ) -> Result<Image, ImageError> {
        let repository = reference.repository();
        let root = self.resolve(reference).await?;
        let mut current = root.clone();
        for _ in 0..=MAX_INDEX_DEPTH {
            let served = Some(current.media_type.as_str()).filter(|served| !served.is_empty());
            let document =
                Document::parse(&current.bytes, served).map_err(|source| ImageError::Document {
                    repository: repository.clone(),
                    digest: current.digest,
                    source: Arc::new(source),
                })?;
            match document {
                Document::Manifest(parsed) => {
                    return Ok(Image {
                        root,
                        manifest: current,
                        parsed,
                    });
                }
                Document::Index(index) => {
                    let Some(chosen) = index.choose(platform) else {
                        return Err(ImageError::Platform {
                            repository: repository.clone(),
                            digest: current.digest,
                            platform: format!("{platform:?}"),
                        });
                    };
                    current = self.manifest_by_digest(repository, chosen.digest).await?;
                }
            }
        }
        Err(ImageError::TooDeep {
            repository: repository.clone(),
            digest: root.digest,
        })
    }

    /// A whole small blob (an image config), verified. One larger than an image config may be
    /// ([`MAX_CONFIG_BYTES`]) is refused before anybody is asked.
    pub async fn small_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        len: u64,
        cause: Cause,
    ) -> Result<Bytes, FetchError> {
        let limit = MAX_CONFIG_BYTES as u64;
        if len > limit {
            let origin = self.blob(repository, digest, len).origin();
            return Err(FetchError::TooLarge { origin, len, limit });
        }
        let body = self.whole_blob(repository, digest, len, cause).await?;
        body.collect().await
    }

    /// A whole blob as a stream that fails at its end if the digest is wrong.
    pub async fn whole_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        len: u64,
        cause: Cause,
    ) -> Result<VerifiedBody, FetchError> {
        let blob = self.blob(repository, digest, len);
        VerifiedBody::open(&blob, digest, cause).await
    }

    async fn manifest(
        &self,
        repository: &Repository,
        name: &str,
        digest: Option<Digest>,
    ) -> Result<Resolved, RegistryError> {
        let target = Arc::new(Target {
            repository: repository.clone(),
            object: Object::Manifest(name.to_owned()),
        });
        let mut headers = HeaderMap::new();
        let accept = format!("{}, */*;q=0.1", MANIFEST_TYPES.join(", "));
        headers.extend(HeaderValue::try_from(accept).map(|value| (ACCEPT, value)));
        let call = Call {
            method: Method::GET,
            path: format!("/{}/manifests/{name}", repository.name()),
            query: String::new(),
            headers,
            scopes: vec![scope(repository, "pull")],
            accounts: self.inner.accounts(Cause::Metadata, None),
            target,
            content: None,
        };
        let need = if digest.is_some() {
            Need::Pull
        } else {
            Need::Resolve
        };
        let mut attempts = self.inner.attempts(&call.target, need).await?;
        let mut is_retry = false;
        while let Some(endpoint) = attempts.next().await {
            if std::mem::replace(&mut is_retry, true) {
                self.inner.count_retry();
            }
            match self.manifest_from(&endpoint, &call, digest).await {
                Ok(resolved) => {
                    endpoint.note_success();
                    return Ok(resolved);
                }
                Err(error) => attempts.failed(&endpoint, error),
            }
        }
        Err(attempts.into_error())
    }

    async fn manifest_from(
        &self,
        endpoint: &Arc<Endpoint>,
        call: &Call,
        digest: Option<Digest>,
    ) -> Result<Resolved, RegistryError> {
        let reply = self.inner.exchange(endpoint, call, None).await?;
        let host = reply.host();
        let headers = reply.response.headers();
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let media_type = text(CONTENT_TYPE.as_str())
            .and_then(|value| value.split(';').next())
            .map_or("", str::trim)
            .to_owned();
        let stated = text("docker-content-digest").and_then(|value| value.parse::<Digest>().ok());
        let body = self.inner.body_of(reply.response, &call.accounts);
        let bytes = body
            .collect(MAX_MANIFEST_BYTES)
            .await
            .map_err(|error| body_error(error, &call.target, &host))?;
        let actual = Digest::of(&bytes);
        // For a tag, what the registry says of the digest is all there is to compare with.
        if digest.or(stated).is_some_and(|expected| expected != actual) {
            return Err(RegistryError::Digest {
                target: Arc::clone(&call.target),
                host,
                actual,
            });
        }
        Ok(Resolved {
            digest: actual,
            media_type,
            bytes,
        })
    }
}
