//! A client of the snapshots service, as containerd's own proxy is one.

use std::{collections::BTreeMap, path::Path};

use snapshotterd::api::snapshots::{
    CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, snapshots_client::SnapshotsClient,
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::runner::Mount;

/// Label that names the chain a snapshot is the content of.
pub const LABEL_REF: &str = "containerd.io/snapshot.ref";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotsError {
    /// Nobody listens.
    #[error("cannot reach snapshotterd at {socket}: is it running?")]
    Unreachable {
        /// The socket.
        socket: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The service said no.
    #[error("{call} of snapshot {key:?}: {message} ({code:?})")]
    Refused {
        /// The call.
        call: &'static str,
        /// The snapshot.
        key: String,
        /// gRPC code.
        code: Code,
        /// What it said.
        message: String,
    },
}

/// What an extraction Prepare was answered with.
#[derive(Debug)]
pub enum Prepared {
    /// The layer is there already, lazily served; its backend name.
    Exists(String),
    /// Unpack the layer into these mounts, then commit.
    Writable(Vec<Mount>),
}

/// A connection, speaking as one plugin name.
#[derive(Clone, Debug)]
pub struct Snapshots {
    client: SnapshotsClient<Channel>,
    name: String,
}

impl Snapshots {
    /// Connects to the daemon's socket. `name` is the snapshotter name sent with each call.
    pub async fn connect(socket: &Path, name: &str) -> Result<Self, SnapshotsError> {
        let unreachable = |source| SnapshotsError::Unreachable {
            socket: socket.display().to_string(),
            source,
        };
        let endpoint =
            Endpoint::from_shared(format!("unix://{}", socket.display())).map_err(unreachable)?;
        let channel = endpoint.connect().await.map_err(unreachable)?;
        let client = SnapshotsClient::new(channel).max_decoding_message_size(16 << 20);
        Ok(Self {
            client,
            name: name.to_owned(),
        })
    }

    /// The committed snapshot of a chain on exactly `parent` (a backend name, empty for none).
    pub async fn find(&self, chain: &str, parent: &str) -> Result<Option<Info>, SnapshotsError> {
        let request = ListSnapshotsRequest {
            snapshotter: self.name.clone(),
            filters: vec![format!(
                "labels.\"{LABEL_REF}\"=={chain},parent==\"{parent}\""
            )],
        };
        let refused = refusal("List", chain);
        let mut stream = self
            .client
            .clone()
            .list(request)
            .await
            .map_err(&refused)?
            .into_inner();
        while let Some(page) = stream.message().await.map_err(&refused)? {
            let committed = page
                .info
                .into_iter()
                .find(|info| info.kind == Kind::Committed as i32 && info.parent == parent);
            if committed.is_some() {
                return Ok(committed);
            }
        }
        Ok(None)
    }

    /// Prepare of a layer's extraction: `labels` must name the chain in [`LABEL_REF`].
    pub async fn prepare_extraction(
        &self,
        key: &str,
        parent: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<Prepared, SnapshotsError> {
        match self.prepare_raw(key, parent, labels).await {
            Ok(mounts) => Ok(Prepared::Writable(mounts)),
            Err(status) if status.code() == Code::AlreadyExists => {
                let chain = labels
                    .get(LABEL_REF)
                    .map(String::as_str)
                    .unwrap_or_default();
                match self.find(chain, parent).await? {
                    Some(info) => Ok(Prepared::Exists(info.name)),
                    None => Err(refusal("Prepare", key)(status)),
                }
            }
            Err(status) => Err(refusal("Prepare", key)(status)),
        }
    }

    /// Prepare of a container's writable layer.
    pub async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, SnapshotsError> {
        self.prepare_raw(key, parent, &BTreeMap::new())
            .await
            .map_err(refusal("Prepare", key))
    }

    async fn prepare_raw(
        &self,
        key: &str,
        parent: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, tonic::Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels.clone(),
        };
        Ok(convert(
            self.client
                .clone()
                .prepare(request)
                .await?
                .into_inner()
                .mounts,
        ))
    }

    /// Mounts of an active snapshot or view.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotsError> {
        let request = MountsRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        let answer = self
            .client
            .clone()
            .mounts(request)
            .await
            .map_err(refusal("Mounts", key))?;
        Ok(convert(answer.into_inner().mounts))
    }

    /// Commits an active snapshot.
    pub async fn commit(
        &self,
        name: &str,
        key: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), SnapshotsError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.name.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: labels.clone(),
            parent: String::new(),
        };
        self.client
            .clone()
            .commit(request)
            .await
            .map_err(refusal("Commit", key))?;
        Ok(())
    }

    /// Removes a snapshot.
    pub async fn remove(&self, key: &str) -> Result<(), SnapshotsError> {
        let request = RemoveSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        self.client
            .clone()
            .remove(request)
            .await
            .map_err(refusal("Remove", key))?;
        Ok(())
    }
}

fn refusal(call: &'static str, key: &str) -> impl Fn(tonic::Status) -> SnapshotsError {
    let key = key.to_owned();
    move |status| SnapshotsError::Refused {
        call,
        key: key.clone(),
        code: status.code(),
        message: status.message().to_owned(),
    }
}

fn convert(mounts: Vec<snapshotterd::api::types::Mount>) -> Vec<Mount> {
    let each = mounts.into_iter().map(|mount| Mount {
        kind: mount.r#type,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    each.collect()
}
