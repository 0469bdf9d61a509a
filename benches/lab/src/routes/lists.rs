//! Catalog, tags and referrers.

use formats::digest::Digest;
use http::{HeaderName, StatusCode, header};
use serde_json::{Value, json};

use super::{Ask, method_not_allowed};
use crate::{reply::Reply, server::Shared, store::RepoName};

pub(super) fn catalog(shared: &Shared, ask: &Ask<'_>) -> Result<Reply, Reply> {
    if !ask.reads() {
        return Err(method_not_allowed());
    }
    let (page, next) = page(ask, shared.store.repos()?)?;
    let reply = Reply::json(StatusCode::OK, &json!({ "repositories": page }));
    Ok(link_to(reply, "/v2/_catalog", next))
}

pub(super) fn tags(shared: &Shared, ask: &Ask<'_>, repo: &RepoName) -> Result<Reply, Reply> {
    if !ask.reads() {
        return Err(method_not_allowed());
    }
    if !shared.store.has_repo(repo) {
        return Err(Reply::error(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            &format!("there is no repository {repo}"),
        ));
    }
    let (page, next) = page(ask, shared.store.tags(repo)?)?;
    let reply = Reply::json(
        StatusCode::OK,
        &json!({ "name": repo.as_str(), "tags": page }),
    );
    Ok(link_to(reply, &format!("/v2/{repo}/tags/list"), next))
}

pub(super) fn referrers(
    shared: &Shared,
    ask: &Ask<'_>,
    repo: &RepoName,
    subject: &Digest,
) -> Result<Reply, Reply> {
    if !ask.reads() {
        return Err(method_not_allowed());
    }
    let mut manifests = shared.store.referrers(repo, subject)?;
    let kind = ask.query.first("artifactType");
    if let Some(kind) = kind {
        manifests
            .retain(|manifest| manifest.get("artifactType").and_then(Value::as_str) == Some(kind));
    }
    let index = "application/vnd.oci.image.index.v1+json";
    let body = json!({"schemaVersion": 2, "mediaType": index, "manifests": manifests});
    let reply = Reply::json(StatusCode::OK, &body).header(header::CONTENT_TYPE, index);
    Ok(match kind {
        Some(_) => reply.header(
            HeaderName::from_static("oci-filters-applied"),
            "artifactType",
        ),
        None => reply,
    })
}

/// The names that `n` and `last` ask for, and the query of the next page.
fn page(ask: &Ask<'_>, names: Vec<String>) -> Result<(Vec<String>, Option<String>), Reply> {
    let limit = match ask.query.first("n") {
        None => usize::MAX,
        Some(text) => text.parse().map_err(|_| {
            Reply::error(
                StatusCode::BAD_REQUEST,
                "PAGINATION_NUMBER_INVALID",
                "n is not a number",
            )
        })?,
    };
    let last = ask.query.first("last").unwrap_or_default();
    let mut page: Vec<_> = names
        .into_iter()
        .filter(|name| last.is_empty() || name.as_str() > last)
        .collect();
    let more = page.len() > limit;
    page.truncate(limit);
    let next = page
        .last()
        .filter(|_| more)
        .map(|name| format!("n={limit}&last={name}"));
    Ok((page, next))
}

fn link_to(reply: Reply, path: &str, next: Option<String>) -> Reply {
    match next {
        Some(query) => reply.header(header::LINK, format!("<{path}?{query}>; rel=\"next\"")),
        None => reply,
    }
}
