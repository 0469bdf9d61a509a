//! Pushing blobs and manifests.

use std::sync::Arc;

use bytes::Bytes;
use formats::digest::Digest;
use http::{
    HeaderMap, HeaderValue, Method, StatusCode, Uri,
    header::{CONTENT_TYPE, LOCATION},
};

use super::{
    Inner, RegistryClient,
    endpoint::{Endpoint, Need},
    error::{Object, RegistryError, Target},
    exchange::{Call, Reply, protocol},
    redirect,
    reference::{Reference, Repository},
    scope,
    token::encode_form,
};
use crate::{
    ranges::{MemorySource, RangeSource},
    source::Cause,
};

/// What a push of a blob came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// The registry had it already.
    Existed,
    /// The registry took it over from another of its repositories.
    Mounted,
    /// It was sent.
    Uploaded,
}

impl RegistryClient {
    /// Whether a repository has a blob.
    pub async fn blob_exists(
        &self,
        repository: &Repository,
        digest: Digest,
    ) -> Result<bool, RegistryError> {
        let push = Push::new(&self.inner, repository, Object::Blob(digest));
        let path = format!("/{}/blobs/{digest}", repository.name());
        match push.send(&push.call(Method::HEAD, path)).await {
            Ok(_) => Ok(true),
            Err(error) if error.status() == Some(404) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a blob unless the repository has it or can take it over from `mount_from`, another
    /// repository of the same registry. The source is read again when the upload has to be.
    pub async fn push_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        content: Arc<dyn RangeSource>,
        mount_from: Option<&Repository>,
    ) -> Result<Pushed, RegistryError> {
        if self.blob_exists(repository, digest).await? {
            return Ok(Pushed::Existed);
        }
        let push = Push::new(&self.inner, repository, Object::Upload(digest));
        let from = mount_from.filter(|from| {
            from.registry() == repository.registry() && from.name() != repository.name()
        });
        if let Some(from) = from
            && push.mount(digest, from).await
        {
            return Ok(Pushed::Mounted);
        }
        push.upload(digest, &content).await?;
        Ok(Pushed::Uploaded)
    }

    /// Puts a manifest or index under the tag of `reference`, or under its digest if the
    /// reference has one. Returns the digest.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        manifest: Bytes,
    ) -> Result<Digest, RegistryError> {
        let digest = Digest::of(&manifest);
        let name = reference.manifest_name();
        let repository = reference.repository();
        let push = Push::new(&self.inner, repository, Object::Manifest(name.clone()));
        if reference.digest().is_some_and(|pinned| pinned != digest) {
            return Err(RegistryError::Content {
                target: push.target,
                source: Arc::new(std::io::Error::other(format!(
                    "the manifest has digest {digest}"
                ))),
            });
        }
        let path = format!("/{}/manifests/{name}", repository.name());
        let mut call = push.call(Method::PUT, path);
        call.headers
            .extend(HeaderValue::from_str(media_type).map(|value| (CONTENT_TYPE, value)));
        call.content = Some(Arc::new(MemorySource::new("the manifest", manifest)));
        push.send(&call).await?;
        Ok(digest)
    }
}

/// Requests that need the right to push.
struct Push<'a> {
    client: &'a Inner,
    repository: &'a Repository,
    target: Arc<Target>,
}

impl<'a> Push<'a> {
    fn new(client: &'a Inner, repository: &'a Repository, object: Object) -> Self {
        let target = Arc::new(Target {
            repository: repository.clone(),
            object,
        });
        Self {
            client,
            repository,
            target,
        }
    }

    fn call(&self, method: Method, path: String) -> Call {
        Call {
            method,
            path,
            query: String::new(),
            headers: HeaderMap::new(),
            scopes: vec![scope(self.repository, "pull,push")],
            target: Arc::clone(&self.target),
            accounts: self.client.accounts(Cause::Metadata, None),
            content: None,
        }
    }

    async fn send(&self, call: &Call) -> Result<Reply, RegistryError> {
        let mut attempts = self.client.attempts(&self.target, Need::Push).await?;
        let mut is_retry = false;
        while let Some(endpoint) = attempts.next().await {
            if std::mem::replace(&mut is_retry, true) {
                self.client.count_retry();
            }
            match self.client.exchange(&endpoint, call, None).await {
                Ok(reply) => {
                    endpoint.note_success();
                    return Ok(reply);
                }
                Err(error) => attempts.failed(&endpoint, error),
            }
        }
        Err(attempts.into_error())
    }

    fn uploads_path(&self) -> String {
        format!("/{}/blobs/uploads/", self.repository.name())
    }

    /// Whether the registry took the blob over. A registry that cannot or may not is no error: it
    /// gets the blob.
    async fn mount(&self, digest: Digest, from: &Repository) -> bool {
        let mut call = self.call(Method::POST, self.uploads_path());
        call.query = encode_form(&[("mount", &digest.to_string()), ("from", from.name())]);
        call.scopes.push(scope(from, "pull"));
        call.scopes.sort();
        match self.send(&call).await {
            Ok(reply) => reply.response.status() == StatusCode::CREATED,
            Err(error) => {
                tracing::debug!(error = %error.report(), "a blob could not be mounted");
                false
            }
        }
    }

    async fn upload(
        &self,
        digest: Digest,
        content: &Arc<dyn RangeSource>,
    ) -> Result<(), RegistryError> {
        let mut attempts = self.client.attempts(&self.target, Need::Push).await?;
        let mut is_retry = false;
        while let Some(endpoint) = attempts.next().await {
            if std::mem::replace(&mut is_retry, true) {
                self.client.count_retry();
            }
            match self.upload_to(&endpoint, digest, content).await {
                Ok(()) => {
                    endpoint.note_success();
                    return Ok(());
                }
                Err(error) => attempts.failed(&endpoint, error),
            }
        }
        Err(attempts.into_error())
    }

    /// A monolithic upload: POST for a place, PUT of all bytes to that place.
    async fn upload_to(
        &self,
        endpoint: &Arc<Endpoint>,
        digest: Digest,
        content: &Arc<dyn RangeSource>,
    ) -> Result<(), RegistryError> {
        let begin = self.call(Method::POST, self.uploads_path());
        let reply = self.client.exchange(endpoint, &begin, None).await?;
        let headers = reply.response.headers();
        if !headers.contains_key(LOCATION) {
            return Err(protocol(
                &begin,
                &reply.url,
                "opened an upload without a location",
            ));
        }
        let place = redirect::location(&reply.url, headers)
            .map_err(|problem| protocol(&begin, &reply.url, &problem))?;
        let place = with_digest(&place, digest)
            .ok_or_else(|| protocol(&begin, &reply.url, "opened an upload at no valid URL"))?;
        let mut call = self.call(Method::PUT, String::new());
        call.headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        call.content = Some(Arc::clone(content));
        self.client.exchange(endpoint, &call, Some(&place)).await?;
        Ok(())
    }
}

/// The location with `digest=` added; whatever is in it stays as it is.
fn with_digest(location: &Uri, digest: Digest) -> Option<Uri> {
    let text = location.to_string();
    let separator = if location.query().is_some() { '&' } else { '?' };
    format!("{text}{separator}digest={digest}").parse().ok()
}
