//! What stores snapshots: one [`Driver`] per kind of storage.
//!
//! A driver owns the data of its snapshots and calls the [`Store`] itself,
//! because only it knows what has to exist before a snapshot is recorded and what may be deleted
//! after it is gone. The service owns everything that is the same for all drivers: Stat, Update
//! and List, deadlines, error codes, names.

mod error;
pub mod lazy;
pub mod overlayfs;

use std::{collections::BTreeMap, fmt, sync::Arc};

use async_trait::async_trait;

pub use self::error::DriverError;
use crate::{
    admin, api,
    config::{Config, DriverKind},
    metrics::Metrics,
    store::{CommitSnapshot, Info, Kind, Labels, SnapshotKey, Store, Usage},
};

/// A mount as containerd performs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// File system type, `bind` or `overlay` here.
    pub fstype: String,
    /// Source path or name.
    pub source: String,
    /// Path below the container's root, usually empty.
    pub target: String,
    /// Options in mount(8) syntax.
    pub options: Vec<String>,
}

impl From<Mount> for api::types::Mount {
    fn from(mount: Mount) -> Self {
        Self {
            r#type: mount.fstype,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

/// A Prepare or a View.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The new snapshot's key.
    pub key: SnapshotKey,
    /// [`Kind::Active`] for Prepare, [`Kind::View`] for View.
    pub kind: Kind,
    /// The parent's name.
    pub parent: Option<Arc<str>>,
    /// Labels; those of an extraction Prepare can come from image annotations: hints only.
    pub labels: Labels,
    /// containerd's namespace, from the request's metadata.
    pub namespace: Option<String>,
}

/// The answer to a Prepare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot with these mounts.
    Active(Vec<Mount>),
    /// The layer is there already as a committed snapshot that carries the request's
    /// `containerd.io/snapshot.ref` and parent: containerd is told AlreadyExists and looks it up.
    Remote,
}

/// One kind of snapshot storage. Every method may run concurrently with every other, on different
/// and on the same keys; the store decides who wins.
///
/// The service runs each call as a task of its own that ends when it ends: after the deadline the
/// caller gets an error while the call goes on, so a method is never dropped half-way (short of the
/// death of the process, which leaves what [`Driver::recover`] and [`Driver::cleanup`] put right).
#[async_trait]
pub trait Driver: Send + Sync + fmt::Debug + 'static {
    /// What the driver is called in configuration and logs.
    fn name(&self) -> &'static str;

    /// Whatever takes time after a start: mounting again, removing leftovers. Runs once, behind
    /// the first requests. An error is logged and shown by the status.
    async fn recover(&self) -> Result<(), DriverError> {
        Ok(())
    }

    /// Makes an active snapshot, or answers that the layer is there remotely.
    async fn prepare(&self, request: CreateRequest) -> Result<Prepared, DriverError>;

    /// Makes a read-only view.
    async fn view(&self, request: CreateRequest) -> Result<Vec<Mount>, DriverError>;

    /// The mounts of an active snapshot or a view; sets up again what they need.
    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, DriverError>;

    /// Commits. containerd holds its only write lock meanwhile: a few milliseconds, no walk.
    async fn commit(&self, commit: CommitSnapshot) -> Result<(), DriverError>;

    /// Removes the record; the data goes in [`Driver::cleanup`]. containerd's garbage collector
    /// waits under a lock without a deadline.
    async fn remove(&self, key: &SnapshotKey) -> Result<(), DriverError>;

    /// What a snapshot uses without its parents.
    async fn usage(&self, key: &SnapshotKey) -> Result<Usage, DriverError>;

    /// Frees what removed snapshots left behind, of every plugin name.
    async fn cleanup(&self) -> Result<(), DriverError>;

    /// Adds labels that are not stored (or hides some) to what Stat, List and Update answer.
    fn decorate(&self, _snapshotter: &str, _info: &mut Info) {}

    /// Orders what a List in `namespace` (of the request's metadata) answers, page by page.
    /// containerd takes the first snapshot that carries the chain ID it asked for.
    fn order(&self, _namespace: Option<&str>, _infos: &mut [Info]) {}

    /// What was found out about this machine after the start, for the status: name to `works` or
    /// what does not.
    fn findings(&self) -> Option<BTreeMap<String, String>> {
        None
    }

    /// Takes down all mounts that this or an earlier daemon of this root and state has made
    /// (`--unmount`). Called instead of [`Driver::recover`] and [`Driver::stop`]; what it leaves is
    /// swept by mount table afterwards.
    async fn unmount(&self) -> Result<(), DriverError> {
        Ok(())
    }

    /// The daemon ends. With `keep_mounts` containers go on; without, everything the driver has
    /// mounted is unmounted.
    async fn stop(&self, keep_mounts: bool) -> Result<(), DriverError> {
        let _ = keep_mounts;
        Ok(())
    }
}

/// What drivers are built from.
#[derive(Clone, Debug)]
pub struct Context {
    /// The effective configuration.
    pub config: Arc<Config>,
    /// The metadata store. Drivers may add tables.
    pub store: Store,
    /// Where metrics are registered.
    pub metrics: Metrics,
    /// Where admin routes are registered.
    pub routes: admin::Routes,
    /// The variables of the environment that name proxies.
    pub environment: Arc<[(String, String)]>,
}

/// The drivers in use, by the plugin names that select them.
#[derive(Clone, Debug)]
pub struct Drivers {
    config: Arc<Config>,
    by_kind: BTreeMap<DriverKind, Arc<dyn Driver>>,
}

impl Drivers {
    /// Builds every driver that the configuration can select. Nothing here waits for a mount or a
    /// registry; that is [`Driver::recover`]'s business.
    pub fn start(context: &Context) -> Result<Self, DriverError> {
        let overlayfs = Arc::new(overlayfs::Overlayfs::new(context)?);
        let mut by_kind: BTreeMap<DriverKind, Arc<dyn Driver>> = BTreeMap::new();
        for kind in context.config.drivers() {
            let driver: Arc<dyn Driver> = match kind {
                DriverKind::Overlayfs => Arc::clone(&overlayfs) as Arc<dyn Driver>,
                DriverKind::Lazy => lazy::start(context, Arc::clone(&overlayfs))?,
            };
            by_kind.insert(kind, driver);
        }
        Ok(Self {
            config: Arc::clone(&context.config),
            by_kind,
        })
    }

    /// One driver for all plugin names of its kind, for tests of what stands above drivers.
    #[cfg(test)]
    pub(crate) fn only(config: Arc<Config>, kind: DriverKind, driver: Arc<dyn Driver>) -> Self {
        Self {
            config,
            by_kind: BTreeMap::from([(kind, driver)]),
        }
    }

    /// The driver behind a plugin name.
    pub fn of(&self, snapshotter: &str) -> Result<&Arc<dyn Driver>, DriverError> {
        self.config
            .driver_of(snapshotter)
            .and_then(|kind| self.by_kind.get(&kind))
            .ok_or_else(|| {
                DriverError::InvalidArgument(format!(
                    "no driver is configured for snapshotter {snapshotter:?}"
                ))
            })
    }

    /// Every driver once.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Driver>> {
        self.by_kind.values()
    }
}
