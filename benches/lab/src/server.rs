//! Listeners, connections, and being gone.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use formats::digest::Digest;
use http::{HeaderMap, header};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Mutex as AsyncMutex, watch},
    task::JoinSet,
};

use crate::{
    auth::Authority,
    body::Buffers,
    connection::{Connection, Port, Reporting},
    handle::Handle,
    link::{Link, LinkModel},
    log::Log,
    options::{LabOptions, Tls},
    routes,
    rules::Rules,
    store::{RepoName, Store, StoreError, uploads::Ids, uploads::Uploads},
    tls::{Setup, TlsError},
};

/// How long requests may go on after the server was told to stop.
const GRACE: Duration = Duration::from_millis(500);

/// Why a registry did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The directory cannot be used.
    #[error("open the store")]
    Store(#[from] StoreError),
    /// No certificate.
    #[error("prepare tls")]
    Tls(#[from] TlsError),
    /// An address cannot be listened on.
    #[error("listen on {addr}")]
    Listen {
        /// The address asked for.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The log file cannot be opened.
    #[error("open log file {}", path.display())]
    LogFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The server's thread or runtime cannot be started.
    #[error("start the server thread")]
    Thread(#[source] io::Error),
    /// The server's thread ended before it had started.
    #[error("the server thread ended early")]
    Ended,
}

/// A registry that listens and is not yet served.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<(Port, TcpListener)>,
}

/// Runs a registry until `shutdown` resolves.
pub async fn serve(
    options: LabOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), LabError> {
    Server::bind(options)?.run(shutdown).await;
    Ok(())
}

impl Server {
    /// Opens the store and listens. Must be called within the runtime that will serve.
    pub fn bind(options: LabOptions) -> Result<Self, LabError> {
        let store = Store::open(&options.dir)?;
        let tls = Setup::make(options.tls, &options.tls_names, &options.dir)?;
        let log = Log::open(options.log_keep, options.log_file.as_deref()).map_err(|source| {
            LabError::LogFile {
                path: options.log_file.clone().unwrap_or_default(),
                source,
            }
        })?;
        let main = listen(options.listen)?;
        let storage = listen(SocketAddr::new(options.listen.ip(), 0))?;
        let admin = options.admin.map(listen).transpose()?;

        let ids = Ids::default();
        let shared = Shared {
            store,
            uploads: Uploads::default(),
            log,
            rules: Rules::default(),
            authority: Authority::new(options.auth.clone()),
            buffers: Arc::default(),
            link: Mutex::new(options.link.map(Link::new).map(Arc::new)),
            main: main.1,
            storage: storage.1,
            admin: admin.as_ref().map(|(_, addr)| *addr),
            tls,
            key: ids.next(),
            connections: AtomicU64::new(0),
            present: watch::Sender::new(true),
            transitions: watch::Sender::new(0),
            turn: AsyncMutex::new(()),
            options,
        };
        let mut listeners = vec![(Port::Main, main.0), (Port::Storage, storage.0)];
        listeners.extend(admin.map(|(listener, _)| (Port::Admin, listener)));
        Ok(Self {
            shared: Arc::new(shared),
            listeners,
        })
    }

    /// What can be asked of it and done to it while it is served.
    pub fn handle(&self) -> Handle {
        Handle::new(self.shared.clone())
    }

    /// Serves until `shutdown` resolves; running requests then have half a second to end.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (stop, stopped) = watch::channel(false);
        let mut acceptors = JoinSet::new();
        for (port, listener) in self.listeners {
            let acceptor = Acceptor {
                shared: self.shared.clone(),
                port,
                stop: stopped.clone(),
            };
            acceptors.spawn(acceptor.run(listener));
        }
        shutdown.await;
        stop.send_replace(true);
        while acceptors.join_next().await.is_some() {}
    }
}

/// Everything requests and controls work on.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: LabOptions,
    pub(crate) store: Store,
    pub(crate) uploads: Uploads,
    pub(crate) log: Log,
    pub(crate) rules: Rules,
    pub(crate) authority: Authority,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) main: SocketAddr,
    pub(crate) storage: SocketAddr,
    pub(crate) admin: Option<SocketAddr>,
    link: Mutex<Option<Arc<Link>>>,
    tls: Option<Setup>,
    /// Signs storage URLs.
    key: String,
    connections: AtomicU64,
    present: watch::Sender<bool>,
    /// Counts listeners that have followed a change of `present`.
    transitions: watch::Sender<u64>,
    turn: AsyncMutex<()>,
}

impl Shared {
    pub(crate) fn scheme(&self) -> &'static str {
        match self.options.tls {
            Tls::Off => "http",
            Tls::PrivateCa | Tls::SelfSigned => "https",
        }
    }

    pub(crate) fn ca_pem(&self) -> Option<&Path> {
        self.tls.as_ref()?.ca_pem.as_deref()
    }

    pub(crate) fn link(&self) -> Option<LinkModel> {
        self.link.lock().as_ref().map(|link| link.model)
    }

    pub(crate) fn set_link(&self, model: Option<LinkModel>) {
        *self.link.lock() = model.map(Link::new).map(Arc::new);
    }

    /// This server as the client of a request knows it.
    pub(crate) fn origin(&self, headers: &HeaderMap) -> String {
        let host = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        match host {
            Some(host) => format!("{}://{host}", self.scheme()),
            None => format!("{}://{}", self.scheme(), self.main),
        }
    }

    /// A signed address of a blob at the storage port, under the host name the client used.
    pub(crate) fn storage_url(
        &self,
        headers: &HeaderMap,
        repo: &RepoName,
        digest: &Digest,
        life: Duration,
    ) -> String {
        let name = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok())
            .map(|host| match host.rsplit_once(':') {
                Some((name, port)) if port.bytes().all(|c| c.is_ascii_digit()) => name,
                _ => host,
            })
            .map_or_else(|| self.main.ip().to_string(), str::to_owned);
        let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        let expires = routes::unix_ms().saturating_add(life);
        let signature = self.signature(repo, digest, expires);
        format!(
            "{}://{name}:{}/storage/{repo}/{digest}?expires={expires}&signature={signature}",
            self.scheme(),
            self.storage.port()
        )
    }

    pub(crate) fn signature(&self, repo: &RepoName, digest: &Digest, expires: u64) -> String {
        let text = format!("{0}|{repo}|{digest}|{expires}|{0}", self.key);
        Digest::of(text.as_bytes()).hex()
    }

    /// Refuses and closes all connections but the control ones, or takes them again. Returns once
    /// that is so.
    pub(crate) async fn set_present(&self, present: bool) {
        let _turn = self.turn.lock().await;
        if *self.present.borrow() == present {
            return;
        }
        let mut transitions = self.transitions.subscribe();
        let before = *transitions.borrow_and_update();
        self.present.send_replace(present);
        // The registry's and the storage listener follow. The sender lives in self.
        let _ = transitions.wait_for(|count| *count >= before + 2).await;
    }
}

fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), LabError> {
    reserve(addr)
        .and_then(|socket| socket.listen(1024))
        .and_then(|listener| {
            let addr = listener.local_addr()?;
            Ok((listener, addr))
        })
        .map_err(|source| LabError::Listen { addr, source })
}

/// A bound socket that does not listen: it keeps the port while connections are refused.
fn reserve(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}

/// One listening port.
struct Acceptor {
    shared: Arc<Shared>,
    port: Port,
    stop: watch::Receiver<bool>,
}

impl Acceptor {
    async fn run(mut self, mut listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut present = self.shared.present.subscribe();
        loop {
            tokio::select! {
                biased;
                () = becomes(&mut self.stop, true) => break,
                () = becomes(&mut present, false), if self.port != Port::Admin => {
                    let Some(back) = self.gone(listener, &mut connections, &mut present).await
                    else {
                        return;
                    };
                    listener = back;
                }
                _ = connections.join_next(), if !connections.is_empty() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let accepted = Instant::now();
                        let shared = self.shared.clone();
                        let stop = self.stop.clone();
                        connections.spawn(converse(shared, self.port, stream, accepted, stop));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                },
            }
        }
        drop(listener);
        let drain = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, drain).await.is_err() {
            connections.shutdown().await;
        }
    }

    /// Refuses connections until told otherwise; `None` if the server stops meanwhile.
    async fn gone(
        &mut self,
        listener: TcpListener,
        connections: &mut JoinSet<()>,
        present: &mut watch::Receiver<bool>,
    ) -> Option<TcpListener> {
        let addr = listener.local_addr().ok()?;
        drop(listener);
        let mut reserved = reserve(addr);
        connections.shutdown().await;
        self.followed();
        tokio::select! {
            () = becomes(present, true) => {}
            () = becomes(&mut self.stop, true) => return None,
        }
        loop {
            match reserved.and_then(|socket| socket.listen(1024)) {
                Ok(listener) => {
                    self.followed();
                    return Some(listener);
                }
                Err(error) => {
                    tracing::warn!(%error, %addr, "cannot listen again");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    reserved = reserve(addr);
                }
            }
        }
    }

    fn followed(&self) {
        self.shared.transitions.send_modify(|count| *count += 1);
    }
}

/// Waits for a value. Without a sender it will never come, which is as good as it being there.
async fn becomes(flag: &mut watch::Receiver<bool>, value: bool) {
    let _ = flag.wait_for(|flag| *flag == value).await;
}

/// Serves one connection.
async fn converse(
    shared: Arc<Shared>,
    port: Port,
    stream: TcpStream,
    accepted: Instant,
    stop: watch::Receiver<bool>,
) {
    let link = match port {
        Port::Main | Port::Storage => shared.link.lock().clone(),
        Port::Admin => None,
    };
    let tls = match port {
        Port::Main | Port::Storage => shared.tls.as_ref().map(|tls| tls.acceptor.clone()),
        Port::Admin => None,
    };
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    if let Some(link) = &link {
        let trips = if tls.is_some() { 2 } else { 1 };
        link.sleep_until(accepted + link.model.rtt * trips).await;
    }
    let id = shared.connections.fetch_add(1, Ordering::Relaxed);
    let connection = Arc::new(Connection::new(id, port, link, &stream));
    match tls {
        None => speak(shared, connection, stream, stop).await,
        Some(acceptor) => match acceptor.accept(stream).await {
            Ok(stream) => speak(shared, connection, stream, stop).await,
            Err(error) => tracing::debug!(%error, "tls handshake failed"),
        },
    }
}

async fn speak(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut stop: watch::Receiver<bool>,
) {
    let io = TokioIo::new(Reporting::new(stream, connection.clone()));
    let service = service_fn(|request| routes::handle(shared.clone(), connection.clone(), request));
    let mut http = pin!(
        http1::Builder::new()
            .header_read_timeout(None)
            .serve_connection(io, service)
    );
    let served = tokio::select! {
        served = http.as_mut() => served,
        () = becomes(&mut stop, true) => {
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, id = connection.id, "connection ended");
    }
}
