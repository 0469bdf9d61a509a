//! Manifests.

use formats::digest::Digest;
use http::{HeaderName, Method, StatusCode, header};
use hyper::body::Incoming;
use serde_json::Value;

use super::{Ask, method_not_allowed, uploads::collect};
use crate::{
    connection::Connection,
    reply::Reply,
    server::Shared,
    store::{Reference, RepoName},
};

/// What the specification tells registries to accept at least.
const MAX_MANIFEST: usize = 4 << 20;
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

pub(super) async fn answer(
    shared: &Shared,
    connection: &Connection,
    ask: &Ask<'_>,
    repo: &RepoName,
    reference: &Reference,
    body: Incoming,
) -> Result<Reply, Reply> {
    match *ask.method {
        Method::GET | Method::HEAD => pull(shared, ask, repo, reference),
        Method::PUT => push(shared, connection, ask, repo, reference, body).await,
        Method::DELETE if shared.store.delete_manifest(repo, reference)? => {
            Ok(Reply::empty(StatusCode::ACCEPTED))
        }
        Method::DELETE => Err(unknown(repo, reference)),
        _ => Err(method_not_allowed()),
    }
}

fn pull(
    shared: &Shared,
    ask: &Ask<'_>,
    repo: &RepoName,
    reference: &Reference,
) -> Result<Reply, Reply> {
    let manifest = shared
        .store
        .manifest(repo, reference)?
        .ok_or_else(|| unknown(repo, reference))?;
    if !accepts(ask, &manifest.media_type) {
        return Err(Reply::error(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            &format!(
                "{repo}:{reference} is {}, which the request does not accept",
                manifest.media_type
            ),
        ));
    }
    let digest = manifest.digest.to_string();
    Ok(
        Reply::content(StatusCode::OK, &manifest.media_type, manifest.bytes)
            .header(header::ETAG, format!("\"{digest}\""))
            .header(CONTENT_DIGEST, digest),
    )
}

async fn push(
    shared: &Shared,
    connection: &Connection,
    ask: &Ask<'_>,
    repo: &RepoName,
    reference: &Reference,
    body: Incoming,
) -> Result<Reply, Reply> {
    let bytes = collect(connection, body, MAX_MANIFEST).await?;
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|error| invalid(&error.to_string()))?;
    if !value.is_object() {
        return Err(invalid("a manifest is a JSON object"));
    }
    let media_type = ask
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .or_else(|| value.get("mediaType").and_then(Value::as_str))
        .ok_or_else(|| invalid("neither Content-Type nor mediaType names its type"))?;
    for digest in needed_blobs(&value) {
        let present = digest
            .parse::<Digest>()
            .is_ok_and(|digest| shared.store.blob_len(repo, &digest).is_some());
        if !present {
            return Err(Reply::error(
                StatusCode::BAD_REQUEST,
                "MANIFEST_BLOB_UNKNOWN",
                &format!("blob {digest} is not in {repo}; push it first"),
            ));
        }
    }
    let digest = shared
        .store
        .put_manifest(repo, reference, media_type, &bytes)?;
    let mut reply = Reply::empty(StatusCode::CREATED)
        .header(header::LOCATION, format!("/v2/{repo}/manifests/{digest}"))
        .header(CONTENT_DIGEST, digest.to_string());
    if let Some(subject) = value
        .get("subject")
        .and_then(|subject| subject.get("digest"))
    {
        reply = reply.header(
            HeaderName::from_static("oci-subject"),
            subject.as_str().unwrap_or_default(),
        );
    }
    Ok(reply)
}

/// Digests of the config and the layers, but for those that live elsewhere by declaration.
fn needed_blobs(manifest: &Value) -> impl Iterator<Item = &str> {
    let layers = manifest
        .get("layers")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    manifest
        .get("config")
        .into_iter()
        .chain(layers)
        .filter(|descriptor| descriptor.get("urls").is_none())
        .filter_map(|descriptor| descriptor.get("digest")?.as_str())
}

fn accepts(ask: &Ask<'_>, media_type: &str) -> bool {
    let mut any = false;
    for value in ask.headers.get_all(header::ACCEPT) {
        any = true;
        let accepted = value.to_str().unwrap_or_default().split(',').any(|range| {
            let range = range.split(';').next().unwrap_or_default().trim();
            range == "*/*" || range == media_type || range == "application/*"
        });
        if accepted {
            return true;
        }
    }
    !any
}

fn invalid(message: &str) -> Reply {
    Reply::error(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
}

fn unknown(repo: &RepoName, reference: &Reference) -> Reply {
    Reply::error(
        StatusCode::NOT_FOUND,
        "MANIFEST_UNKNOWN",
        &format!("{repo} has no manifest {reference}"),
    )
}
