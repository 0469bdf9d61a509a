//! Layers that are served before they are downloaded.
//!
//! An extraction Prepare that names image and layer is answered with a committed snapshot as soon
//! as the layer's index is here; everything else is an ordinary overlay snapshot whose chain may
//! hold lazy layers anywhere. Ordinary layers, active snapshots and their directories are
//! [`Overlayfs`]'s; lazy layers are [`Layers`]'.

mod answers;
mod chain;
mod committed;
mod routes;
mod start;

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tracing::{debug, info, warn};

pub use self::start::start;
use self::{
    answers::Answers,
    chain::{Chain, Link},
    committed::{Ahead, Layer},
};
use super::{CreateRequest, Driver, DriverError, Mount, Prepared, overlayfs::Overlayfs};
use crate::{
    layers::{Layers, record::Verdict},
    resolve::{
        Resolver,
        labels::{Announced, SNAPSHOT_REF},
        reason::NotLazy,
    },
    store::{
        CommitSnapshot, CreateSnapshot, Durability, Info, Kind, Snapshot, SnapshotKey, Store,
        StoreError, Usage,
    },
};

/// After a start, the kernel is probed by then.
const PRESENTABLE_LIMIT: Duration = Duration::from_secs(5);
/// Left of a request's time for what comes after mounting.
const RESERVE: Duration = Duration::from_millis(500);

/// The lazy driver.
pub struct Lazy {
    store: Store,
    overlayfs: Arc<Overlayfs>,
    layers: Arc<Layers>,
    resolver: Resolver,
    answers: Answers,
    ahead: Ahead,
    /// How long a request may take.
    rpc_timeout: Duration,
    /// Lazy answers only for layers that are proven already.
    only_proven: bool,
}

/// Why an extraction Prepare was not answered lazily.
enum Declined {
    /// It becomes an ordinary snapshot.
    Ordinary(NotLazy),
    /// It fails.
    Failed(DriverError),
}

impl<E: Into<DriverError>> From<E> for Declined {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl From<NotLazy> for Declined {
    fn from(reason: NotLazy) -> Self {
        Self::Ordinary(reason)
    }
}

impl Lazy {
    /// Answers an extraction Prepare with a committed snapshot.
    async fn prepare_remote(&self, request: &CreateRequest) -> Result<(), Declined> {
        let begun = Instant::now();
        let announced = Announced::from_labels(&request.labels)?;
        if announced.has_parent_chain && request.parent.is_none() {
            return Err(NotLazy::ParallelUnpack.into());
        }
        let chain = self.chain_below(request)?;
        let namespace = request.namespace.as_deref().unwrap_or_default();
        let mut resolved = self.resolver.resolve(namespace, &announced).await?;
        // Both together take no longer than the longer of them.
        let left = PRESENTABLE_LIMIT.saturating_sub(begun.elapsed());
        self.layers.presentable(left).await?;
        // What was resolved a while ago may have been judged since.
        let now = self.layers.hold(resolved.record.number);
        resolved.record = now.ok_or_else(|| NotLazy::Local("the layer was just removed".into()))?;
        self.layers
            .trusted(&resolved.record, resolved.diff_id)
            .map_err(|why| {
                DriverError::FailedPrecondition(format!("{}: {why}", announced.image))
            })?;
        // A claim that is not known cannot have been compared.
        let proven = resolved.record.verdict == Verdict::Proven && resolved.diff_id.is_some();
        if self.only_proven && !proven {
            return Err(NotLazy::Off(format!(
                "lazy.trust = \"proven\" and layer {} is {} so far",
                announced.layer,
                resolved.record.verdict.name()
            ))
            .into());
        }
        if let Some(name) = self.answered_before(request, &announced, &resolved)? {
            self.answers.note(request, &announced.chain, &name);
            if let Err(error) = self.take_up(request, &name).await {
                // It is the answer all the same.
                debug!(name, %error, "a snapshot keeps the labels it was committed ahead with");
            }
            return Ok(());
        }
        let mut layers = vec![Layer::asked(request, &announced, resolved)];
        layers.extend(self.above(request, &announced));
        let layers = self.present(chain, layers).await?;
        let mounts = layers.iter().filter_map(|layer| layer.lazy.mount).collect();
        let name = self.commit_answers(request, layers).await?;
        self.answers.note(request, &announced.chain, &name);
        self.layers.mount_ahead(mounts);
        Ok(())
    }

    /// Makes an active snapshot or a view.
    async fn create_ordinary(
        &self,
        request: CreateRequest,
        reason: Option<&NotLazy>,
        begun: Instant,
    ) -> Result<Vec<Mount>, DriverError> {
        let chain = self.chain_below(&request)?;
        self.check(&chain)?;
        self.mount(&chain, begun).await?;
        let reservation = self.store.reserve_id().await?;
        let id = reservation.id();
        let kind = request.kind;
        let overlayfs = Arc::clone(&self.overlayfs);
        let parent = chain.links.first().cloned();
        blocking(move || {
            let owner = match parent {
                Some(Link::Unpacked(parent)) => Some(Overlayfs::owner(&overlayfs.layer(parent))?),
                // The root of a lazy layer is root's.
                Some(Link::Lazy(_)) | None => None,
            };
            overlayfs.create(id, kind, owner)
        })
        .await?;
        let new = CreateSnapshot {
            key: request.key,
            kind,
            parent: request.parent,
            labels: request.labels,
            id,
        };
        let created = self
            .store
            .write(Durability::Now, move |writer| writer.create(&new))
            .await;
        match created {
            Ok(snapshot) => {
                if let Some(reason) = reason {
                    self.layers.set_reason(id, &reason.to_string()).await?;
                }
                self.compose(&snapshot, &chain).await
            }
            Err(error) => {
                let overlayfs = Arc::clone(&self.overlayfs);
                blocking(move || {
                    overlayfs.discard(id);
                    Ok(())
                })
                .await?;
                Err(error.into())
            }
        }
    }

    /// The chain that a new snapshot will be built on.
    fn chain_below(&self, request: &CreateRequest) -> Result<Chain, DriverError> {
        let reader = self.store.read()?;
        // What the transaction would find out late is better known before anything is mounted.
        match reader.info(&request.key) {
            Ok(_) => {
                return Err(StoreError::AlreadyExists {
                    key: request.key.key.to_string(),
                }
                .into());
            }
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(parent) = &request.parent else {
            return Ok(Chain::default());
        };
        let parent =
            reader
                .snapshot(&request.key.sibling(parent))
                .map_err(|error| match error {
                    StoreError::NotFound { key } => StoreError::ParentNotFound { parent: key },
                    other => other,
                })?;
        if parent.info.kind != Kind::Committed {
            return Err(StoreError::ParentNotCommitted {
                parent: parent.info.name,
                kind: parent.info.kind,
            }
            .into());
        }
        let ids = std::iter::once(parent.id).chain(parent.parents);
        Ok(Chain::new(ids, &self.layers))
    }

    /// Refuses chains that hold a refuted layer.
    fn check(&self, chain: &Chain) -> Result<(), DriverError> {
        for link in &chain.links {
            let Link::Lazy(lazy) = link else { continue };
            let Some(record) = self.layers.record(lazy.layer) else {
                return Err(DriverError::Internal(format!(
                    "layer {} of the chain is not known",
                    lazy.layer
                )));
            };
            self.layers
                .trusted(&record, lazy.diff_id)
                .map_err(|why| DriverError::FailedPrecondition(why.to_string()))?;
        }
        Ok(())
    }

    /// Mounts what of the chain is not mounted, in what is left of the time of a request.
    async fn mount(&self, chain: &Chain, begun: Instant) -> Result<(), DriverError> {
        let left = self.rpc_timeout.saturating_sub(begun.elapsed() + RESERVE);
        self.layers
            .mounts()
            .ensure(&chain.mounts(), left)
            .await
            .map_err(|error| DriverError::Unavailable(error.to_string()))
    }

    async fn compose(&self, snapshot: &Snapshot, chain: &Chain) -> Result<Vec<Mount>, DriverError> {
        let (overlayfs, layers) = (Arc::clone(&self.overlayfs), Arc::clone(&self.layers));
        let (id, kind, chain) = (snapshot.id, snapshot.info.kind, chain.clone());
        blocking(move || {
            let lowers = chain.lowers(&layers, &overlayfs)?;
            Ok(overlayfs.compose(id, kind, &lowers))
        })
        .await
    }
}

#[async_trait]
impl Driver for Lazy {
    fn name(&self) -> &'static str {
        "lazy"
    }

    async fn recover(&self) -> Result<(), DriverError> {
        let layers = self.layers.recover().await;
        self.overlayfs.recover().await?;
        layers.map_err(|error| DriverError::Internal(error.to_string()))
    }

    async fn prepare(&self, request: CreateRequest) -> Result<Prepared, DriverError> {
        let begun = Instant::now();
        if !request.labels.contains_key(SNAPSHOT_REF) {
            let mounts = self.create_ordinary(request, None, begun).await?;
            return Ok(Prepared::Active(mounts));
        }
        let key = request.key.clone();
        match self.prepare_remote(&request).await {
            Ok(()) => {
                debug!("remote-snapshot-prepared" = "true", key = %key);
                Ok(Prepared::Remote)
            }
            Err(Declined::Failed(error)) => Err(error),
            Err(Declined::Ordinary(reason)) => {
                self.layers.count_declined(&reason);
                // No labels at all: an ordinary unpack that nobody expected to be lazy.
                if matches!(reason, NotLazy::NoAnnotations) {
                    info!("remote-snapshot-prepared" = "false", key = %key, error = %reason);
                } else {
                    warn!("remote-snapshot-prepared" = "false", key = %key, error = %reason);
                }
                let mounts = self.create_ordinary(request, Some(&reason), begun).await?;
                Ok(Prepared::Active(mounts))
            }
        }
    }

    async fn view(&self, request: CreateRequest) -> Result<Vec<Mount>, DriverError> {
        self.create_ordinary(request, None, Instant::now()).await
    }

    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, DriverError> {
        let begun = Instant::now();
        let snapshot = self.store.read()?.snapshot(key)?;
        if snapshot.info.kind == Kind::Committed {
            return Err(StoreError::WrongKind {
                operation: "mount",
                key: snapshot.info.name,
                kind: Kind::Committed,
            }
            .into());
        }
        let chain = Chain::new(snapshot.parents.iter().copied(), &self.layers);
        self.mount(&chain, begun).await?;
        self.compose(&snapshot, &chain).await
    }

    async fn commit(&self, commit: CommitSnapshot) -> Result<(), DriverError> {
        self.overlayfs.commit(commit).await
    }

    async fn remove(&self, key: &SnapshotKey) -> Result<(), DriverError> {
        let id = self.store.read()?.snapshot(key)?.id;
        self.overlayfs.remove(key).await?;
        self.ahead.take(key);
        self.layers.forget(vec![id]).await?;
        Ok(())
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage, DriverError> {
        let id = self.store.read()?.snapshot(key)?.id;
        match self.layers.usage(id).await {
            Some(usage) => Ok(usage),
            None => self.overlayfs.usage(key).await,
        }
    }

    async fn cleanup(&self) -> Result<(), DriverError> {
        self.overlayfs.cleanup().await?;
        self.layers.sweep().await?;
        Ok(())
    }

    fn order(&self, namespace: Option<&str>, infos: &mut [Info]) {
        self.answers.order(namespace, infos);
    }

    fn findings(&self) -> Option<BTreeMap<String, String>> {
        self.layers.kernel().cloned()
    }

    async fn unmount(&self) -> Result<(), DriverError> {
        self.layers.stop(false).await;
        Ok(())
    }

    async fn stop(&self, keep_mounts: bool) -> Result<(), DriverError> {
        self.layers.stop(keep_mounts).await;
        Ok(())
    }
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy")
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(DriverError::Internal(format!("file system work: {error}"))))
}
