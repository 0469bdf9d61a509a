//! Authentication: which header a request needs, and the tokens that all images share.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::HeaderValue;
use parking_lot::Mutex;

use super::{
    backoff::RetryPolicy,
    challenge::Challenge,
    credentials::{Credential, Credentials},
    endpoint::Endpoint,
    error::{RegistryError, Target},
    stats::Counters,
    token::{TokenRequest, fetch_token},
    transport::Transport,
};

/// For how long a basic credential is used before its source is asked again.
const BASIC_LIFETIME: Duration = Duration::from_secs(300);
/// For how long a refusal of a token is believed.
const REFUSAL_LIFETIME: Duration = Duration::from_secs(2);
/// No table of this module grows beyond this.
const MAX_ENTRIES: usize = 4096;

/// Knows how to authenticate at each host and keeps the tokens.
pub(super) struct Authorizer {
    credentials: Arc<dyn Credentials>,
    learned: Mutex<Learned>,
    slots: Mutex<HashMap<SlotKey, Arc<Slot>>>,
    serial: AtomicU64,
}

/// Who asks, on behalf of what.
pub(super) struct Asker<'a> {
    pub(super) transport: &'a Transport,
    pub(super) counters: &'a Counters,
    pub(super) policy: &'a RetryPolicy,
    pub(super) endpoint: &'a Endpoint,
    pub(super) target: &'a Arc<Target>,
    /// `repository:NAME:pull` and the like, sorted.
    pub(super) scopes: &'a [String],
}

/// A header to send, and what is to be known when it is refused.
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) header: HeaderValue,
    serial: u64,
    issued: Instant,
    /// Whether no credential was found, so that only public things may be read.
    pub(super) anonymous: bool,
}

/// What a host wants.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Method {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scopes: Vec<String>,
    },
}

/// What challenges have taught.
#[derive(Default)]
struct Learned {
    /// By host and the scopes that a request needs.
    exact: HashMap<(String, Vec<String>), Method>,
    /// By host: what it would want for another repository.
    pattern: HashMap<String, Method>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct SlotKey {
    host: String,
    realm: Option<String>,
    service: Option<String>,
    scopes: Vec<String>,
}

/// One token, or the attempt to get it: whoever holds the lock gets it for all.
#[derive(Default)]
struct Slot(tokio::sync::Mutex<SlotState>);

#[derive(Default)]
struct SlotState {
    grant: Option<(Grant, Instant)>,
    failed: Option<(Instant, RegistryError)>,
}

impl Authorizer {
    pub(super) fn new(credentials: Arc<dyn Credentials>) -> Self {
        Self {
            credentials,
            learned: Mutex::default(),
            slots: Mutex::default(),
            serial: AtomicU64::new(1),
        }
    }

    /// The header for a request, if the host is known to want one.
    pub(super) async fn grant(&self, asker: &Asker<'_>) -> Result<Option<Grant>, RegistryError> {
        let host = asker.endpoint.authority();
        let Some(method) = self.learned.lock().method(host, asker.scopes) else {
            return Ok(None);
        };
        self.grant_by(asker, &method).await.map(Some)
    }

    /// Takes in a 401: the next [`Self::grant`] will be another one. An error if nothing else can
    /// be tried. `since` is when the request as a whole began, `used` what was refused.
    pub(super) fn refused(
        &self,
        asker: &Asker<'_>,
        challenges: &[Challenge],
        used: Option<&Grant>,
        since: Instant,
    ) -> Result<(), String> {
        let host = asker.endpoint.authority();
        let Some(method) = method_of(challenges, asker.scopes) else {
            let schemes: Vec<&str> = challenges
                .iter()
                .map(|challenge| challenge.scheme.as_str())
                .collect();
            return Err(format!(
                "{host} wants an authentication that is not supported ({})",
                schemes.join(", ")
            ));
        };
        let news = self.learned.lock().learn(host, asker.scopes, &method);
        let Some(used) = used else {
            return Ok(());
        };
        let slot = self.slot(SlotKey::new(host, &method));
        // Whoever holds the lock is getting a new one already.
        if let Ok(mut state) = slot.0.try_lock()
            && state
                .grant
                .as_ref()
                .is_some_and(|(grant, _)| grant.serial == used.serial)
        {
            state.grant = None;
        }
        if news || used.issued < since {
            return Ok(());
        }
        Err(self.advice(host, used.anonymous))
    }

    /// What to do about a refusal.
    pub(super) fn advice(&self, host: &str, anonymous: bool) -> String {
        let source = self.credentials.describe();
        if anonymous {
            format!("no credentials for {host} in {source}")
        } else {
            format!("{host} refused the credentials for {host} in {source}")
        }
    }

    async fn grant_by(&self, asker: &Asker<'_>, method: &Method) -> Result<Grant, RegistryError> {
        let slot = self.slot(SlotKey::new(asker.endpoint.authority(), method));
        let asked = Instant::now();
        let mut state = slot.0.lock().await;
        let now = Instant::now();
        if let Some((grant, until)) = &state.grant
            && now < *until
        {
            return Ok(grant.clone());
        }
        // The attempt that was waited for has failed, or one just before: so would this one, and
        // servers lock accounts out that come too often with a wrong password.
        if let Some((at, error)) = &state.failed
            && (*at >= asked || !error.is_transient() && at.elapsed() < REFUSAL_LIFETIME)
        {
            return Err(error.clone());
        }
        match self.obtain(asker, method).await {
            Ok((grant, lifetime)) => {
                state.grant = Some((grant.clone(), now + lifetime));
                state.failed = None;
                Ok(grant)
            }
            Err(error) => {
                state.grant = None;
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn obtain(
        &self,
        asker: &Asker<'_>,
        method: &Method,
    ) -> Result<(Grant, Duration), RegistryError> {
        let host = asker.endpoint.authority();
        let credential = self
            .credentials
            .lookup(
                asker.endpoint.credentials_name(),
                asker.target.repository.name(),
            )
            .await
            .map_err(|source| RegistryError::Credentials {
                target: Arc::clone(asker.target),
                host: host.to_owned(),
                source,
            })?;
        let anonymous = credential.is_none();
        let issued = Instant::now();
        let (value, lifetime) = match (method, &credential) {
            (_, Some(Credential::RegistryToken(token))) => {
                (format!("Bearer {}", token.reveal()), BASIC_LIFETIME)
            }
            (Method::Basic, Some(Credential::Basic { username, password })) => {
                (basic(username, password.reveal()), BASIC_LIFETIME)
            }
            (Method::Basic, _) => {
                return Err(RegistryError::Denied {
                    target: Arc::clone(asker.target),
                    host: host.to_owned(),
                    status: 401,
                    advice: self.advice(host, true),
                    message: String::new(),
                });
            }
            (
                Method::Bearer {
                    realm,
                    service,
                    scopes,
                },
                credential,
            ) => {
                let request = TokenRequest {
                    realm,
                    service: service.as_deref(),
                    scopes,
                    credential: credential.as_ref(),
                    advice: &self.advice(host, anonymous),
                };
                let token = fetch_token(asker, &request).await?;
                (format!("Bearer {}", token.text.reveal()), token.lifetime)
            }
        };
        let mut header = HeaderValue::try_from(value).map_err(|_| RegistryError::Protocol {
            target: Arc::clone(asker.target),
            host: host.to_owned(),
            problem: "has a token or credential with characters no header may have".to_owned(),
        })?;
        header.set_sensitive(true);
        let grant = Grant {
            header,
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            issued,
            anonymous,
        };
        Ok((grant, lifetime))
    }

    fn slot(&self, key: SlotKey) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        if slots.len() >= MAX_ENTRIES && !slots.contains_key(&key) {
            slots.clear();
        }
        Arc::clone(slots.entry(key).or_default())
    }
}

impl Learned {
    fn method(&self, host: &str, scopes: &[String]) -> Option<Method> {
        let exact = self.exact.get(&(host.to_owned(), scopes.to_vec()));
        if let Some(method) = exact {
            return Some(method.clone());
        }
        Some(match self.pattern.get(host)? {
            Method::Basic => Method::Basic,
            Method::Bearer { realm, service, .. } => Method::Bearer {
                realm: realm.clone(),
                service: service.clone(),
                scopes: scopes.to_vec(),
            },
        })
    }

    /// Returns whether that was new.
    fn learn(&mut self, host: &str, scopes: &[String], method: &Method) -> bool {
        if self.exact.len() >= MAX_ENTRIES {
            self.exact.clear();
        }
        let follows_pattern = match method {
            Method::Basic => true,
            Method::Bearer { scopes: wanted, .. } => wanted == scopes,
        };
        if follows_pattern {
            self.pattern.insert(host.to_owned(), method.clone());
        } else {
            self.pattern.remove(host);
        }
        let key = (host.to_owned(), scopes.to_vec());
        self.exact.insert(key, method.clone()).as_ref() != Some(method)
    }
}

impl SlotKey {
    fn new(host: &str, method: &Method) -> Self {
        let host = host.to_owned();
        match method {
            Method::Basic => Self {
                host,
                realm: None,
                service: None,
                scopes: Vec::new(),
            },
            Method::Bearer {
                realm,
                service,
                scopes,
            } => Self {
                host,
                realm: Some(realm.clone()),
                service: service.clone(),
                scopes: scopes.clone(),
            },
        }
    }
}

/// The best of the offered methods: a token rather than a password.
fn method_of(challenges: &[Challenge], wanted: &[String]) -> Option<Method> {
    let bearer = challenges.iter().find_map(|challenge| {
        let realm = challenge
            .parameter("realm")
            .filter(|_| challenge.scheme == "bearer")?;
        let mut scopes: Vec<String> = challenge
            .parameter("scope")
            .unwrap_or("")
            .split_ascii_whitespace()
            .map(str::to_owned)
            .collect();
        if scopes.is_empty() {
            scopes = wanted.to_vec();
        } else if wanted.len() > 1 {
            // A mount between repositories needs more than the server names.
            scopes.extend_from_slice(wanted);
        }
        scopes.sort();
        scopes.dedup();
        Some(Method::Bearer {
            realm: realm.to_owned(),
            service: challenge.parameter("service").map(str::to_owned),
            scopes,
        })
    });
    bearer.or_else(|| {
        let has_basic = challenges
            .iter()
            .any(|challenge| challenge.scheme == "basic");
        has_basic.then_some(Method::Basic)
    })
}

/// The value of a basic `Authorization` header.
pub(super) fn basic(username: &str, password: &str) -> String {
    format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{username}:{password}"))
    )
}
