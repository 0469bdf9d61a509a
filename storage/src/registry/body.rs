//! Reply bodies under a watchdog: a peer that sends nothing (or nearly nothing) is given up, a slow
//! one is not, and the time that the receiver takes does not count.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::Response;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::timeout;

use super::stats::Counters;
use crate::{ranges::Meter, source::Cause};

/// Less than this within the stall timeout is a stall.
const LEAST_PROGRESS_BYTES: usize = 1 << 10;
/// How much of an error reply is read, and for how long.
const MAX_ERROR_BYTES: usize = 4 << 10;
const ERROR_PATIENCE: Duration = Duration::from_secs(2);
const MAX_MESSAGE_CHARS: usize = 400;

/// Why a body ended early.
#[derive(Debug)]
pub(super) enum BodyError {
    /// Nothing came for that long.
    Stalled(Duration),
    /// The connection broke.
    Broken(hyper::Error),
    /// More came than the caller wants to hold.
    TooLong(usize),
}

/// A body being received.
pub(super) struct ReplyBody {
    incoming: Incoming,
    stall_timeout: Duration,
    waited: Duration,
    received: usize,
    accounts: Option<Accounts>,
}

/// Whom received bytes are counted for.
#[derive(Clone)]
pub(super) struct Accounts {
    pub(super) counters: Arc<Counters>,
    pub(super) cause: Cause,
    pub(super) meter: Option<Arc<Meter>>,
}

impl Accounts {
    /// Counts one request.
    pub(super) fn add_request(&self) {
        self.counters.add_request(self.cause);
        if let Some(meter) = &self.meter {
            meter.add_request();
        }
    }

    fn add_bytes(&self, bytes: u64) {
        self.counters.add_bytes(self.cause, bytes);
        if let Some(meter) = &self.meter {
            meter.add_bytes(bytes);
        }
    }
}

impl ReplyBody {
    pub(super) fn new(
        incoming: Incoming,
        stall_timeout: Duration,
        accounts: Option<Accounts>,
    ) -> Self {
        Self {
            incoming,
            stall_timeout,
            waited: Duration::ZERO,
            received: 0,
            accounts,
        }
    }

    /// The next bytes, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            let patience = self.stall_timeout.saturating_sub(self.waited);
            let began = Instant::now();
            let Ok(frame) = timeout(patience, self.incoming.frame()).await else {
                return Err(BodyError::Stalled(self.stall_timeout));
            };
            self.waited += began.elapsed();
            let Some(frame) = frame else {
                return Ok(None);
            };
            // Trailers say nothing that matters here.
            let Ok(data) = frame.map_err(BodyError::Broken)?.into_data() else {
                continue;
            };
            self.received += data.len();
            if self.received >= LEAST_PROGRESS_BYTES {
                self.received = 0;
                self.waited = Duration::ZERO;
            }
            if let Some(accounts) = &self.accounts {
                accounts.add_bytes(data.len() as u64);
            }
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }

    /// The whole body, if it is not longer than `limit`.
    pub(super) async fn collect(mut self, limit: usize) -> Result<Bytes, BodyError> {
        let mut whole = BytesMut::new();
        while let Some(data) = self.next().await? {
            if whole.len() + data.len() > limit {
                return Err(BodyError::TooLong(limit));
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }
}

/// What the server says in an error reply, as one line. Bounded in size and time: some servers
/// announce a body and never send it.
pub(super) async fn error_message(reply: Response<Incoming>) -> String {
    let mut body = ReplyBody::new(reply.into_body(), ERROR_PATIENCE, None);
    let mut text = Vec::new();
    let read = async {
        while let Ok(Some(data)) = body.next().await {
            text.extend_from_slice(&data);
            if text.len() >= MAX_ERROR_BYTES {
                break;
            }
        }
    };
    // What has come until then is good enough.
    let _ = timeout(ERROR_PATIENCE, read).await;
    text.truncate(MAX_ERROR_BYTES);
    readable(&text)
}

/// The errors of an OCI error reply, or else the start of whatever text it is.
pub(super) fn readable(body: &[u8]) -> String {
    let said = serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|json| {
            let errors = json.get("errors")?.as_array()?;
            let lines: Vec<String> = errors
                .iter()
                .map(|error| {
                    let field = |name| error.get(name).and_then(|value| value.as_str());
                    let (code, message) = (field("code"), field("message"));
                    [code, message]
                        .into_iter()
                        .flatten()
                        .filter(|part| !part.is_empty())
                        .collect::<Vec<_>>()
                        .join(": ")
                })
                .collect();
            Some(lines.join("; "))
        });
    let text = said.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let line: String = text
        .chars()
        .map(printable)
        .take(MAX_MESSAGE_CHARS)
        .collect();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_replies_become_one_line() {
        let oci = br#"{"errors":[{"code":"DENIED","message":"no pull\naccess","detail":{"a":1}},{"code":"X"}]}"#;
        assert_eq!(readable(oci), "DENIED: no pull access; X");
        assert_eq!(
            readable(b"<html>\n\x1b[31m oops</html>\r\n"),
            "<html> [31m oops</html>"
        );
        assert_eq!(readable(b""), "");
        assert_eq!(readable(b"{\"errors\":3}"), "{\"errors\":3}");
        assert!(readable(&vec![b'x'; 9000]).len() <= MAX_MESSAGE_CHARS);
        assert!(!readable(b"\xff\xfe").is_empty());
    }
}
