//! One request to one host: credentials, redirects, the other scheme. Retries are not here.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures_util::{TryStreamExt as _, stream};
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    header::{AUTHORIZATION, CONTENT_LENGTH, USER_AGENT},
};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::Incoming;

use super::{
    Inner,
    auth::{Asker, Grant},
    backoff::retry_after,
    body::{Accounts, BodyError, ReplyBody, error_message},
    challenge,
    endpoint::Endpoint,
    error::{RegistryError, Target, UnreadableContent},
    redirect,
    stats::add,
    transport::{RequestBody, UploadProgress},
};
use crate::{
    ranges::{FetchError, RangeBody, RangeSource, report},
    source::Cause,
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const MAX_REDIRECTS: usize = 5;
const MAX_CHALLENGES: usize = 3;

/// What to send.
pub(super) struct Call {
    pub(super) method: Method,
    /// Path in the API, with a leading slash.
    pub(super) path: String,
    pub(super) query: String,
    pub(super) headers: HeaderMap,
    /// Sorted.
    pub(super) scopes: Vec<String>,
    pub(super) target: Arc<Target>,
    pub(super) accounts: Accounts,
    /// The content to send, if any.
    pub(super) content: Option<Arc<dyn RangeSource>>,
}

/// A reply with a status of success.
pub(super) struct Reply {
    pub(super) response: Response<Incoming>,
    /// The URL that answered.
    pub(super) url: Uri,
    /// Whether that is on another host than the one asked.
    pub(super) left_origin: bool,
}

impl Reply {
    /// Host and port of who answered.
    pub(super) fn host(&self) -> String {
        host_of(&self.url)
    }
}

pub(super) fn host_of(url: &Uri) -> String {
    url.authority()
        .map(|authority| authority.as_str().to_owned())
        .unwrap_or_default()
}

impl Inner {
    /// Sends `call` to `endpoint`, or to `start` on its behalf (a known redirect or an upload
    /// location). Any status but success is an error.
    pub(super) async fn exchange(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        start: Option<&Uri>,
    ) -> Result<Reply, RegistryError> {
        let began = Instant::now();
        let mut url = match start {
            Some(start) => start.clone(),
            None => api_url(endpoint, call)?,
        };
        let mut home = endpoint.url();
        let mut method = call.method.clone();
        let (mut redirects, mut challenges) = (0, 0);
        // What came of the scheme tried first, where it is a guess.
        let mut first_refusal = None;
        loop {
            let at_home = redirect::same_origin(&url, &home);
            let may_guess = start.is_none() && redirects == 0;
            let asker = Asker {
                transport: &self.transport,
                counters: &self.counters,
                policy: &self.policy,
                endpoint,
                target: &call.target,
                scopes: &call.scopes,
            };
            // Credentials go to the host itself and to nobody it points to.
            let grant = if at_home {
                self.authorizer.grant(&asker).await?
            } else {
                None
            };
            let request = self.request(endpoint, call, &method, &url, grant.as_ref(), at_home)?;
            let has_content = request.progress.is_some();
            call.accounts.add_request();
            let sent = self
                .transport
                .send(
                    request.request,
                    endpoint.tls(),
                    endpoint.dial_timeout(),
                    request.progress.as_deref(),
                )
                .await;
            let response = match sent {
                Ok(response) => response,
                Err(error) => {
                    let may_guess = may_guess && error.is_other_scheme();
                    let (host, config) = (host_of(&url), endpoint.config());
                    let error = error.into_registry_error(&call.target, &host, &config);
                    if may_guess && endpoint.try_other_scheme(&home) {
                        first_refusal.get_or_insert(error);
                        home = endpoint.url();
                        url = api_url(endpoint, call)?;
                        continue;
                    }
                    endpoint.forget_scheme();
                    return Err(first_refusal.unwrap_or(error));
                }
            };
            let status = response.status();
            let is_plain = home.scheme_str() == Some("http");
            if status == StatusCode::BAD_REQUEST && may_guess && is_plain {
                // What servers say that expect TLS and hear plain HTTP.
                if endpoint.try_other_scheme(&home) {
                    first_refusal = Some(refused(call, &url, response).await);
                    home = endpoint.url();
                    url = api_url(endpoint, call)?;
                    continue;
                }
            } else if at_home {
                endpoint.settle_scheme();
            }
            if status.is_success() {
                return Ok(Reply {
                    response,
                    left_origin: !at_home,
                    url,
                });
            }
            if status == StatusCode::UNAUTHORIZED && at_home {
                challenges += 1;
                let offered = challenge::of_headers(response.headers());
                let refused = if challenges < MAX_CHALLENGES {
                    self.authorizer
                        .refused(&asker, &offered, grant.as_ref(), began)
                } else {
                    let anonymous = grant.as_ref().is_none_or(|grant| grant.anonymous);
                    Err(self.authorizer.advice(endpoint.authority(), anonymous))
                };
                match refused {
                    Ok(()) => continue,
                    Err(advice) => return Err(denied(call, &url, response, advice).await),
                }
            }
            if is_redirect(status) {
                redirects += 1;
                if redirects > MAX_REDIRECTS {
                    return Err(protocol(call, &url, "sent too many redirects"));
                }
                let next = redirect::location(&url, response.headers())
                    .map_err(|problem| protocol(call, &url, &problem))?;
                if has_content && status == StatusCode::SEE_OTHER {
                    return Err(protocol(call, &url, "answered an upload with See Other"));
                }
                if url.scheme_str() == Some("https") && next.scheme_str() == Some("http") {
                    tracing::debug!(
                        from = host_of(&url),
                        to = host_of(&next),
                        "redirect to plain HTTP"
                    );
                }
                if status == StatusCode::SEE_OTHER && method != Method::HEAD {
                    method = Method::GET;
                }
                add(&self.counters.redirects, 1);
                url = next;
                continue;
            }
            if status == StatusCode::FORBIDDEN && at_home {
                let anonymous = grant.as_ref().is_none_or(|grant| grant.anonymous);
                let advice = self.authorizer.advice(endpoint.authority(), anonymous);
                return Err(denied(call, &url, response, advice).await);
            }
            return Err(refused(call, &url, response).await);
        }
    }

    fn request(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        method: &Method,
        url: &Uri,
        grant: Option<&Grant>,
        at_home: bool,
    ) -> Result<Prepared, RegistryError> {
        let mut headers = call.headers.clone();
        if at_home {
            endpoint.add_client_headers(&mut headers);
        } else {
            headers.insert(USER_AGENT, endpoint.user_agent().clone());
        }
        if let Some(grant) = grant {
            headers.insert(AUTHORIZATION, grant.header.clone());
        }
        let (body, progress) = match &call.content {
            Some(content) if *method != Method::GET => {
                headers.insert(CONTENT_LENGTH, content.len().into());
                let progress = Arc::new(UploadProgress::default());
                let counters = Arc::clone(&self.counters);
                let pushed = move |bytes| add(&counters.pushed_bytes, bytes);
                (
                    upload_body(Arc::clone(content), Arc::clone(&progress), pushed),
                    Some(progress),
                )
            }
            _ => {
                if matches!(*method, Method::POST | Method::PUT) {
                    headers.insert(CONTENT_LENGTH, 0.into());
                }
                let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
                (body, None)
            }
        };
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .body(body)
            .map_err(|error| protocol(call, url, &format!("cannot be asked: {error}")))?;
        *request.headers_mut() = headers;
        Ok(Prepared { request, progress })
    }
}

fn api_url(endpoint: &Endpoint, call: &Call) -> Result<Uri, RegistryError> {
    let registry = call.target.repository.registry();
    endpoint
        .api_url(registry, &call.path, &call.query)
        .ok_or_else(|| RegistryError::Protocol {
            target: Arc::clone(&call.target),
            host: endpoint.authority().to_owned(),
            problem: "has a name that makes no URL".to_owned(),
        })
}

struct Prepared {
    request: Request<RequestBody>,
    progress: Option<Arc<UploadProgress>>,
}

/// The content as a request body: opened when the connection is there to take it.
fn upload_body(
    content: Arc<dyn RangeSource>,
    progress: Arc<UploadProgress>,
    pushed: impl Fn(u64) + Send + 'static,
) -> RequestBody {
    let failed = |error: FetchError| Box::new(UnreadableContent(report(&error)));
    let chunks = stream::try_unfold(Upload::Closed(content), move |upload| async move {
        let mut body = match upload {
            Upload::Closed(content) if content.is_empty() => return Ok(None),
            Upload::Closed(content) => {
                let range = 0..content.len();
                content
                    .fetch(range, Cause::Metadata)
                    .await
                    .map_err(failed)?
            }
            Upload::Open(body) => body,
        };
        match body.next_chunk().await.map_err(failed)? {
            Some(chunk) => Ok(Some((Frame::data(chunk), Upload::Open(body)))),
            None => Ok(None),
        }
    })
    .inspect_ok(move |frame: &Frame<Bytes>| {
        let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
        progress.add(bytes);
        pushed(bytes);
    })
    .map_err(|error: Box<UnreadableContent>| -> BoxError { error });
    StreamBody::new(chunks).boxed_unsync()
}

enum Upload {
    Closed(Arc<dyn RangeSource>),
    Open(RangeBody),
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

pub(super) fn protocol(call: &Call, url: &Uri, problem: &str) -> RegistryError {
    RegistryError::Protocol {
        target: Arc::clone(&call.target),
        host: host_of(url),
        problem: problem.to_owned(),
    }
}

async fn denied(
    call: &Call,
    url: &Uri,
    response: Response<Incoming>,
    advice: String,
) -> RegistryError {
    RegistryError::Denied {
        target: Arc::clone(&call.target),
        host: host_of(url),
        status: response.status().as_u16(),
        advice,
        message: error_message(response).await,
    }
}

async fn refused(call: &Call, url: &Uri, response: Response<Incoming>) -> RegistryError {
    let retry_after: Option<Duration> = retry_after(response.headers(), SystemTime::now());
    RegistryError::Status {
        target: Arc::clone(&call.target),
        host: host_of(url),
        status: response.status().as_u16(),
        message: error_message(response).await,
        retry_after,
    }
}

/// The error of a body as one of the client.
pub(super) fn body_error(error: BodyError, target: &Arc<Target>, host: &str) -> RegistryError {
    let (target, host) = (Arc::clone(target), host.to_owned());
    match error {
        BodyError::Stalled(waited) => RegistryError::Stalled {
            target,
            host,
            waited,
        },
        BodyError::Broken(error) => RegistryError::Broken {
            target,
            host,
            source: Arc::new(error),
        },
        BodyError::TooLong(limit) => RegistryError::Protocol {
            target,
            host,
            problem: format!("sent more than {limit} bytes"),
        },
    }
}

impl Inner {
    /// The body of a reply under the watchdog.
    pub(super) fn body_of(&self, response: Response<Incoming>, accounts: &Accounts) -> ReplyBody {
        let stall_timeout = self.transport.stall_timeout();
        ReplyBody::new(response.into_body(), stall_timeout, Some(accounts.clone()))
    }

    /// Counts a request that is sent again.
    pub(super) fn count_retry(&self) {
        let retries: &AtomicU64 = &self.counters.retries;
        add(retries, 1);
    }
}
