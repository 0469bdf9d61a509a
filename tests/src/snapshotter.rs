//! A blocking client of the snapshots service, as a test speaks to it.

use std::{collections::BTreeMap, path::Path};

use hyper_util::rt::TokioIo;
use snapshotterd::api::{
    snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
        UsageRequest, UsageResponse, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

/// Labels of a request.
pub type Labels = BTreeMap<String, String>;

/// One plugin name of a snapshots service.
#[derive(Debug)]
pub struct Snapshotter {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
    name: String,
}

/// The label that every snapshot of containerd's suite carries.
pub fn root_label() -> Labels {
    labels(&[("containerd.io/gc.root", "2026-01-01T00:00:00Z")])
}

/// Labels from pairs.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

impl Snapshotter {
    /// Connects to `socket` and speaks for plugin `name`.
    ///
    /// # Panics
    /// When nobody listens.
    pub fn connect(socket: &Path, name: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let socket = socket.to_owned();
        let channel = runtime
            .block_on(
                // The address is not used: the connector goes to the socket.
                Endpoint::from_static("http://snapshotterd").connect_with_connector(
                    tower::service_fn(move |_: Uri| {
                        let socket = socket.clone();
                        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
                    }),
                ),
            )
            .expect("the daemon's socket");
        Self {
            runtime,
            client: SnapshotsClient::new(channel),
            name: name.to_owned(),
        }
    }

    /// The same connection for another plugin name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Prepare with [`root_label`]; `""` is no parent.
    pub fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.prepare_with(key, parent, root_label())
    }

    /// Prepare with labels.
    pub fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let mut client = self.client.clone();
        let response = self.runtime.block_on(client.prepare(request))?;
        Ok(response.into_inner().mounts)
    }

    /// View with [`root_label`].
    pub fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.view_with(key, parent, root_label())
    }

    /// View with labels.
    pub fn view_with(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, Status> {
        let request = ViewSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let mut client = self.client.clone();
        let response = self.runtime.block_on(client.view(request))?;
        Ok(response.into_inner().mounts)
    }

    /// Mounts.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        let mut client = self.client.clone();
        let response = self.runtime.block_on(client.mounts(request))?;
        Ok(response.into_inner().mounts)
    }

    /// Commit with [`root_label`].
    pub fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_with(name, key, "", root_label())
    }

    /// Commit with a parent to link to and labels.
    pub fn commit_with(
        &self,
        name: &str,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            snapshotter: self.name.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
            parent: parent.to_owned(),
        };
        let mut client = self.client.clone();
        self.runtime.block_on(client.commit(request)).map(drop)
    }

    /// Remove.
    pub fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        let mut client = self.client.clone();
        self.runtime.block_on(client.remove(request)).map(drop)
    }

    /// Stat.
    pub fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        let mut client = self.client.clone();
        let response = self.runtime.block_on(client.stat(request))?;
        response
            .into_inner()
            .info
            .ok_or_else(|| Status::internal("an answer without info"))
    }

    /// Update; an empty mask replaces all labels.
    pub fn update(&self, info: Info, mask: &[&str]) -> Result<Info, Status> {
        let request = UpdateSnapshotRequest {
            snapshotter: self.name.clone(),
            info: Some(info),
            update_mask: Some(prost_types::FieldMask {
                paths: mask.iter().map(ToString::to_string).collect(),
            }),
        };
        let mut client = self.client.clone();
        let response = self.runtime.block_on(client.update(request))?;
        response
            .into_inner()
            .info
            .ok_or_else(|| Status::internal("an answer without info"))
    }

    /// List, to its end.
    pub fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let mut found = Vec::new();
        self.walk(filters, |info| {
            found.push(info);
            Ok(())
        })?;
        Ok(found)
    }

    /// List, calling `visit` while the stream is open.
    pub fn walk(
        &self,
        filters: &[&str],
        mut visit: impl FnMut(Info) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let request = ListSnapshotsRequest {
            snapshotter: self.name.clone(),
            filters: filters.iter().map(ToString::to_string).collect(),
        };
        let mut client = self.client.clone();
        let mut stream = self.runtime.block_on(client.list(request))?.into_inner();
        while let Some(message) = self.runtime.block_on(stream.message())? {
            for info in message.info {
                visit(info)?;
            }
        }
        Ok(())
    }

    /// Usage.
    pub fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        };
        let mut client = self.client.clone();
        Ok(self.runtime.block_on(client.usage(request))?.into_inner())
    }

    /// Cleanup.
    pub fn cleanup(&self) -> Result<(), Status> {
        let request = CleanupRequest {
            snapshotter: self.name.clone(),
        };
        let mut client = self.client.clone();
        self.runtime.block_on(client.cleanup(request)).map(drop)
    }
}
