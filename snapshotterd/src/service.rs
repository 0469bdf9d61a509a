//! `containerd.services.snapshots.v1.Snapshots` over the drivers.
//!
//! The same for every driver: names select drivers, errors become the codes containerd expects
//! ([`status`]), each request runs as a task of its own under a deadline, a panic becomes
//! `Internal`, and containerd's labels and filters are answered from the store alone.
//!
//! Key spaces: every plugin name has its own, because containerd's garbage collector removes, name
//! by name, whatever it does not know.

mod list;
mod messages;
pub mod socket;
pub mod status;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use self::{list::Listing, messages::Origin};
use crate::{
    api::snapshots::{
        CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse,
        MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
        RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
        UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest,
        ViewSnapshotResponse,
        snapshots_server::{self, SnapshotsServer},
    },
    drivers::{CreateRequest, Driver, DriverError, Drivers, Mount, Prepared},
    metrics::{Gauge, Metrics, defs},
    store::{CommitSnapshot, Durability, Kind, Labels, SNAPSHOT_REF, SnapshotKey, Store},
};

/// Largest message in either direction, as in containerd.
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// The gRPC service; clones share it.
#[derive(Clone, Debug)]
pub struct Snapshots {
    store: Store,
    drivers: Drivers,
    metrics: Metrics,
    in_flight: Gauge,
    timeout: Duration,
}

impl Snapshots {
    /// Serves `drivers` over `store`; every request is answered within `timeout`.
    pub fn new(store: Store, drivers: Drivers, metrics: Metrics, timeout: Duration) -> Self {
        Self {
            store,
            drivers,
            in_flight: metrics.gauge(&defs::RPC_IN_FLIGHT, &[]),
            metrics,
            timeout,
        }
    }

    /// The service for a tonic router.
    pub fn into_server(self) -> SnapshotsServer<Self> {
        SnapshotsServer::new(self)
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
    }

    /// Runs `work` as a task that outlives the deadline and the caller, so that nothing is ever
    /// dropped half-way.
    async fn run<T: Send + 'static>(
        &self,
        call: Call,
        work: impl Future<Output = Result<T, DriverError>> + Send + 'static,
    ) -> Result<T, Status> {
        let started = Instant::now();
        let method = call.method;
        let span = call.span();
        self.in_flight.add(1);
        let in_flight = self.in_flight.clone();
        let task = tokio::spawn(
            async move {
                let _counted = Counted(in_flight);
                work.await
            }
            .instrument(span.clone()),
        );
        let result = match tokio::time::timeout(self.timeout, task).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(status::of(&error)),
            Ok(Err(error)) => {
                self.metrics
                    .counter(&defs::RPC_PANICS_TOTAL, &[method])
                    .increment();
                Err(Status::internal(format!("{method} failed: {error}")))
            }
            Err(_) => Err(Status::deadline_exceeded(format!(
                "{method} was not done within {:?}; it goes on in the background",
                self.timeout
            ))),
        };
        self.finished(method, started, &span, result.as_ref().err());
        result
    }

    fn finished(
        &self,
        method: &'static str,
        started: Instant,
        span: &tracing::Span,
        error: Option<&Status>,
    ) {
        let took = started.elapsed();
        self.metrics
            .histogram(&defs::RPC_DURATION_SECONDS, &[method])
            .observe(took);
        let _entered = span.enter();
        let Some(error) = error else {
            tracing::debug!(?took, "done");
            return;
        };
        let code = format!("{:?}", error.code());
        self.metrics
            .counter(&defs::RPC_ERRORS_TOTAL, &[method, &code])
            .increment();
        let message = error.message();
        match error.code() {
            // Ordinary answers: containerd asks to find out.
            Code::NotFound | Code::AlreadyExists => tracing::debug!(?took, code, message, "done"),
            Code::Internal | Code::DataLoss | Code::DeadlineExceeded => {
                tracing::error!(?took, code, message, "failed");
            }
            _ => tracing::warn!(?took, code, message, "refused"),
        }
    }

    fn driver(&self, snapshotter: &str) -> Result<Arc<dyn Driver>, Status> {
        self.drivers
            .of(snapshotter)
            .cloned()
            .map_err(|error| status::of(&error))
    }

    async fn create(
        &self,
        call: Call,
        kind: Kind,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, Status> {
        let driver = self.driver(&call.key.snapshotter)?;
        let request = CreateRequest {
            key: call.key.clone(),
            kind,
            parent: messages::optional(parent),
            labels,
            namespace: call.origin.namespace.clone(),
        };
        self.run(call, async move {
            let reference = request.labels.get(SNAPSHOT_REF).cloned();
            if kind == Kind::View {
                return driver.view(request).await.map(Ok);
            }
            match (driver.prepare(request).await?, reference) {
                (Prepared::Active(mounts), _) => Ok(Ok(mounts)),
                (Prepared::Remote, Some(reference)) => Ok(Err(reference)),
                // Without the label containerd would not look for the snapshot but try again,
                // for ever in some clients.
                (Prepared::Remote, None) => Err(DriverError::Internal(format!(
                    "driver {} answered with a remote snapshot to a request without {SNAPSHOT_REF}",
                    driver.name()
                ))),
            }
        })
        .await?
        .map_err(|reference| {
            Status::already_exists(format!("target snapshot {reference:?} already exists"))
        })
    }
}

#[tonic::async_trait]
impl snapshots_server::Snapshots for Snapshots {
    type ListStream = ReceiverStream<Result<ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Prepare", request.snapshotter, request.key, origin)?;
        let mounts = self
            .create(call, Kind::Active, request.parent, request.labels)
            .await?;
        Ok(Response::new(PrepareSnapshotResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("View", request.snapshotter, request.key, origin)?;
        let mounts = self
            .create(call, Kind::View, request.parent, request.labels)
            .await?;
        Ok(Response::new(ViewSnapshotResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn mounts(
        &self,
        request: Request<MountsRequest>,
    ) -> Result<Response<MountsResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Mounts", request.snapshotter, request.key, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let key = call.key.clone();
        let mounts = self
            .run(call, async move { driver.mounts(&key).await })
            .await?;
        Ok(Response::new(MountsResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn commit(
        &self,
        request: Request<CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Commit", request.snapshotter, request.key, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let commit = CommitSnapshot {
            key: call.key.clone(),
            name: request.name.into(),
            parent: messages::optional(request.parent),
            labels: request.labels,
            usage: None,
        };
        self.run(call, async move { driver.commit(commit).await })
            .await?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Remove", request.snapshotter, request.key, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let key = call.key.clone();
        self.run(call, async move { driver.remove(&key).await })
            .await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Stat", request.snapshotter, request.key, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let (store, key) = (self.store.clone(), call.key.clone());
        let info = self
            .run(call, async move {
                let mut info = store.read()?.info(&key)?;
                driver.decorate(&key.snapshotter, &mut info);
                Ok(info)
            })
            .await?;
        Ok(Response::new(StatSnapshotResponse {
            info: Some(info.into()),
        }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let info = request
            .info
            .ok_or_else(|| Status::invalid_argument("info is missing"))?;
        let mask = request.update_mask.unwrap_or_default().paths;
        let call = Call::new("Update", request.snapshotter, info.name, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let (store, key) = (self.store.clone(), call.key.clone());
        let info = self
            .run(call, async move {
                let snapshotter = Arc::clone(&key.snapshotter);
                let mut info = store
                    .write(Durability::Now, move |writer| {
                        writer.update(&key, &info.labels, &mask)
                    })
                    .await?;
                driver.decorate(&snapshotter, &mut info);
                Ok(info)
            })
            .await?;
        Ok(Response::new(UpdateSnapshotResponse {
            info: Some(info.into()),
        }))
    }

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new(
            "List",
            request.snapshotter.clone(),
            String::new(),
            origin.clone(),
        )?;
        let driver = self.driver(&request.snapshotter)?;
        let (service, span, started) = (self.clone(), call.span(), Instant::now());
        let done = move |error: Option<&Status>| {
            service.finished(call.method, started, &span, error);
        };
        let listing = Listing::new(&self.store, driver, request, origin.namespace, self.timeout);
        let stream = match listing {
            Ok(listing) => listing.stream(done),
            Err(error) => {
                done(Some(&error));
                return Err(error);
            }
        };
        Ok(Response::new(stream))
    }

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let call = Call::new("Usage", request.snapshotter, request.key, origin)?;
        let driver = self.driver(&call.key.snapshotter)?;
        let key = call.key.clone();
        let usage = self
            .run(call, async move { driver.usage(&key).await })
            .await?;
        Ok(Response::new(usage.into()))
    }

    async fn cleanup(&self, request: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        let origin = messages::origin(&request);
        let request = request.into_inner();
        let driver = self.driver(&request.snapshotter)?;
        let call = Call::new("Cleanup", request.snapshotter, String::new(), origin)?;
        match self.run(call, async move { driver.cleanup().await }).await {
            // Deleting goes on; containerd has nothing to do about it.
            Err(status) if status.code() == Code::DeadlineExceeded => Ok(Response::new(())),
            other => other.map(Response::new),
        }
    }
}

/// What a request is about, for its span.
#[derive(Clone, Debug)]
struct Call {
    method: &'static str,
    key: SnapshotKey,
    origin: Origin,
}

impl Call {
    fn new(
        method: &'static str,
        snapshotter: String,
        key: String,
        origin: Origin,
    ) -> Result<Self, Status> {
        if snapshotter.is_empty() {
            return Err(Status::invalid_argument("the snapshotter is not named"));
        }
        Ok(Self {
            method,
            key: SnapshotKey::new(snapshotter, key),
            origin,
        })
    }

    fn span(&self) -> tracing::Span {
        tracing::info_span!(
            "rpc",
            method = self.method,
            snapshotter = &*self.key.snapshotter,
            snapshot = &*self.key.key,
            namespace = self.origin.namespace,
            trace = self.origin.trace,
        )
    }
}

/// Counts a request as long as its task lives, whatever becomes of it.
struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.add(-1);
    }
}

#[cfg(test)]
mod tests;
