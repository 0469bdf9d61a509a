//! Making connections: TCP, through a proxy where one is set, with TLS where the URL asks for it,
//! all of it within a time limit.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::legacy::connect::{Connected, Connection, HttpConnector},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tower::Service;

use super::{hosts::split_port, proxy::ProxyConfig};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Dialing<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Longest reply of a proxy to CONNECT.
const MAX_CONNECT_REPLY: usize = 8 << 10;

/// Connects to the origin of a URL.
#[derive(Clone)]
pub(super) struct Dialer {
    https: HttpsConnector<Tcp>,
    limit: Duration,
}

/// Connects to the origin of a URL or its proxy, without TLS.
#[derive(Clone)]
struct Tcp {
    http: HttpConnector,
    proxy: Arc<ProxyConfig>,
    connections: Arc<AtomicU64>,
}

impl Dialer {
    /// A dialer that gives up after `limit` and counts the TCP connections it makes.
    pub(super) fn new(
        tls: rustls::ClientConfig,
        proxy: Arc<ProxyConfig>,
        limit: Duration,
        connections: Arc<AtomicU64>,
    ) -> Self {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(KEEPALIVE_IDLE));
        http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
        http.set_connect_timeout(Some(limit));
        let tcp = Tcp {
            http,
            proxy,
            connections,
        };
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Self { https, limit }
    }
}

impl Service<Uri> for Dialer {
    type Response = MaybeHttpsStream<Stream>;
    type Error = BoxError;
    type Future = Dialing<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (dialing, limit) = (self.https.call(uri), self.limit);
        Box::pin(async move {
            timeout(limit, dialing).await.unwrap_or_else(|_| {
                let message = format!("no connection within {:.1} s", limit.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, message).into())
            })
        })
    }
}

impl Service<Uri> for Tcp {
    type Response = Stream;
    type Error = BoxError;
    type Future = Dialing<Stream>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let proxy = self.proxy.proxy_for(&uri).cloned();
        let mut http = self.http.clone();
        let connections = Arc::clone(&self.connections);
        Box::pin(async move {
            let Some(proxy) = proxy else {
                let io = http.call(uri).await?;
                connections.fetch_add(1, Ordering::Relaxed);
                return Ok(Stream { io, proxied: false });
            };
            let through: Uri = format!("http://{}", proxy.authority).parse()?;
            let mut io = http.call(through).await.map_err(|error| {
                let error = crate::ranges::report(&error);
                io::Error::other(format!("proxy {}: {error}", proxy.authority))
            })?;
            connections.fetch_add(1, Ordering::Relaxed);
            let tunnel = uri.scheme_str() == Some("https");
            if tunnel {
                let stream = io.inner_mut();
                connect(stream, &uri, proxy.authorization.as_ref())
                    .await
                    .map_err(|error| {
                        let message = format!("proxy {}: {error}", proxy.authority);
                        io::Error::new(error.kind(), message)
                    })?;
            }
            Ok(Stream {
                io,
                proxied: !tunnel,
            })
        })
    }
}

/// Asks a proxy for a tunnel to the origin of `uri`.
async fn connect(
    stream: &mut TcpStream,
    uri: &Uri,
    authorization: Option<&HeaderValue>,
) -> io::Result<()> {
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let (host, port) = split_port(authority);
    let brackets = if host.contains(':') {
        ("[", "]")
    } else {
        ("", "")
    };
    let port = port.unwrap_or("443");
    let origin = format!("{}{host}{}:{port}", brackets.0, brackets.1);
    let mut request = format!("CONNECT {origin} HTTP/1.1\r\nHost: {origin}\r\n").into_bytes();
    if let Some(authorization) = authorization {
        request.extend_from_slice(b"Proxy-Authorization: ");
        request.extend_from_slice(authorization.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    stream.write_all(&request).await?;
    // The origin speaks only after our hello, so nothing of it can follow the proxy's reply.
    let mut reply = Vec::new();
    while !reply.ends_with(b"\r\n\r\n") {
        if reply.len() >= MAX_CONNECT_REPLY {
            return Err(io::Error::other("the reply to CONNECT is too long"));
        }
        if stream.read_buf(&mut reply).await? == 0 {
            return Err(io::Error::other("the connection was closed after CONNECT"));
        }
    }
    let line = reply.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.splitn(3, ' ');
    let (version, status) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    if version.starts_with("HTTP/1.") && status.len() == 3 && status.starts_with('2') {
        return Ok(());
    }
    let shown: String = line.chars().take(200).collect();
    Err(io::Error::other(format!(
        "CONNECT {origin} was answered with {shown:?}"
    )))
}

/// A TCP connection that knows whether a proxy is at its other end.
pub(super) struct Stream {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        // With a proxy, requests are written with the absolute URL.
        self.io.connected().proxy(self.proxied)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
