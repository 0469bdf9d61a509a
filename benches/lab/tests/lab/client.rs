//! A small client, and a registry to point it at.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use lab::{Handle, Lab, LabOptions, Tls};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// A registry in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) lab: Lab,
    pub(crate) dir: TempDir,
}

impl Fixture {
    pub(crate) async fn new(change: impl FnOnce(&mut LabOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut options = LabOptions::new(dir.path());
        change(&mut options);
        let lab = Lab::start(options).await.unwrap();
        Self { lab, dir }
    }

    pub(crate) async fn plain() -> Self {
        Self::new(|_| {}).await
    }
}

/// A reply; the body is what arrived of it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// The connection ended before the body did.
    pub(crate) cut: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map(|value| value.to_str().unwrap())
            .unwrap_or_default()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// One connection.
pub(crate) struct Client {
    sender: SendRequest<Full<Bytes>>,
}

impl Client {
    pub(crate) async fn connect(lab: &Handle) -> Self {
        Self::try_connect(lab.addr()).await.unwrap()
    }

    pub(crate) async fn try_connect(addr: std::net::SocketAddr) -> std::io::Result<Self> {
        Ok(Self::over(TcpStream::connect(addr).await?).await)
    }

    pub(crate) async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(async move {
            // Tests that cut connections see it in their requests.
            let _ = connection.await;
        });
        Self { sender }
    }

    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer, hyper::Error> {
        self.sender.ready().await?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "lab.test")
            .header("user-agent", "lab-tests");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let response = self.sender.send_request(request).await?;
        let (parts, mut incoming) = response.into_parts();
        let mut body = BytesMut::new();
        let mut cut = false;
        while let Some(frame) = incoming.frame().await {
            let Ok(frame) = frame else {
                cut = true;
                break;
            };
            body.extend_from_slice(frame.data_ref().unwrap());
        }
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body: body.freeze(),
            cut,
        })
    }

    pub(crate) async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send(Method::GET, path, headers, "").await.unwrap()
    }
}

/// One request on a connection of its own.
pub(crate) async fn request(
    lab: &Handle,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Answer {
    let mut client = Client::connect(lab).await;
    client.send(method, path, headers, body).await.unwrap()
}

pub(crate) async fn get(lab: &Handle, path: &str, headers: &[(&str, &str)]) -> Answer {
    request(lab, Method::GET, path, headers, "").await
}

/// Bytes that differ from place to place.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

/// A TLS connection that trusts the CA in `roots` only.
pub(crate) async fn connect_tls(
    lab: &Handle,
    roots: rustls::RootCertStore,
) -> std::io::Result<Client> {
    assert!(lab.url().starts_with("https://"), "{:?}", Tls::PrivateCa);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(lab.addr()).await?;
    let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await?;
    Ok(Client::over(stream).await)
}
