//! The one connection pool of the process: one HTTP/1.1 client per set of TLS settings.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, header::PROXY_AUTHORIZATION};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use parking_lot::Mutex;
use rustls::RootCertStore;
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep_until, timeout},
};

use super::{
    dial::Dialer,
    error::SendError,
    hosts::{HostsError, TlsSettings},
    proxy::ProxyConfig,
    tls::{self, TrustedRoots},
};

/// The body of a request.
pub(super) type RequestBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;
type HttpClient = Client<Dialer, RequestBody>;

const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_IDLE_PER_HOST: usize = 32;
/// Upper bound of one read from a connection. The buffer starts small and grows while reads fill
/// it, so that a large body comes in few, large pieces and an idle connection stays cheap.
const MAX_READ_BYTES: usize = 256 << 10;
const MAX_HEADERS: usize = 128;

/// Sends requests and hands back replies.
pub(super) struct Transport {
    connect_timeout: Duration,
    stall_timeout: Duration,
    proxy: Arc<ProxyConfig>,
    trust: TrustedRoots,
    roots: OnceCell<Arc<RootCertStore>>,
    clients: Mutex<HashMap<ClientKey, HttpClient>>,
    connections: Arc<AtomicU64>,
}

/// Settings of a connection; `tls` is `None` for plain HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ClientKey {
    tls: Option<Arc<TlsSettings>>,
    dial_timeout: Duration,
}

/// Counts what has been sent of a request body, so that a long upload is not taken for a stall.
#[derive(Debug, Default)]
pub(super) struct UploadProgress(AtomicU64);

impl UploadProgress {
    /// Counts bytes handed to the connection.
    pub(super) fn add(&self, bytes: u64) {
        // One more than the bytes, so that an empty piece is progress, too.
        self.0.fetch_add(bytes + 1, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Transport {
    pub(super) fn new(
        connect_timeout: Duration,
        stall_timeout: Duration,
        proxy: ProxyConfig,
        trust: TrustedRoots,
    ) -> Self {
        Self {
            connect_timeout,
            stall_timeout,
            proxy: Arc::new(proxy),
            trust,
            roots: OnceCell::new(),
            clients: Mutex::default(),
            connections: Arc::default(),
        }
    }

    /// TCP connections made so far.
    pub(super) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// How long a silent peer is waited for.
    pub(super) fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// Sends one request and waits for the head of the reply: at most as long as a connection and
    /// a silent peer may take, counted anew whenever the request body makes progress.
    pub(super) async fn send(
        &self,
        mut request: Request<RequestBody>,
        tls: &Arc<TlsSettings>,
        dial_timeout: Option<Duration>,
        progress: Option<&UploadProgress>,
    ) -> Result<Response<Incoming>, SendError> {
        let is_https = request.uri().scheme_str() == Some("https");
        if !is_https
            && let Some(proxy) = self.proxy.proxy_for(request.uri())
            && let Some(authorization) = &proxy.authorization
        {
            let headers = request.headers_mut();
            headers.insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        let key = ClientKey {
            tls: is_https.then(|| Arc::clone(tls)),
            dial_timeout: dial_timeout.unwrap_or(self.connect_timeout),
        };
        let patience = key.dial_timeout + self.stall_timeout;
        let client = self.client(key).await.map_err(SendError::Setup)?;
        let reply = client.request(request);
        let Some(progress) = progress else {
            return match timeout(patience, reply).await {
                Ok(reply) => reply.map_err(SendError::Client),
                Err(_) => Err(SendError::Stalled(patience)),
            };
        };
        tokio::pin!(reply);
        let mut seen = progress.value();
        loop {
            tokio::select! {
                reply = &mut reply => return reply.map_err(SendError::Client),
                () = sleep_until(Instant::now() + patience) => {
                    let now = progress.value();
                    if now == seen {
                        return Err(SendError::Stalled(patience));
                    }
                    seen = now;
                }
            }
        }
    }

    async fn client(&self, key: ClientKey) -> Result<HttpClient, HostsError> {
        if let Some(client) = self.clients.lock().get(&key) {
            return Ok(client.clone());
        }
        let config = match &key.tls {
            None => {
                on_blocking_thread(|| {
                    tls::client_config(&TlsSettings::default(), &RootCertStore::empty())
                })
                .await?
            }
            Some(settings) => {
                let roots = self.roots().await?;
                let settings = Arc::clone(settings);
                on_blocking_thread(move || tls::client_config(&settings, &roots)).await?
            }
        };
        let dialer = Dialer::new(
            config,
            Arc::clone(&self.proxy),
            key.dial_timeout,
            Arc::clone(&self.connections),
        );
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
            .http1_max_buf_size(MAX_READ_BYTES)
            .http1_max_headers(MAX_HEADERS)
            .build(dialer);
        // Whoever came first wins, so that there is one pool per set of settings.
        Ok(self.clients.lock().entry(key).or_insert(client).clone())
    }

    async fn roots(&self) -> Result<Arc<RootCertStore>, HostsError> {
        let trust = self.trust.clone();
        let roots = self.roots.get_or_try_init(|| async {
            let roots = on_blocking_thread(move || tls::load_roots(&trust)).await?;
            Ok(Arc::new(roots))
        });
        roots.await.cloned()
    }
}

/// Runs file I/O where it may block.
pub(super) async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostsError> + Send + 'static,
) -> Result<T, HostsError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The runtime is shutting down (or the work panicked, which it has no reason to).
        Err(error) => Err(HostsError::Read {
            path: "hosts.toml".into(),
            source: Arc::new(std::io::Error::other(error)),
        }),
    }
}
