//! Uploads: in one request, or in chunks.

use std::sync::Arc;

use bytes::Bytes;
use formats::digest::Digest;
use http::{HeaderName, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming as Body;

use super::{Ask, blocking, method_not_allowed};
use crate::{
    connection::Connection,
    reply::Reply,
    server::Shared,
    store::{Incoming, RepoName},
};

/// Bytes collected before they are hashed and written.
const STEP: usize = 1 << 20;

/// POST: mounts a blob, takes it whole, or begins a session.
pub(super) async fn start(
    shared: &Arc<Shared>,
    connection: &Connection,
    ask: &Ask<'_>,
    repo: &RepoName,
    body: Body,
) -> Result<Reply, Reply> {
    if *ask.method != Method::POST {
        return Err(method_not_allowed());
    }
    if let Some(mount) = ask.query.first("mount") {
        let digest = parse_digest(mount)?;
        let from = match ask.query.first("from") {
            Some(from) => Some(from.parse().map_err(crate::store::StoreError::from)?),
            None => None,
        };
        if shared.store.mount_blob(repo, &digest, from.as_ref())? {
            return Ok(created(repo, &digest));
        }
    }
    if let Some(digest) = ask.query.first("digest") {
        let expected = parse_digest(digest)?;
        let content = receive(connection, shared.store.incoming()?, body).await?;
        return commit(shared, content, repo, expected).await;
    }
    let id = shared.uploads.begin(&shared.store, repo)?;
    Ok(progress(StatusCode::ACCEPTED, repo, &id, 0))
}

/// Everything on a session's own URL.
pub(super) async fn go_on(
    shared: &Arc<Shared>,
    connection: &Connection,
    ask: &Ask<'_>,
    repo: &RepoName,
    id: &str,
    body: Body,
) -> Result<Reply, Reply> {
    let session = shared.uploads.find(repo, id).ok_or_else(unknown)?;
    let mut slot = session.content.lock().await;
    let len = slot.as_ref().ok_or_else(unknown)?.len;
    match *ask.method {
        Method::GET | Method::HEAD => Ok(progress(StatusCode::NO_CONTENT, repo, id, len)),
        Method::DELETE => {
            slot.take();
            shared.uploads.end(id);
            Ok(Reply::empty(StatusCode::NO_CONTENT))
        }
        Method::PATCH => {
            in_order(ask, len, repo, id)?;
            let content = slot.take().ok_or_else(unknown)?;
            let content = receive(connection, content, body).await?;
            let len = content.len;
            *slot = Some(content);
            Ok(progress(StatusCode::ACCEPTED, repo, id, len))
        }
        Method::PUT => {
            in_order(ask, len, repo, id)?;
            let digest = ask.query.first("digest").ok_or_else(|| {
                Reply::error(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "no digest given")
            })?;
            let expected = parse_digest(digest)?;
            let content = slot.take().ok_or_else(unknown)?;
            shared.uploads.end(id);
            let content = receive(connection, content, body).await?;
            commit(shared, content, repo, expected).await
        }
        _ => Err(method_not_allowed()),
    }
}

/// A small request body as a whole.
pub(super) async fn collect(
    connection: &Connection,
    mut body: Body,
    limit: usize,
) -> Result<Vec<u8>, Reply> {
    let mut bytes = Vec::new();
    while let Some(data) = next(connection, &mut body).await? {
        if bytes.len() + data.len() > limit {
            return Err(Reply::error(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                &format!("more than {limit} bytes"),
            ));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

async fn receive(
    connection: &Connection,
    mut content: Incoming,
    mut body: Body,
) -> Result<Incoming, Reply> {
    let mut pending: Vec<Bytes> = Vec::new();
    let mut bytes = 0;
    loop {
        let data = next(connection, &mut body).await?;
        let ended = data.is_none();
        if let Some(data) = data {
            bytes += data.len();
            pending.push(data);
        }
        if bytes >= STEP || (ended && bytes > 0) {
            let batch = std::mem::take(&mut pending);
            bytes = 0;
            content = blocking(move || {
                batch.iter().try_for_each(|data| content.append(data))?;
                Ok(content)
            })
            .await?;
        }
        if ended {
            return Ok(content);
        }
    }
}

async fn next(connection: &Connection, body: &mut Body) -> Result<Option<Bytes>, Reply> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            Reply::error(
                StatusCode::BAD_REQUEST,
                "BLOB_UPLOAD_INVALID",
                &format!("the request body broke off: {error}"),
            )
        })?;
        if let Ok(data) = frame.into_data() {
            if let Some((link, _)) = &connection.link {
                link.receive(data.len() as u64).await;
            }
            return Ok(Some(data));
        }
    }
    Ok(None)
}

async fn commit(
    shared: &Arc<Shared>,
    content: Incoming,
    repo: &RepoName,
    expected: Digest,
) -> Result<Reply, Reply> {
    let store = shared.store.clone();
    let name = repo.clone();
    blocking(move || store.commit(&content, &name, Some(expected))).await?;
    Ok(created(repo, &expected))
}

/// Chunks come one after the other: the specification's 416 for a `Content-Range` that does not
/// start where the last chunk ended.
fn in_order(ask: &Ask<'_>, len: u64, repo: &RepoName, id: &str) -> Result<(), Reply> {
    let Some(value) = ask.headers.get(header::CONTENT_RANGE) else {
        return Ok(());
    };
    let first = value
        .to_str()
        .ok()
        .map(|text| text.trim_start_matches("bytes "))
        .and_then(|text| text.split_once('-'))
        .and_then(|(first, _)| first.trim().parse::<u64>().ok());
    if first == Some(len) {
        Ok(())
    } else {
        Err(progress(StatusCode::RANGE_NOT_SATISFIABLE, repo, id, len))
    }
}

fn parse_digest(text: &str) -> Result<Digest, Reply> {
    text.parse().map_err(|error: formats::digest::DigestError| {
        Reply::error(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            &error.to_string(),
        )
    })
}

fn progress(status: StatusCode, repo: &RepoName, id: &str, len: u64) -> Reply {
    Reply::empty(status)
        .header(header::LOCATION, format!("/v2/{repo}/blobs/uploads/{id}"))
        .header(header::RANGE, format!("0-{}", len.saturating_sub(1)))
        .header(HeaderName::from_static("docker-upload-uuid"), id)
}

fn created(repo: &RepoName, digest: &Digest) -> Reply {
    Reply::empty(StatusCode::CREATED)
        .header(header::LOCATION, format!("/v2/{repo}/blobs/{digest}"))
        .header(
            HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        )
}

fn unknown() -> Reply {
    Reply::error(
        StatusCode::NOT_FOUND,
        "BLOB_UPLOAD_UNKNOWN",
        "no such upload",
    )
}
