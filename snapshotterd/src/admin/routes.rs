//! Who answers which path.

use std::{collections::BTreeMap, fmt, future::Future, pin::Pin, sync::Arc};

use bytes::Bytes;
use http::{Method, StatusCode};
use parking_lot::RwLock;
use serde_json::{Value, json};

/// A request to a registered route.
#[derive(Clone, Debug)]
pub struct Request {
    /// GET, POST, …
    pub method: Method,
    /// The path without the query.
    pub path: String,
    /// The query.
    pub query: Query,
    /// The body, at most 1 MiB.
    pub body: Bytes,
}

/// Query parameters, percent-decoded.
#[derive(Clone, Debug, Default)]
pub struct Query(BTreeMap<String, String>);

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The content type.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

type Handler = Arc<dyn Fn(Request) -> Pin<Box<dyn Future<Output = Answer> + Send>> + Send + Sync>;

/// The routes; clones share them. A path that ends in `/` answers everything below it that has no
/// route of its own.
#[derive(Clone, Default)]
pub struct Routes {
    handlers: Arc<RwLock<BTreeMap<&'static str, (Method, Handler)>>>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.handlers.read().keys()).finish()
    }
}

impl Query {
    pub(crate) fn parse(text: &str) -> Self {
        Self(
            text.split('&')
                .filter(|pair| !pair.is_empty())
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(name), decode(value))
                })
                .collect(),
        )
    }

    /// The value of a parameter.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl Answer {
    /// 200 with JSON.
    pub fn json(value: &Value) -> Self {
        Self::with_status(StatusCode::OK, value)
    }

    /// An error: `{"error": message}`.
    pub fn error(status: StatusCode, message: impl fmt::Display) -> Self {
        Self::with_status(status, &json!({ "error": message.to_string() }))
    }

    /// 200 with text.
    pub fn text(content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type,
            body: body.into(),
        }
    }

    fn with_status(status: StatusCode, value: &Value) -> Self {
        let mut body = value.to_string();
        body.push('\n');
        Self {
            status,
            content_type: "application/json",
            body: body.into(),
        }
    }
}

impl Routes {
    /// Lets `handler` answer `method` on `path`; a later registration replaces an earlier one.
    pub fn add<F, R>(&self, method: Method, path: &'static str, handler: F)
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Answer> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request| Box::pin(handler(request)));
        self.handlers.write().insert(path, (method, handler));
    }

    /// The paths there are, for `/`.
    pub(super) fn paths(&self) -> Vec<&'static str> {
        self.handlers.read().keys().copied().collect()
    }

    pub(super) async fn answer(&self, request: Request) -> Answer {
        let found = {
            let handlers = self.handlers.read();
            handlers.get(request.path.as_str()).cloned().or_else(|| {
                handlers
                    .iter()
                    .filter(|(path, _)| path.ends_with('/') && request.path.starts_with(**path))
                    .max_by_key(|(path, _)| path.len())
                    .map(|(_, handler)| handler.clone())
            })
        };
        match found {
            Some((method, handler)) if method == request.method => handler(request).await,
            Some((method, _)) => Answer::error(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{} takes {method}", request.path),
            ),
            None => Answer::error(
                StatusCode::NOT_FOUND,
                format!("no such path; there are: {}", self.paths().join(", ")),
            ),
        }
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let pair: Vec<u8> = rest.clone().take(2).collect();
                let value = std::str::from_utf8(&pair)
                    .ok()
                    .filter(|pair| pair.len() == 2)
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok());
                match value {
                    Some(value) => {
                        bytes.push(value);
                        rest.nth(1);
                    }
                    None => bytes.push(b'%'),
                }
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_queries() {
        let query = Query::parse("key=a%2Fb+c&flag&bad=%zz%2");
        assert_eq!(query.value("key"), Some("a/b c"));
        assert_eq!(query.value("flag"), Some(""));
        assert_eq!(query.value("bad"), Some("%zz%2"));
        assert_eq!(query.value("none"), None);
    }
}
