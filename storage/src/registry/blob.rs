//! Blobs: ranges that are checked when the reply comes and resumed when it ends early.

use std::{fmt, io, ops::Range, sync::Arc};

use bytes::Bytes;
use formats::digest::Digest;
use futures_util::{StreamExt as _, stream};
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{
        ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE,
    },
};

use super::{
    Inner,
    attempts::Attempts,
    body::{Accounts, ReplyBody},
    content_range::ContentRange,
    endpoint::{Endpoint, Need},
    error::{Object, RegistryError, Target},
    exchange::{Call, Reply, body_error},
    reference::Repository,
    routes::{RouteKey, Way},
    scope,
};
use crate::{
    ranges::{FetchError, Meter, RangeBody, RangeSource, check_bounds},
    source::{BoxFuture, Cause},
};

/// That much more, and the patience for failures starts anew.
const PROGRESS_BYTES: u64 = 1 << 20;

/// A blob in a registry.
#[derive(Clone)]
pub struct RemoteBlob {
    client: Arc<Inner>,
    repository: Repository,
    digest: Digest,
    len: u64,
}

impl RemoteBlob {
    pub(super) fn new(
        client: Arc<Inner>,
        repository: Repository,
        digest: Digest,
        len: u64,
    ) -> Self {
        Self {
            client,
            repository,
            digest,
            len,
        }
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The digest of the whole blob.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    fn target(&self, range: &Range<u64>) -> Arc<Target> {
        let object = if *range == (0..self.len) {
            Object::Blob(self.digest)
        } else {
            Object::BlobRange(self.digest, range.clone())
        };
        Arc::new(Target {
            repository: self.repository.clone(),
            object,
        })
    }

    fn fetch_error(&self, range: Range<u64>, error: RegistryError) -> FetchError {
        FetchError::Source {
            origin: self.origin(),
            range,
            failure: error.failure(),
            source: Arc::new(error),
        }
    }

    async fn start(self, range: Range<u64>, cause: Cause) -> Result<RangeBody, FetchError> {
        check_bounds(&self.origin(), &range, self.len)?;
        let meter = Arc::new(Meter::default());
        let accounts = self.client.accounts(cause, Some(Arc::clone(&meter)));
        let attempts = self
            .client
            .attempts(&self.target(&range), Need::Pull)
            .await
            .map_err(|error| self.fetch_error(range.clone(), error))?;
        let mut transfer = Transfer {
            blob: self.clone(),
            attempts: Some(attempts),
            accounts,
            current: None,
            position: range.start,
            end: range.end,
            counted: range.start,
        };
        let opened = transfer
            .open()
            .await
            .map_err(|error| self.fetch_error(range.clone(), error))?;
        // A host that ignores ranges sends everything: whoever asked may keep it all.
        let delivered = if opened.is_whole { 0..self.len } else { range };
        transfer.position = delivered.start;
        transfer.counted = delivered.start;
        transfer.end = delivered.end;
        transfer.current = Some(opened);
        let chunks = stream::try_unfold(transfer, |mut transfer| async move {
            let chunk = transfer.next_chunk().await?;
            Ok(chunk.map(|chunk| (chunk, transfer)))
        });
        Ok(RangeBody::new(
            self.origin(),
            delivered,
            meter,
            chunks.boxed(),
        ))
    }
}

impl RangeSource for RemoteBlob {
    fn len(&self) -> u64 {
        self.len
    }

    fn origin(&self) -> String {
        format!("blob {} of {}", self.digest, self.repository)
    }

    fn fetch(
        &self,
        range: Range<u64>,
        cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        Box::pin(self.clone().start(range, cause))
    }
}

impl fmt::Debug for RemoteBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteBlob")
            .field("repository", &self.repository)
            .field("digest", &self.digest)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A range on its way, over as many requests as it takes.
struct Transfer {
    blob: RemoteBlob,
    /// `None` once they are used up.
    attempts: Option<Attempts>,
    accounts: Accounts,
    current: Option<Opened>,
    position: u64,
    end: u64,
    /// Position at which progress was last counted.
    counted: u64,
}

/// A reply whose head is as it should be.
struct Opened {
    body: ReplyBody,
    endpoint: Arc<Endpoint>,
    host: String,
    /// Offset of the next byte that the body will deliver.
    next: u64,
    /// Where the body ends.
    end: u64,
    /// Whether the whole blob comes although a part was asked for.
    is_whole: bool,
}

impl Transfer {
    async fn next_chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        while self.position < self.end {
            let mut opened = match self.current.take() {
                Some(opened) => opened,
                None => self.reopen().await?,
            };
            let error = match self.receive(&mut opened).await {
                Ok(Some(chunk)) => {
                    self.current = Some(opened);
                    return Ok(Some(chunk));
                }
                // The host sent less than was asked for, as it may: the rest is asked for, but
                // not without end.
                Ok(None) => self.cut_short(&opened, "the reply covered only a part"),
                Err(error) => error,
            };
            if let Some(attempts) = &mut self.attempts {
                attempts.failed(&opened.endpoint, error);
            }
        }
        Ok(None)
    }

    /// The next bytes of a reply that are wanted; `None` when it is over.
    async fn receive(&mut self, opened: &mut Opened) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let target = || self.blob.target(&(self.position..self.end));
            let data = opened
                .body
                .next()
                .await
                .map_err(|error| body_error(error, &target(), &opened.host))?;
            let Some(mut data) = data else {
                if opened.next < opened.end {
                    return Err(self.cut_short(opened, "the body ended early"));
                }
                return Ok(None);
            };
            let start = opened.next;
            opened.next = start.saturating_add(data.len() as u64);
            if opened.next > opened.end {
                return Err(RegistryError::Protocol {
                    target: target(),
                    host: opened.host.clone(),
                    problem: format!("sent more than the bytes up to {}", opened.end),
                });
            }
            // What was delivered before a resumption by a server without ranges.
            let skip = self.position.saturating_sub(start).min(data.len() as u64);
            let _ = data.split_to(usize::try_from(skip).unwrap_or(data.len()));
            let room = self.end - self.position;
            data.truncate(usize::try_from(room).unwrap_or(usize::MAX));
            if data.is_empty() {
                continue;
            }
            self.position += data.len() as u64;
            if self.position - self.counted >= PROGRESS_BYTES || self.position == self.end {
                self.counted = self.position;
                opened.endpoint.note_success();
                if let Some(attempts) = &mut self.attempts {
                    attempts.progressed(&opened.endpoint);
                }
            }
            return Ok(Some(data));
        }
    }

    fn cut_short(&self, opened: &Opened, what: &str) -> RegistryError {
        let message = format!("{what}: {} of {} came", opened.next, opened.end);
        RegistryError::Broken {
            target: self.blob.target(&(self.position..self.end)),
            host: opened.host.clone(),
            source: Arc::new(io::Error::new(io::ErrorKind::UnexpectedEof, message)),
        }
    }

    async fn reopen(&mut self) -> Result<Opened, FetchError> {
        self.blob.client.count_retry();
        let rest = self.position..self.end;
        self.open()
            .await
            .map_err(|error| self.blob.fetch_error(rest, error))
    }

    /// Asks for the bytes still missing until a host answers as it should.
    async fn open(&mut self) -> Result<Opened, RegistryError> {
        let range = self.position..self.end;
        let target = self.blob.target(&range);
        let Some(mut attempts) = self.attempts.take() else {
            return Err(RegistryError::NoEndpoint {
                target,
                capability: "pull",
            });
        };
        let mut first = true;
        while let Some(endpoint) = attempts.next().await {
            if !std::mem::take(&mut first) {
                self.blob.client.count_retry();
            }
            match self.request(&endpoint, &range, &target).await {
                Ok(opened) => {
                    self.attempts = Some(attempts);
                    return Ok(opened);
                }
                Err(error) => attempts.failed(&endpoint, error),
            }
        }
        Err(attempts.into_error())
    }

    async fn request(
        &self,
        endpoint: &Arc<Endpoint>,
        range: &Range<u64>,
        target: &Arc<Target>,
    ) -> Result<Opened, RegistryError> {
        let blob = &self.blob;
        let client = &blob.client;
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if *range != (0..blob.len) {
            let bytes = format!("bytes={}-{}", range.start, range.end - 1);
            headers.extend(HeaderValue::try_from(bytes).map(|value| (RANGE, value)));
        }
        let call = Call {
            method: Method::GET,
            path: format!("/{}/blobs/{}", blob.repository.name(), blob.digest),
            query: String::new(),
            headers,
            scopes: vec![scope(&blob.repository, "pull")],
            target: Arc::clone(target),
            accounts: self.accounts.clone(),
            content: None,
        };
        let route = client.routes.of(RouteKey {
            host: endpoint.authority().to_owned(),
            repository: blob.repository.to_string(),
            digest: blob.digest,
        });
        let mut way = route.way().await;
        if let Way::Redirect(url) = &way {
            match client.exchange(endpoint, &call, Some(url)).await {
                Ok(reply) => return self.check(reply, endpoint, range, target),
                Err(error) => {
                    route.forget(Some(url));
                    // Expired, as this kind of store puts it: the registry gives a new one.
                    let has_expired = matches!(error.status(), Some(400 | 401 | 403 | 404 | 410));
                    if !has_expired {
                        return Err(error);
                    }
                }
            }
            way = route.way().await;
            if let Way::Redirect(url) = &way {
                // Somebody else was faster.
                let reply = client.exchange(endpoint, &call, Some(url)).await;
                let reply = reply.inspect_err(|_| route.forget(Some(url)))?;
                return self.check(reply, endpoint, range, target);
            }
        }
        let reply = client.exchange(endpoint, &call, None).await;
        let reply = reply.inspect_err(|_| route.forget(None))?;
        route.learn(reply.left_origin.then_some(&reply.url));
        drop(way);
        self.check(reply, endpoint, range, target)
    }

    /// Accepts a reply only if it is what was asked for.
    fn check(
        &self,
        reply: Reply,
        endpoint: &Arc<Endpoint>,
        range: &Range<u64>,
        target: &Arc<Target>,
    ) -> Result<Opened, RegistryError> {
        let host = reply.host();
        let wrong = |problem: String| RegistryError::Protocol {
            target: Arc::clone(target),
            host: host.clone(),
            problem,
        };
        let headers = reply.response.headers();
        let encoding = headers.get(CONTENT_ENCODING);
        if let Some(encoding) = encoding.filter(|encoding| *encoding != "identity") {
            return Err(wrong(format!("sent the blob encoded as {encoding:?}")));
        }
        let content_length = headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        let len = self.blob.len;
        let covered = match reply.response.status() {
            StatusCode::OK => 0..len,
            StatusCode::PARTIAL_CONTENT => {
                let has_parts = headers.get(CONTENT_TYPE).is_some_and(|value| {
                    value
                        .as_bytes()
                        .to_ascii_lowercase()
                        .starts_with(b"multipart/")
                });
                if has_parts {
                    return Err(wrong("sent a multipart reply for one range".to_owned()));
                }
                let stated = headers
                    .get(CONTENT_RANGE)
                    .and_then(|value| ContentRange::parse(value.as_bytes()))
                    .ok_or_else(|| wrong("sent a part without a valid Content-Range".to_owned()))?;
                if let Some(total) = stated.total.filter(|total| *total != len) {
                    return Err(wrong(format!(
                        "says that the blob has {total} bytes, its descriptor {len}"
                    )));
                }
                let Range { start, end } = stated.range.clone();
                if start != range.start || end > range.end {
                    return Err(wrong(format!(
                        "sent bytes {start}..{end} when asked for {}..{}",
                        range.start, range.end
                    )));
                }
                stated.range
            }
            status => return Err(wrong(format!("answered {status} where a blob belongs"))),
        };
        let expected = covered.end - covered.start;
        if let Some(length) = content_length.filter(|length| *length != expected) {
            return Err(wrong(format!(
                "announced {length} bytes where {expected} belong"
            )));
        }
        let is_whole = covered != *range && covered == (0..len);
        let body = self.blob.client.body_of(reply.response, &self.accounts);
        Ok(Opened {
            body,
            endpoint: Arc::clone(endpoint),
            host,
            next: covered.start,
            end: covered.end,
            is_whole,
        })
    }
}
