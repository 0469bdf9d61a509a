//! Blobs: whole, in ranges, by redirect.

use std::{
    fmt::Write as _,
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use formats::digest::Digest;
use http::{HeaderName, Method, StatusCode, header};

use super::{Ask, method_not_allowed};
use crate::{
    body::Part,
    ranges::Selection,
    reply::Reply,
    server::Shared,
    store::{BlobFile, RepoName},
};

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const OCTETS: &str = "application/octet-stream";
const BOUNDARY: &str = "lab-3d6b6a416f9b5c1e";

pub(super) fn answer(
    shared: &Shared,
    ask: &Ask<'_>,
    repo: &RepoName,
    digest: &Digest,
    redirect: Option<Duration>,
) -> Result<Reply, Reply> {
    if *ask.method == Method::DELETE {
        return if shared.store.delete_blob(repo, digest)? {
            Ok(Reply::empty(StatusCode::ACCEPTED))
        } else {
            Err(unknown(digest))
        };
    }
    if !ask.reads() {
        return Err(method_not_allowed());
    }
    let blob = shared
        .store
        .open_blob(repo, digest)?
        .ok_or_else(|| unknown(digest))?;
    match redirect {
        Some(life) if *ask.method == Method::GET => {
            let location = shared.storage_url(ask.headers, repo, digest, life);
            Ok(Reply::empty(StatusCode::TEMPORARY_REDIRECT)
                .header(header::LOCATION, location)
                .header(CONTENT_DIGEST, digest.to_string()))
        }
        _ => serve(ask, digest, &blob),
    }
}

/// A blob where a redirect leads: the signed query is the permission.
pub(super) fn storage(
    shared: &Shared,
    ask: &Ask<'_>,
    repo: &RepoName,
    digest: &Digest,
) -> Result<Reply, Reply> {
    if !ask.reads() {
        return Err(method_not_allowed());
    }
    let denied = |message| Reply::error(StatusCode::FORBIDDEN, "DENIED", message);
    let expires: u64 = ask
        .query
        .first("expires")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| denied("no expiry"))?;
    let signature = ask.query.first("signature").unwrap_or_default();
    if signature != shared.signature(repo, digest, expires) {
        return Err(denied("signature does not match"));
    }
    if expires <= unix_ms() {
        return Err(denied("request has expired"));
    }
    let blob = shared
        .store
        .open_blob(repo, digest)?
        .ok_or_else(|| unknown(digest))?;
    serve(ask, digest, &blob)
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn serve(ask: &Ask<'_>, digest: &Digest, blob: &BlobFile) -> Result<Reply, Reply> {
    let etag = format!("\"{digest}\"");
    let size = blob.len;
    let reply = match Selection::parse(ask.range(), size) {
        Selection::Whole => {
            let mut reply = Reply::empty(StatusCode::OK).header(header::CONTENT_TYPE, OCTETS);
            reply.parts.push_back(stretch(blob, 0..size));
            reply
        }
        Selection::One(range) => {
            let mut reply = Reply::empty(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_TYPE, OCTETS)
                .header(header::CONTENT_RANGE, content_range(&range, size));
            reply.parts.push_back(stretch(blob, range));
            reply
        }
        Selection::Many(ranges) => multipart(blob, &ranges),
        Selection::Unsatisfiable => {
            return Err(Reply::error(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "RANGE_INVALID",
                "no byte of the requested range exists",
            )
            .header(header::CONTENT_RANGE, format!("bytes */{size}")));
        }
    };
    Ok(reply
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, etag)
        .header(header::CACHE_CONTROL, "max-age=31536000")
        .header(CONTENT_DIGEST, digest.to_string()))
}

fn multipart(blob: &BlobFile, ranges: &[Range<u64>]) -> Reply {
    let mut reply = Reply::empty(StatusCode::PARTIAL_CONTENT).header(
        header::CONTENT_TYPE,
        format!("multipart/byteranges; boundary={BOUNDARY}"),
    );
    let mut framing = String::new();
    for range in ranges {
        // Writing to a String cannot fail.
        let _ = write!(
            framing,
            "--{BOUNDARY}\r\nContent-Type: {OCTETS}\r\nContent-Range: {}\r\n\r\n",
            content_range(range, blob.len)
        );
        reply.parts.push_back(frame(&framing));
        reply.parts.push_back(stretch(blob, range.clone()));
        framing.clear();
        framing.push_str("\r\n");
    }
    let _ = write!(framing, "--{BOUNDARY}--\r\n");
    reply.parts.push_back(frame(&framing));
    reply
}

fn stretch(blob: &BlobFile, range: Range<u64>) -> Part {
    Part::File {
        file: Arc::clone(&blob.file),
        range,
    }
}

fn frame(text: &str) -> Part {
    Part::Bytes {
        bytes: Bytes::copy_from_slice(text.as_bytes()),
        content: false,
    }
}

fn content_range(range: &Range<u64>, size: u64) -> String {
    format!("bytes {}-{}/{size}", range.start, range.end - 1)
}

fn unknown(digest: &Digest) -> Reply {
    Reply::error(
        StatusCode::NOT_FOUND,
        "BLOB_UNKNOWN",
        &format!("blob {digest} is not in this repository"),
    )
}
