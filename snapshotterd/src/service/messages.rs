//! Between messages and our own types.

use std::sync::Arc;

use tonic::Request;

use crate::{
    api::snapshots::{self, UsageResponse},
    store::{Info, Kind, Usage},
};

/// Where a request comes from, as its metadata says.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    /// containerd's namespace.
    pub(super) namespace: Option<String>,
    /// The trace it belongs to (`traceparent`), for the log.
    pub(super) trace: Option<String>,
}

pub(super) fn origin<T>(request: &Request<T>) -> Origin {
    let text = |name| {
        let value = request.metadata().get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    Origin {
        namespace: text("containerd-namespace"),
        trace: text("traceparent"),
    }
}

/// Protobuf's empty string means absence.
pub(super) fn optional(text: String) -> Option<Arc<str>> {
    (!text.is_empty()).then(|| text.into())
}

impl From<Info> for snapshots::Info {
    fn from(info: Info) -> Self {
        let kind = match info.kind {
            Kind::View => snapshots::Kind::View,
            Kind::Active => snapshots::Kind::Active,
            Kind::Committed => snapshots::Kind::Committed,
        };
        Self {
            name: info.name,
            parent: info.parent.unwrap_or_default(),
            kind: kind.into(),
            created_at: Some(info.created),
            updated_at: Some(info.updated),
            labels: info.labels,
        }
    }
}

impl From<Usage> for UsageResponse {
    fn from(usage: Usage) -> Self {
        Self {
            size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }
    }
}
