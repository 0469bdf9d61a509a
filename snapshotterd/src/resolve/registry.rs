//! The registry client as the resolver sees it.

use std::{path::PathBuf, sync::Arc};

use formats::{digest::Digest, oci::HostPlatform};
use futures_util::FutureExt as _;
use storage::{
    ranges::{RangeSource, report},
    registry::{
        ClientOptions, DockerConfig, DockerConfigOptions, ImageError, ProxyConfig, Reference,
        RegistryClient,
    },
    source::{BoxFuture, Cause},
};

use super::remote::{Document, Remote, RemoteError};
use crate::config;

/// A client for all registries.
#[derive(Clone, Debug)]
pub struct Registries {
    client: RegistryClient,
}

impl Registries {
    /// A client as configured. `environment` holds the proxy variables.
    pub fn new(
        config: &config::Registry,
        environment: &[(String, String)],
    ) -> Result<Self, String> {
        let proxy = ProxyConfig::from_vars(environment.iter().map(|(name, value)| (name, value)))
            .map_err(|error| error.to_string())?;
        let mut docker = DockerConfigOptions::default();
        if !config.docker_config.as_os_str().is_empty() {
            docker.path.clone_from(&config.docker_config);
        }
        let hosts_dirs: Vec<PathBuf> = Some(config.config_path.clone())
            .filter(|path| !path.as_os_str().is_empty())
            .into_iter()
            .collect();
        Ok(Self {
            client: RegistryClient::new(ClientOptions {
                hosts_dirs,
                plain_http: config.plain_http.clone(),
                proxy,
                credentials: Arc::new(DockerConfig::new(docker)),
                ..ClientOptions::default()
            }),
        })
    }

    /// The client itself.
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }
}

fn reference(image: &str) -> Result<Reference, RemoteError> {
    image
        .parse()
        .map_err(|error: storage::registry::ReferenceError| RemoteError {
            detail: report(&error),
            transient: false,
        })
}

impl Remote for Registries {
    fn manifest(
        &self,
        image: &str,
        digest: Digest,
    ) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>> {
        let (client, parsed) = (self.client.clone(), reference(image));
        async move {
            let found = client
                .manifest_by_digest(parsed?.repository(), digest)
                .await?;
            Ok(found.bytes.to_vec())
        }
        .boxed()
    }

    fn named(&self, image: &str) -> BoxFuture<'static, Result<Document, RemoteError>> {
        let (client, parsed) = (self.client.clone(), reference(image));
        async move {
            let found = client
                .image(&parsed?, &HostPlatform::current())
                .await
                .map_err(|error| match error {
                    ImageError::Registry(error) => error.into(),
                    other => RemoteError {
                        detail: report(&other),
                        transient: false,
                    },
                })?;
            Ok(Document {
                digest: found.manifest.digest,
                bytes: found.manifest.bytes.to_vec(),
            })
        }
        .boxed()
    }

    fn document(
        &self,
        image: &str,
        digest: Digest,
        len: u64,
    ) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>> {
        let (client, parsed) = (self.client.clone(), reference(image));
        async move {
            let bytes = client
                .small_blob(parsed?.repository(), digest, len, Cause::Metadata)
                .await
                .map_err(|error| RemoteError::of_fetch(&error))?;
            Ok(bytes.to_vec())
        }
        .boxed()
    }

    fn trouble(&self, image: &str, digest: Digest) -> Option<String> {
        let parsed = reference(image).ok()?;
        self.client
            .trouble(parsed.repository(), &digest.to_string())
    }

    fn blob(
        &self,
        image: &str,
        digest: Digest,
        len: u64,
    ) -> Result<Arc<dyn RangeSource>, RemoteError> {
        let blob = self
            .client
            .blob(reference(image)?.repository(), digest, len);
        Ok(Arc::new(blob))
    }
}
