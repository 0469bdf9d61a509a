//! The daemon's admin socket: JSON over HTTP.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// `GET path`.
pub async fn get(socket: &Path, path: &str) -> Result<Value> {
    json(path, &call(socket, Method::GET, path, None).await?)
}

/// `GET path`, an answer that is text.
pub async fn get_text(socket: &Path, path: &str) -> Result<String> {
    let answer = call(socket, Method::GET, path, None).await?;
    String::from_utf8(answer.to_vec()).with_context(|| format!("{path}: not UTF-8"))
}

/// `POST path` with a JSON body.
pub async fn post(socket: &Path, path: &str, body: &Value) -> Result<Value> {
    json(path, &call(socket, Method::POST, path, Some(body)).await?)
}

async fn call(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "cannot reach snapshotterd at {}: is it running?",
            socket.display()
        )
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let body = body
        .map(serde_json::to_vec)
        .transpose()?
        .unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "snapshotterd")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!(
            "{path}: {status}: {}",
            String::from_utf8_lossy(&bytes).trim()
        );
    }
    Ok(bytes)
}

fn json(path: &str, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).with_context(|| format!("{path}: not JSON"))
}
