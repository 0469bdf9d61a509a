//! Registry client: OCI distribution 1.1 over HTTP/1.1, for pulls by ranges, pulls of whole blobs
//! and pushes.
//!
//! One [`RegistryClient`] serves a process: all images share its connections, tokens, redirects
//! and what it knows of the health of hosts. It reads no environment; configuration files
//! (`hosts.toml`, the docker config, certificates) are read when needed and again when they change.
//!
//! - Hosts and mirrors: containerd's `hosts.toml` directories, asked in order, failed ones last.
//! - Any reply is used only if its status, `Content-Range` and length are those that were asked
//!   for; the body may be cut and is then resumed where it ended, from the next host.
//! - Credentials go to the host they are for, never to one it redirects to.
//! - No HEAD is needed to pull.
//!
//! Content is verified where the digest covers all of it (manifests, whole blobs); a range is
//! verified by whoever knows what is in it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use formats::digest::Digest;
use http::HeaderValue;

use self::{
    auth::Authorizer, body::Accounts, endpoint::Endpoints, routes::Routes, stats::Counters,
    transport::Transport, troubles::Troubles,
};
pub use self::{
    backoff::RetryPolicy,
    blob::RemoteBlob,
    credentials::{
        Anonymous, Credential, Credentials, CredentialsError, DockerConfig, DockerConfigOptions,
        Secret,
    },
    error::{Object, RegistryError, Target},
    hosts::HostsError,
    manifests::{Image, ImageError, Resolved},
    proxy::{ProxyConfig, ProxyError},
    push::Pushed,
    reference::{DEFAULT_REGISTRY, Reference, ReferenceError, Repository},
    stats::{CauseStats, ClientStats},
    tls::TrustedRoots,
};
use crate::{
    ranges::{FetchError, Meter, RangeBody, RangeSource as _},
    source::Cause,
};

mod attempts;
mod auth;
mod backoff;
mod blob;
mod body;
mod challenge;
mod content_range;
mod credentials;
mod dates;
mod dial;
mod endpoint;
mod error;
mod exchange;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod hosts;
mod manifests;
mod proxy;
mod push;
mod redirect;
mod reference;
mod routes;
mod stats;
mod tls;
mod token;
mod transport;
mod troubles;

/// How a [`RegistryClient`] behaves.
#[derive(Clone)]
pub struct ClientOptions {
    /// Directories with `HOST_PORT_/hosts.toml`; the first that knows a registry counts.
    pub hosts_dirs: Vec<PathBuf>,
    /// Registries (`host` or `host:port`) to be spoken to without TLS, besides loopback.
    pub plain_http: Vec<String>,
    /// HTTP proxies.
    pub proxy: ProxyConfig,
    /// Trusted certificate authorities.
    pub trusted_roots: TrustedRoots,
    /// Where credentials come from.
    pub credentials: Arc<dyn Credentials>,
    /// How long making a connection may take, TLS included (`dial_timeout` in `hosts.toml`
    /// overrides it).
    pub connect_timeout: Duration,
    /// How long a host may be silent before a request is given up and made again.
    pub stall_timeout: Duration,
    /// How transient failures are retried.
    pub retry: RetryPolicy,
    /// Value of `User-Agent`.
    pub user_agent: String,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            hosts_dirs: ["/etc/containerd/certs.d", "/etc/docker/certs.d"]
                .map(PathBuf::from)
                .to_vec(),
            plain_http: Vec::new(),
            proxy: ProxyConfig::default(),
            trusted_roots: TrustedRoots::default(),
            credentials: Arc::new(Anonymous),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(15),
            retry: RetryPolicy::default(),
            user_agent: concat!("snapshotterd/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

impl std::fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientOptions")
            .field("hosts_dirs", &self.hosts_dirs)
            .field("plain_http", &self.plain_http)
            .field("proxy", &self.proxy)
            .field("trusted_roots", &self.trusted_roots)
            .field("credentials", &self.credentials.describe())
            .field("connect_timeout", &self.connect_timeout)
            .field("stall_timeout", &self.stall_timeout)
            .field("retry", &self.retry)
            .field("user_agent", &self.user_agent)
            .finish()
    }
}

/// A client for all registries. Clones share everything.
#[derive(Clone)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    endpoints: Endpoints,
    authorizer: Authorizer,
    routes: Routes,
    counters: Arc<Counters>,
    troubles: Arc<Troubles>,
    policy: RetryPolicy,
}

impl RegistryClient {
    /// A client with these options. Does no I/O; problems of configuration files show when a
    /// registry is first asked.
    pub fn new(options: ClientOptions) -> Self {
        let user_agent = HeaderValue::try_from(options.user_agent)
            .unwrap_or_else(|_| HeaderValue::from_static("snapshotterd"));
        let inner = Inner {
            transport: Transport::new(
                options.connect_timeout,
                options.stall_timeout,
                options.proxy,
                options.trusted_roots,
            ),
            endpoints: Endpoints::new(options.hosts_dirs, options.plain_http, user_agent),
            authorizer: Authorizer::new(options.credentials),
            routes: Routes::default(),
            counters: Arc::default(),
            troubles: Arc::default(),
            policy: options.retry,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A blob of a repository as a source of ranges. `len` is the size that its descriptor
    /// states. Asks nobody yet.
    pub fn blob(&self, repository: &Repository, digest: Digest, len: u64) -> RemoteBlob {
        RemoteBlob::new(Arc::clone(&self.inner), repository.clone(), digest, len)
    }

    /// Fetches a part of a blob; see [`RangeSource::fetch`](crate::ranges::RangeSource::fetch).
    pub async fn range(
        &self,
        repository: &Repository,
        (digest, len): (Digest, u64),
        range: std::ops::Range<u64>,
        cause: Cause,
    ) -> Result<RangeBody, FetchError> {
        self.blob(repository, digest, len).fetch(range, cause).await
    }

    /// What failed last, and is being tried again, with a blob or manifest (`name`: its digest or
    /// tag) of a repository, if anything did in the last minute.
    pub fn trouble(&self, repository: &Repository, name: &str) -> Option<String> {
        self.inner.troubles.of(&repository.to_string(), name)
    }

    /// What has been done so far.
    pub fn stats(&self) -> ClientStats {
        let connections = self.inner.transport.connections();
        self.inner.counters.snapshot(connections)
    }
}

impl std::fmt::Debug for RegistryClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryClient")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn accounts(&self, cause: Cause, meter: Option<Arc<Meter>>) -> Accounts {
        Accounts {
            counters: Arc::clone(&self.counters),
            cause,
            meter,
        }
    }
}

/// The scope that a token needs for a repository.
fn scope(repository: &Repository, actions: &str) -> String {
    format!("repository:{}:{actions}", repository.name())
}

#[cfg(test)]
mod tests;
