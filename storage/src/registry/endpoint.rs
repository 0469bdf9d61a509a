//! The hosts of a registry at run time: loaded when needed, with what is known of their health.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, Uri, header::USER_AGENT};
use parking_lot::Mutex;

use super::{
    error::RegistryError,
    hosts::{self, Capabilities, HostConfig, HostsError, Scheme, TlsSettings},
    reference::DEFAULT_REGISTRY,
    transport::on_blocking_thread,
};
use crate::ranges::FetchFailure;

/// After that long the files are looked at again.
const RELOAD_AFTER: Duration = Duration::from_secs(30);
/// A host that failed is asked last for a while, doubled with each failure in a row.
const FIRST_AVOIDANCE: Duration = Duration::from_secs(2);
const LONGEST_AVOIDANCE: Duration = Duration::from_secs(60);

/// The first scheme is tried.
const GUESS: u8 = 0;
/// The first scheme seemed wrong: the other one is tried.
const OTHER_GUESS: u8 = 1;
/// The host has answered: nothing else is tried any more.
const SETTLED: u8 = 2;
const OTHER_SETTLED: u8 = 3;

/// One host that serves a registry.
pub(super) struct Endpoint {
    config: HostConfig,
    user_agent: HeaderValue,
    /// One of the constants below.
    scheme: AtomicU8,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    failures: u32,
    avoid_until: Option<Instant>,
    busy_until: Option<Instant>,
}

impl Endpoint {
    fn new(config: HostConfig, user_agent: HeaderValue) -> Self {
        if config.tls.skip_verify && config.scheme != Scheme::Http {
            let (host, _) = hosts::split_port(&config.authority);
            if hosts::is_loopback(host) {
                tracing::debug!(
                    host = config.authority,
                    "certificates of loopback are not verified"
                );
            } else {
                tracing::warn!(
                    host = config.authority,
                    config = %config.config.display(),
                    "skip_verify: the certificate of this host is NOT verified; anybody on the \
                     path can answer in its place and read the credentials sent to it"
                );
            }
        }
        Self {
            config,
            user_agent,
            scheme: AtomicU8::new(GUESS),
            health: Mutex::default(),
        }
    }

    /// Host and optional port.
    pub(super) fn authority(&self) -> &str {
        &self.config.authority
    }

    /// The name under which credentials are looked up.
    pub(super) fn credentials_name(&self) -> &str {
        if self.config.is_mirror_of(DEFAULT_REGISTRY) {
            &self.config.authority
        } else {
            DEFAULT_REGISTRY
        }
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.config.capabilities
    }

    pub(super) fn tls(&self) -> &Arc<TlsSettings> {
        &self.config.tls
    }

    pub(super) fn dial_timeout(&self) -> Option<Duration> {
        self.config.dial_timeout
    }

    /// The file in which the host is configured, or would be.
    pub(super) fn config(&self) -> String {
        self.config.config.display().to_string()
    }

    /// The URL of the host's root.
    pub(super) fn url(&self) -> Uri {
        let other = matches!(
            self.scheme.load(Ordering::Relaxed),
            OTHER_GUESS | OTHER_SETTLED
        );
        let is_https = match self.config.scheme {
            Scheme::Https => true,
            Scheme::Http => false,
            Scheme::HttpThenHttps => other,
            Scheme::HttpsThenHttp => !other,
        };
        let scheme = if is_https { "https" } else { "http" };
        let mut builder = Uri::builder().scheme(scheme).path_and_query("/");
        builder = builder.authority(self.config.authority.as_str());
        // The authority comes from a parsed URL or reference; should it not be one for a URI,
        // the request fails as one to nowhere does.
        builder.build().unwrap_or_default()
    }

    /// The URL of `path` (with a leading slash) of the registry's API, with `?ns=` on a mirror.
    pub(super) fn api_url(&self, registry: &str, path: &str, query: &str) -> Option<Uri> {
        let root = self.url().to_string();
        let root = root.trim_end_matches('/');
        let mut url = format!("{root}{}{path}", self.config.path);
        let mut separator = '?';
        if self.config.is_mirror_of(registry) {
            url += "?ns=";
            url += &super::token::encode_form_value(registry);
            separator = '&';
        }
        if !query.is_empty() {
            url.push(separator);
            url += query;
        }
        url.parse().ok()
    }

    /// Headers that every request to this host gets.
    pub(super) fn add_client_headers(&self, headers: &mut HeaderMap) {
        headers.insert(USER_AGENT, self.user_agent.clone());
        for (name, value) in &self.config.headers {
            headers.append(name, value.clone());
        }
    }

    /// The name of this program, for hosts that are not configured here.
    pub(super) fn user_agent(&self) -> &HeaderValue {
        &self.user_agent
    }

    /// After a failure with the scheme of `tried`: whether [`Self::url`] now has the other one.
    pub(super) fn try_other_scheme(&self, tried: &Uri) -> bool {
        let is_guess = matches!(
            self.config.scheme,
            Scheme::HttpThenHttps | Scheme::HttpsThenHttp
        );
        // Somebody else may have switched already.
        is_guess
            && (self.change_scheme(GUESS, OTHER_GUESS) || self.url().scheme() != tried.scheme())
    }

    /// The host has answered: its scheme is no guess any more.
    pub(super) fn settle_scheme(&self) {
        self.change_scheme(GUESS, SETTLED);
        self.change_scheme(OTHER_GUESS, OTHER_SETTLED);
    }

    /// The other scheme failed, too: nothing is known.
    pub(super) fn forget_scheme(&self) {
        self.change_scheme(OTHER_GUESS, GUESS);
    }

    fn change_scheme(&self, from: u8, to: u8) -> bool {
        let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
        self.scheme
            .compare_exchange(from, to, success, failure)
            .is_ok()
    }

    /// The host has answered as it should.
    pub(super) fn note_success(&self) {
        let mut health = self.health.lock();
        health.failures = 0;
        health.avoid_until = None;
    }

    /// The host has failed: others are asked first for a while, and nobody asks one that wants to
    /// be left alone.
    pub(super) fn note_failure(&self, error: &RegistryError, longest_wait: Duration) {
        let now = Instant::now();
        let mut health = self.health.lock();
        match error.failure() {
            FetchFailure::Unreachable | FetchFailure::Busy => {}
            _ => return,
        }
        let factor = 1u32.checked_shl(health.failures).unwrap_or(u32::MAX);
        let avoidance = FIRST_AVOIDANCE
            .saturating_mul(factor)
            .min(LONGEST_AVOIDANCE);
        health.failures = health.failures.saturating_add(1);
        health.avoid_until = Some(now + avoidance);
        if let Some(pause) = error.retry_after() {
            health.busy_until = Some(now + pause.min(longest_wait));
        }
    }

    /// For how long the host wants to be left alone.
    pub(super) fn busy_for(&self) -> Duration {
        let until = self.health.lock().busy_until;
        until.map_or(Duration::ZERO, |until| {
            until.saturating_duration_since(Instant::now())
        })
    }

    /// Hosts with a lower rank are asked first.
    fn rank(&self) -> u8 {
        let now = Instant::now();
        let health = self.health.lock();
        let ahead = |until: Option<Instant>| u8::from(until.is_some_and(|until| until > now));
        ahead(health.avoid_until) + ahead(health.busy_until)
    }
}

/// What a host is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Pull,
    Resolve,
    Push,
}

impl Need {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Resolve => "resolve",
            Self::Push => "push",
        }
    }

    fn is_met_by(self, capabilities: Capabilities) -> bool {
        match self {
            Self::Pull => capabilities.pull,
            Self::Resolve => capabilities.resolve,
            Self::Push => capabilities.push,
        }
    }
}

/// The hosts of one registry, in the order of its configuration.
type Hosts = Arc<[Arc<Endpoint>]>;

/// All hosts of all registries.
pub(super) struct Endpoints {
    dirs: Vec<PathBuf>,
    plain_http: Vec<String>,
    user_agent: HeaderValue,
    loaded: Mutex<HashMap<String, (Instant, Hosts)>>,
}

impl Endpoints {
    pub(super) fn new(
        dirs: Vec<PathBuf>,
        plain_http: Vec<String>,
        user_agent: HeaderValue,
    ) -> Self {
        Self {
            dirs,
            plain_http,
            user_agent,
            loaded: Mutex::default(),
        }
    }

    /// The hosts of `registry` that can do what is needed, the one to ask first first.
    pub(super) async fn of(
        &self,
        registry: &str,
        need: Need,
    ) -> Result<Vec<Arc<Endpoint>>, HostsError> {
        let all = self.load(registry).await?;
        let mut fit: Vec<Arc<Endpoint>> = all
            .iter()
            .filter(|endpoint| need.is_met_by(endpoint.capabilities()))
            .cloned()
            .collect();
        // Stable: hosts in the same state of health keep the order of the configuration.
        fit.sort_by_key(|endpoint| endpoint.rank());
        Ok(fit)
    }

    async fn load(&self, registry: &str) -> Result<Hosts, HostsError> {
        let known = self.loaded.lock().get(registry).cloned();
        if let Some((at, endpoints)) = &known
            && at.elapsed() < RELOAD_AFTER
        {
            return Ok(Arc::clone(endpoints));
        }
        let (dirs, plain_http) = (self.dirs.clone(), self.plain_http.clone());
        let name = registry.to_owned();
        let configs = on_blocking_thread(move || hosts::load(&dirs, &plain_http, &name)).await?;
        let mut loaded = self.loaded.lock();
        let endpoints = match loaded.get(registry) {
            // Unchanged: keep what is known of their health.
            Some((_, old)) if old.iter().map(|old| &old.config).eq(configs.iter()) => {
                Arc::clone(old)
            }
            _ => configs
                .into_iter()
                .map(|config| Arc::new(Endpoint::new(config, self.user_agent.clone())))
                .collect(),
        };
        loaded.insert(
            registry.to_owned(),
            (Instant::now(), Arc::clone(&endpoints)),
        );
        Ok(endpoints)
    }
}
