//! An answer before it becomes an HTTP response.

use std::collections::VecDeque;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::json;

use crate::{body::Part, store::StoreError};

/// Status, headers and the stretches the body is made of.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    /// In a box, because a reply is also the error type of the handlers.
    pub(crate) headers: Box<HeaderMap>,
    pub(crate) parts: VecDeque<Part>,
}

impl Reply {
    pub(crate) fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: Box::default(),
            parts: VecDeque::new(),
        }
    }

    pub(crate) fn content(status: StatusCode, media_type: &str, bytes: impl Into<Bytes>) -> Self {
        let mut reply = Self::empty(status).header(header::CONTENT_TYPE, media_type);
        reply.parts.push_back(Part::Bytes {
            bytes: bytes.into(),
            content: true,
        });
        reply
    }

    pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(bytes) => Self::content(status, "application/json", bytes),
            Err(error) => {
                tracing::error!(%error, "cannot serialize a reply");
                Self::empty(StatusCode::INTERNAL_SERVER_ERROR)
            }
        }
    }

    /// An error in the form of the distribution specification.
    pub(crate) fn error(status: StatusCode, code: &str, message: &str) -> Self {
        let body = json!({"errors": [{"code": code, "message": message}]});
        Self::json(status, &body)
    }

    /// Adds a header; a value that cannot be one is left out.
    pub(crate) fn header(mut self, name: HeaderName, value: impl AsRef<str>) -> Self {
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(crate) fn len(&self) -> u64 {
        self.parts.iter().map(Part::len).sum()
    }
}

impl From<StoreError> for Reply {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::DigestMismatch { .. } => Self::error(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                &error.to_string(),
            ),
            StoreError::Name(_) => {
                Self::error(StatusCode::BAD_REQUEST, "NAME_INVALID", &error.to_string())
            }
            StoreError::Io { source, .. } => {
                tracing::error!(%error, %source, "the store failed");
                Self::error(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "UNKNOWN",
                    &format!("{error}: {source}"),
                )
            }
        }
    }
}
