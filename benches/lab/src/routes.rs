//! From a request to a reply.

use std::{sync::Arc, time::Instant};

use formats::digest::Digest;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use hyper::body::Incoming;

use crate::{
    auth::Need,
    body::{Outgoing, ReplyBody},
    connection::{Connection, Port},
    link::Pacer,
    log::{Head, RequestKind},
    query::{Query, decode},
    ranges::Selection,
    reply::Reply,
    rules::{Effects, Instead, Probe},
    server::Shared,
    store::{NameError, Reference, RepoName},
};

pub(crate) mod admin;
mod blobs;
mod lists;
mod manifests;
mod uploads;

pub(crate) use self::blobs::unix_ms;

/// A rule wants the connection closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("closed by a rule")]
pub(crate) struct Closed;

/// What a path asks for.
#[derive(Debug)]
enum Route {
    Base,
    Token,
    Catalog,
    Tags(RepoName),
    Referrers(RepoName, Digest),
    Manifest(RepoName, Reference),
    Blob(RepoName, Digest),
    /// A blob by its redirect.
    Storage(RepoName, Digest),
    StartUpload(RepoName),
    Upload(RepoName, String),
    Admin(String),
    /// An answer already: a name or digest in the path is not valid.
    Bad(Reply),
    Unknown,
}

/// A request's parts as the handlers want them.
pub(crate) struct Ask<'a> {
    pub(crate) method: &'a Method,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) query: Query,
    pub(crate) ignore_range: bool,
}

impl Ask<'_> {
    /// The `Range` header, where it means something.
    fn range(&self) -> Option<&str> {
        if self.ignore_range || self.method != Method::GET {
            return None;
        }
        self.headers.get(header::RANGE)?.to_str().ok()
    }

    fn reads(&self) -> bool {
        matches!(*self.method, Method::GET | Method::HEAD)
    }
}

/// Answers one request.
pub(crate) async fn handle(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, Closed> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    let mut ask = Ask {
        method: &parts.method,
        uri: &parts.uri,
        headers: &parts.headers,
        query: Query::parse(parts.uri.query().unwrap_or_default()),
        ignore_range: false,
    };
    let route = Route::parse(&ask, connection.port);
    if let Route::Admin(path) = &route {
        let reply = admin::answer(&shared, &connection, &ask, path, body).await;
        return Ok(respond(reply, ask.method, |parts| Outgoing {
            parts,
            faults: crate::rules::BodyFaults::default(),
            pacer: None,
            recording: None,
            connection,
            buffers: shared.buffers.clone(),
        }));
    }

    let recording = shared.log.begin(head(&ask, &route, arrived, connection.id));
    let link = connection.link.as_ref().map(|(link, _)| link.clone());
    let mut worked_from = arrived;
    if let Some(link) = &link {
        link.sleep_until(arrived + link.model.rtt / 2).await;
        worked_from = Instant::now();
    }

    let mut effects = effects(&shared, &ask, &route);
    if !effects.delay.is_zero() {
        tokio::time::sleep(effects.delay).await;
    }
    for gate in &effects.gates {
        gate.pass().await;
    }
    ask.ignore_range = effects.ignore_range;
    let reply = match effects.instead.take() {
        Some(Instead::Close) => {
            recording.answered(None, 0, effects.rules);
            return Err(Closed);
        }
        Some(Instead::Status { status: 401, .. }) => {
            let need = Need::of(ask.method, route.repo().map(RepoName::as_str));
            let origin = shared.origin(ask.headers);
            shared
                .authority
                .challenge(need, &origin, Some("invalid_token"))
        }
        Some(Instead::Status {
            status,
            retry_after,
        }) => scripted(status, retry_after.as_deref()),
        None => match denied(&shared, &ask, &route, connection.port) {
            Some(challenge) => challenge,
            None => dispatch(&shared, &connection, &ask, &mut effects, route, body).await,
        },
    };
    let reply = shift_content_range(reply, effects.shift);

    let mut pacer = None;
    if let (Some(link), Some((_, window))) = (link, &connection.link) {
        // Half of the way took a little more than half a round trip: the clock's lateness is not
        // the line's.
        let at = arrived + link.model.rtt + worked_from.elapsed();
        link.sleep_until(at).await;
        pacer = Some(Pacer {
            link,
            window: window.clone(),
            eligible: at,
        });
    }
    recording.answered(Some(reply.status.as_u16()), reply.len(), effects.rules);
    Ok(respond(reply, ask.method, |parts| Outgoing {
        parts,
        faults: effects.body,
        pacer,
        recording: Some(recording),
        connection: connection.clone(),
        buffers: shared.buffers.clone(),
    }))
}

impl Route {
    fn parse(ask: &Ask<'_>, port: Port) -> Self {
        let path = decode(ask.uri.path());
        if let Some(rest) = path.strip_prefix("/_lab/") {
            return Self::Admin(rest.to_owned());
        }
        match port {
            Port::Main => Self::registry(&path),
            Port::Storage => path
                .strip_prefix("/storage/")
                .and_then(|rest| rest.rsplit_once('/'))
                .and_then(|(repo, digest)| {
                    Some(Self::Storage(repo.parse().ok()?, digest.parse().ok()?))
                })
                .unwrap_or(Self::Unknown),
            Port::Admin => Self::Unknown,
        }
    }

    fn registry(path: &str) -> Self {
        if path == "/token" {
            return Self::Token;
        }
        let Some(rest) = path.strip_prefix("/v2") else {
            return Self::Unknown;
        };
        let segments: Vec<&str> = rest.trim_start_matches('/').split('/').collect();
        let named = match segments.as_slice() {
            [""] => return Self::Base,
            ["_catalog"] => return Self::Catalog,
            [name @ .., "tags", "list"] => repo(name).map(Self::Tags),
            [name @ .., "blobs", "uploads", ""] | [name @ .., "blobs", "uploads"] => {
                repo(name).map(Self::StartUpload)
            }
            [name @ .., "blobs", "uploads", id] => {
                repo(name).map(|name| Self::Upload(name, (*id).to_owned()))
            }
            [name @ .., "blobs", digest] => both(name, digest).map(|(n, d)| Self::Blob(n, d)),
            [name @ .., "referrers", digest] => {
                both(name, digest).map(|(n, d)| Self::Referrers(n, d))
            }
            [name @ .., "manifests", reference] => repo(name).and_then(|name| {
                let reference = reference.parse().map_err(|e: NameError| bad_manifest(&e))?;
                Ok(Self::Manifest(name, reference))
            }),
            _ => return Self::Unknown,
        };
        named.unwrap_or_else(Self::Bad)
    }

    fn kind(&self) -> RequestKind {
        match self {
            Self::Base => RequestKind::Base,
            Self::Token => RequestKind::Token,
            Self::Catalog | Self::Tags(_) | Self::Referrers(..) => RequestKind::List,
            Self::Manifest(..) => RequestKind::Manifest,
            Self::Blob(..) => RequestKind::Blob,
            Self::Storage(..) => RequestKind::Storage,
            Self::StartUpload(_) | Self::Upload(..) => RequestKind::Upload,
            Self::Admin(_) | Self::Bad(_) | Self::Unknown => RequestKind::Other,
        }
    }

    fn repo(&self) -> Option<&RepoName> {
        match self {
            Self::Tags(repo)
            | Self::Referrers(repo, _)
            | Self::Manifest(repo, _)
            | Self::Blob(repo, _)
            | Self::Storage(repo, _)
            | Self::StartUpload(repo)
            | Self::Upload(repo, _) => Some(repo),
            _ => None,
        }
    }

    fn digest(&self) -> Option<Digest> {
        match self {
            Self::Referrers(_, digest)
            | Self::Blob(_, digest)
            | Self::Storage(_, digest)
            | Self::Manifest(_, Reference::Digest(digest)) => Some(*digest),
            _ => None,
        }
    }

    fn reference(&self) -> Option<String> {
        match self {
            Self::Manifest(_, reference) => Some(reference.to_string()),
            _ => None,
        }
    }
}

fn repo(segments: &[&str]) -> Result<RepoName, Reply> {
    let name = segments.join("/");
    name.parse().map_err(|error: NameError| {
        Reply::error(StatusCode::BAD_REQUEST, "NAME_INVALID", &error.to_string())
    })
}

fn both(name: &[&str], digest: &str) -> Result<(RepoName, Digest), Reply> {
    let name = repo(name)?;
    let digest = digest
        .parse()
        .map_err(|error: formats::digest::DigestError| {
            Reply::error(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                &error.to_string(),
            )
        })?;
    Ok((name, digest))
}

fn bad_manifest(error: &NameError) -> Reply {
    Reply::error(
        StatusCode::BAD_REQUEST,
        "MANIFEST_INVALID",
        &error.to_string(),
    )
}

fn head(ask: &Ask<'_>, route: &Route, arrived: Instant, connection: u64) -> Head {
    let text = |name| Some(ask.headers.get(name)?.to_str().ok()?.to_owned());
    Head {
        index: 0,
        arrived,
        connection,
        method: ask.method.to_string(),
        path: ask
            .uri
            .path_and_query()
            .map_or_else(|| ask.uri.to_string(), ToString::to_string),
        kind: route.kind(),
        repo: route.repo().map(ToString::to_string),
        reference: route.reference(),
        digest: route.digest(),
        range: text(header::RANGE),
        user_agent: text(header::USER_AGENT),
        authorization: ask.headers.contains_key(header::AUTHORIZATION),
    }
}

fn effects(shared: &Shared, ask: &Ask<'_>, route: &Route) -> Effects {
    if shared.rules.is_empty() {
        return Effects::default();
    }
    let selection = match route {
        Route::Blob(repo, digest) | Route::Storage(repo, digest) => {
            let size = shared.store.blob_len(repo, digest);
            size.map(|size| (Selection::parse(ask.range(), size), size))
        }
        _ => None,
    };
    shared.rules.apply(&Probe {
        kind: route.kind(),
        method: ask.method.as_str(),
        repo: route.repo().map(RepoName::as_str),
        digest: route.digest(),
        reference: route.reference().as_deref(),
        selection,
        ranged: ask.headers.contains_key(header::RANGE),
    })
}

fn scripted(status: u16, retry_after: Option<&str>) -> Reply {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let code = match status.as_u16() {
        403 => "DENIED",
        404 => "BLOB_UNKNOWN",
        429 => "TOOMANYREQUESTS",
        _ => "UNKNOWN",
    };
    let reply = Reply::error(status, code, "answered by a rule");
    match retry_after {
        Some(value) => reply.header(header::RETRY_AFTER, value),
        None => reply,
    }
}

/// The challenge, if the request lacks credentials.
fn denied(shared: &Shared, ask: &Ask<'_>, route: &Route, port: Port) -> Option<Reply> {
    if port != Port::Main || matches!(route, Route::Token) {
        return None;
    }
    let need = Need::of(ask.method, route.repo().map(RepoName::as_str));
    shared
        .authority
        .check(ask.headers, need, &shared.origin(ask.headers))
}

async fn dispatch(
    shared: &Arc<Shared>,
    connection: &Connection,
    ask: &Ask<'_>,
    effects: &mut Effects,
    route: Route,
    body: Incoming,
) -> Reply {
    let answered = match route {
        Route::Base => Ok(Reply::content(StatusCode::OK, "application/json", "{}")),
        Route::Token => token(shared, connection, ask, body).await,
        Route::Catalog => lists::catalog(shared, ask),
        Route::Tags(repo) => lists::tags(shared, ask, &repo),
        Route::Referrers(repo, digest) => lists::referrers(shared, ask, &repo, &digest),
        Route::Manifest(repo, reference) => {
            manifests::answer(shared, connection, ask, &repo, &reference, body).await
        }
        Route::Blob(repo, digest) => {
            let redirect = effects.redirect.or(shared.options.redirect);
            blobs::answer(shared, ask, &repo, &digest, redirect)
        }
        Route::Storage(repo, digest) => blobs::storage(shared, ask, &repo, &digest),
        Route::StartUpload(repo) => uploads::start(shared, connection, ask, &repo, body).await,
        Route::Upload(repo, id) => uploads::go_on(shared, connection, ask, &repo, &id, body).await,
        Route::Bad(reply) => Err(reply),
        Route::Admin(_) | Route::Unknown => Err(Reply::error(
            StatusCode::NOT_FOUND,
            "UNSUPPORTED",
            "no such endpoint",
        )),
    };
    answered.unwrap_or_else(|error| error).header(
        header::HeaderName::from_static("docker-distribution-api-version"),
        "registry/2.0",
    )
}

async fn token(
    shared: &Shared,
    connection: &Connection,
    ask: &Ask<'_>,
    body: Incoming,
) -> Result<Reply, Reply> {
    let form = if ask.method == Method::POST {
        let bytes = uploads::collect(connection, body, 64 << 10).await?;
        Some(Query::parse(&String::from_utf8_lossy(&bytes)))
    } else {
        None
    };
    Ok(shared
        .authority
        .token(ask.headers, &ask.query, form.as_ref()))
}

fn shift_content_range(reply: Reply, by: i64) -> Reply {
    let shifted = (by != 0)
        .then(|| {
            let text = reply.headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
            let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = range.split_once('-')?;
            let first: u64 = first.parse().ok()?;
            let last: u64 = last.parse().ok()?;
            Some(format!(
                "bytes {}-{}/{size}",
                first.saturating_add_signed(by),
                last.saturating_add_signed(by)
            ))
        })
        .flatten();
    match shifted {
        Some(value) => reply.header(header::CONTENT_RANGE, value),
        None => reply,
    }
}

fn respond(
    reply: Reply,
    method: &Method,
    outgoing: impl FnOnce(std::collections::VecDeque<crate::body::Part>) -> Outgoing,
) -> Response<ReplyBody> {
    let length = reply.len();
    let bodiless = reply.status == StatusCode::NO_CONTENT
        || reply.status == StatusCode::NOT_MODIFIED
        || reply.status.is_informational();
    let parts = if *method == Method::HEAD || bodiless {
        std::collections::VecDeque::new()
    } else {
        reply.parts
    };
    let mut response = Response::new(ReplyBody::new(outgoing(parts)));
    *response.status_mut() = reply.status;
    *response.headers_mut() = *reply.headers;
    if !bodiless {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, length.into());
    }
    response
}

/// A not-allowed answer.
fn method_not_allowed() -> Reply {
    Reply::error(
        StatusCode::METHOD_NOT_ALLOWED,
        "UNSUPPORTED",
        "method not allowed here",
    )
}

/// Runs file system work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::store::StoreError> + Send + 'static,
) -> Result<T, Reply> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Reply::from),
        Err(error) => Err(Reply::error(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            &error.to_string(),
        )),
    }
}
