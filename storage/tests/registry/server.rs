//! A scripted HTTP server, and what the tests share to talk to it.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use formats::digest::Digest;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, Method, Request, Response, Uri, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use storage::registry::{ClientOptions, RegistryClient, Repository, RetryPolicy};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

pub(crate) type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;
type Handler = dyn Fn(&Logged) -> Reply + Send + Sync;

/// One request that came.
#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) connection: usize,
    pub(crate) at: Instant,
}

impl Logged {
    pub(crate) fn path(&self) -> &str {
        self.uri.path()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        Some(self.headers.get(name)?.to_str().unwrap())
    }

    pub(crate) fn range(&self) -> Option<Range<usize>> {
        let (first, last) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        Some(first.parse().unwrap()..last.parse::<usize>().unwrap() + 1)
    }
}

/// A server on loopback; it ends when dropped.
pub(crate) struct Server {
    addr: SocketAddr,
    log: Arc<Mutex<Vec<Logged>>>,
    task: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Logged) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(None, handler).await
    }

    pub(crate) async fn start_with(
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: impl Fn(&Logged) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let log = Arc::default();
        let task = tokio::spawn(accept(listener, tls, Arc::new(handler), Arc::clone(&log)));
        Self { addr, log, task }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        self.addr.to_string()
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    pub(crate) fn repository(&self) -> Repository {
        Repository::new(&self.host(), "some/image").unwrap()
    }

    pub(crate) fn log(&self) -> Vec<Logged> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    handler: Arc<Handler>,
    log: Arc<Mutex<Vec<Logged>>>,
) {
    let mut connections = JoinSet::new();
    let counter = AtomicUsize::new(0);
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let connection = counter.fetch_add(1, Ordering::Relaxed);
        let (handler, log) = (Arc::clone(&handler), Arc::clone(&log));
        match &tls {
            None => {
                connections.spawn(serve_connection(stream, connection, handler, log));
            }
            Some(config) => {
                let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(config));
                connections.spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve_connection(stream, connection, handler, log).await;
                    }
                });
            }
        }
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    connection: usize,
    handler: Arc<Handler>,
    log: Arc<Mutex<Vec<Logged>>>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (handler, log) = (Arc::clone(&handler), Arc::clone(&log));
        async move {
            let (head, body) = request.into_parts();
            let logged = Logged {
                method: head.method,
                uri: head.uri,
                headers: head.headers,
                body: body
                    .collect()
                    .await
                    .map(http_body_util::Collected::to_bytes)
                    .unwrap_or_default(),
                connection,
                at: Instant::now(),
            };
            log.lock().unwrap().push(logged.clone());
            Ok::<_, Infallible>(handler(&logged))
        }
    });
    // Connections that end in an error are what many tests are about.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

pub(crate) fn reply(status: u16, body: impl Into<Bytes>) -> Reply {
    let body = Full::new(body.into())
        .map_err(|never| match never {})
        .boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

pub(crate) fn empty(status: u16) -> Reply {
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

pub(crate) fn with(mut reply: Reply, name: &'static str, value: &str) -> Reply {
    reply.headers_mut().append(name, value.parse().unwrap());
    reply
}

pub(crate) fn redirect(status: u16, location: &str) -> Reply {
    with(empty(status), "location", location)
}

/// How a body ends before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ending {
    /// The connection is closed.
    Cut,
    /// Nothing more comes.
    Hang,
}

/// The reply with only the first `after` bytes of its body, which `Content-Length` still counts.
pub(crate) fn broken(reply: Reply, body: &[u8], after: usize, ending: Ending) -> Reply {
    let (mut head, _) = reply.into_parts();
    head.headers
        .insert(header::CONTENT_LENGTH, body.len().into());
    let sent = Bytes::copy_from_slice(&body[..after]);
    let first = stream::once(async move { Ok(Frame::data(sent)) });
    let body = match ending {
        Ending::Cut => {
            // An error at once would keep hyper from sending what came before it.
            let rest = stream::once(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(io::Error::other("cut"))
            });
            StreamBody::new(first.chain(rest)).boxed_unsync()
        }
        Ending::Hang => StreamBody::new(first.chain(stream::pending())).boxed_unsync(),
    };
    Response::from_parts(head, body)
}

/// The reply with its body in pieces of `size` bytes, with a pause before each.
pub(crate) fn dripping(reply: Reply, body: Bytes, size: usize, pause: Duration) -> Reply {
    let (mut head, _) = reply.into_parts();
    head.headers
        .insert(header::CONTENT_LENGTH, body.len().into());
    let pieces = stream::unfold(body, move |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let piece = rest.split_to(size.min(rest.len()));
        Some((Ok(Frame::data(piece)), rest))
    });
    Response::from_parts(head, StreamBody::new(pieces).boxed_unsync())
}

/// A 206 for `range` of `data`.
pub(crate) fn part(data: &[u8], range: Range<usize>) -> Reply {
    let stated = format!("bytes {}-{}/{}", range.start, range.end - 1, data.len());
    with(reply(206, data[range].to_vec()), "content-range", &stated)
}

/// What a good server answers to a GET of a blob.
pub(crate) fn serve(request: &Logged, data: &[u8]) -> Reply {
    match request.range() {
        Some(range) => part(data, range),
        None => reply(200, data.to_vec()),
    }
}

/// Bytes that repeat nowhere near.
pub(crate) fn noise(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out.into()
}

/// A blob of noise and its digest.
pub(crate) fn blob(len: usize) -> (Bytes, Digest) {
    let data = noise(len);
    let digest = Digest::of(&data);
    (data, digest)
}

/// Options that retry without long pauses and read no file of this machine.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        hosts_dirs: Vec::new(),
        retry: RetryPolicy {
            retries: 5,
            first_pause: Duration::from_millis(2),
            longest_pause: Duration::from_millis(20),
            longest_retry_after: Duration::from_secs(5),
        },
        ..ClientOptions::default()
    }
}

pub(crate) fn client() -> RegistryClient {
    RegistryClient::new(options())
}

/// A client with this `hosts.toml` for `registry`.
pub(crate) fn client_with_hosts(root: &Path, registry: &str, hosts: &str) -> RegistryClient {
    let dir = root.join(registry);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), hosts).unwrap();
    RegistryClient::new(ClientOptions {
        hosts_dirs: vec![root.to_owned()],
        ..options()
    })
}

/// Fetches a range and returns its bytes.
pub(crate) async fn get(
    client: &RegistryClient,
    repository: &Repository,
    (digest, len): (Digest, usize),
    range: Range<u64>,
) -> Result<Bytes, storage::ranges::FetchError> {
    let cause = storage::source::Cause::Demand;
    let blob = (digest, len as u64);
    let body = client.range(repository, blob, range.clone(), cause).await?;
    body.collect(range).await
}

/// `data[range]` with offsets of a blob.
pub(crate) fn slice(data: &Bytes, range: Range<u64>) -> Bytes {
    let index = |offset: u64| usize::try_from(offset).unwrap();
    data.slice(index(range.start)..index(range.end))
}
