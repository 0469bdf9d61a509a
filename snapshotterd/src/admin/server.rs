//! HTTP/1 on a socket.

use std::{convert::Infallible, io, path::Path, time::Duration};

use http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinHandle,
};

use super::{Answer, Query, Request, Routes};
use crate::{metrics::Address, service::socket};

const BODY_LIMIT_BYTES: usize = 1 << 20;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A running server; dropping it stops accepting.
#[derive(Debug)]
pub struct Server {
    accepting: JoinHandle<()>,
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve HTTP on {address}")]
pub struct ServerError {
    /// Where.
    pub address: String,
    /// Why.
    pub source: io::Error,
}

impl Server {
    /// Serves `routes` on the unix socket `path`, which only root may open.
    pub fn unix(path: &Path, routes: Routes) -> Result<Self, ServerError> {
        let listener = socket::bind(path).map_err(|source| ServerError {
            address: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            accepting: tokio::spawn(accept_unix(listener, routes)),
        })
    }

    /// Serves `routes` where configured; nothing for [`Address::Off`].
    pub async fn at(address: &Address, routes: Routes) -> Result<Option<Self>, ServerError> {
        match address {
            Address::Off => Ok(None),
            Address::Unix(path) => Self::unix(path, routes).map(Some),
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)
                    .await
                    .map_err(|source| ServerError {
                        address: address.to_string(),
                        source,
                    })?;
                Ok(Some(Self {
                    accepting: tokio::spawn(accept_tcp(listener, routes)),
                }))
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept_unix(listener: UnixListener, routes: Routes) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve(stream, routes.clone()))),
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, routes: Routes) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve(stream, routes.clone()))),
            Err(error) => pause(&error).await,
        }
    }
}

/// Out of descriptors, most likely: trying again at once would spin.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "cannot accept an HTTP connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, routes: Routes) {
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(answer(request, &routes).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "HTTP connection");
    }
}

async fn answer(
    request: http::Request<Incoming>,
    routes: &Routes,
) -> http::Response<Full<bytes::Bytes>> {
    let work = async {
        let (parts, body) = request.into_parts();
        match Limited::new(body, BODY_LIMIT_BYTES).collect().await {
            Ok(body) => {
                let request = Request {
                    method: parts.method,
                    path: parts.uri.path().to_owned(),
                    query: Query::parse(parts.uri.query().unwrap_or_default()),
                    body: body.to_bytes(),
                };
                routes.answer(request).await
            }
            Err(error) => Answer::error(StatusCode::BAD_REQUEST, error),
        }
    };
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, work)
        .await
        .unwrap_or_else(|_| Answer::error(StatusCode::GATEWAY_TIMEOUT, "no answer in time"));
    let mut response = http::Response::new(Full::new(answer.body));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(answer.content_type),
    );
    response
}
