//! Ordinary unpacked layers: one directory per snapshot, stacked by the kernel's overlay.
//!
//! Below the root: `snapshots/<id>/fs` (the layer, 0755) and `snapshots/<id>/work` (0711, active
//! ones only). Ids come from the store and are never reused, so a directory can be made before its
//! snapshot is recorded: whatever is found under an id that the store does not know is garbage,
//! and [`Driver::cleanup`] deletes it.
//!
//! Lower directories are named by short symbolic links (`<lowers>/s<id>`), because all of them
//! have to fit into the 4 KiB of one mount(2) call, on every chain the same way: a child's list
//! extends its parent's unchanged.
//!
//! Usage of a committed snapshot is computed after the commit, in the background or when it is
//! first asked for, never inside it.

mod disk;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use tokio::sync::{Mutex, Semaphore};

use super::{Context, CreateRequest, Driver, DriverError, Mount, Prepared};
use crate::store::{
    CommitSnapshot, CreateSnapshot, Durability, Kind, Snapshot, SnapshotId, SnapshotKey, Store,
    StoreError, Usage,
};

/// Owner of a layer's root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The overlayfs driver. Clones share everything.
#[derive(Clone, Debug)]
pub struct Overlayfs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    snapshots: PathBuf,
    lowers: PathBuf,
    /// Options of every overlay mount.
    options: Vec<String>,
    /// One background walk at a time.
    walks: Semaphore,
    /// One clean-up at a time.
    cleaning: Mutex<()>,
}

impl Overlayfs {
    /// Prepares the directories under the configured root.
    pub fn new(context: &Context) -> Result<Self, DriverError> {
        let snapshots = context.config.root.join("snapshots");
        let lowers = context.config.lowers.clone();
        for directory in [&snapshots, &lowers] {
            disk::make_private(directory).map_err(DriverError::io("create", directory))?;
        }
        let mut options = context.config.overlayfs.mount_options.clone();
        if !options.iter().any(|option| option.starts_with("index="))
            && Path::new("/sys/module/overlay/parameters/index").exists()
        {
            options.push("index=off".to_owned());
        }
        Ok(Self {
            inner: Arc::new(Inner {
                store: context.store.clone(),
                snapshots,
                lowers,
                options,
                walks: Semaphore::new(1),
                cleaning: Mutex::new(()),
            }),
        })
    }

    /// The content of snapshot `id`: the upper directory while it is active, the layer afterwards.
    pub fn layer(&self, id: SnapshotId) -> PathBuf {
        self.inner.directory(id).join("fs")
    }

    /// A short path to the layer of snapshot `id`, for `lowerdir=`; sets it up where it is missing
    /// (it lives in /run and is gone after a reboot). Blocks shortly.
    pub fn lower(&self, id: SnapshotId) -> Result<PathBuf, DriverError> {
        let link = self.inner.lowers.join(format!("s{id}"));
        disk::point(&link, &self.layer(id)).map_err(DriverError::io("link", &link))?;
        Ok(link)
    }

    /// Makes the directories of a new snapshot whose root shall belong to `owner` (of the layer
    /// below; root's without one). Hold the id's reservation until the snapshot is recorded.
    /// Blocks shortly.
    pub fn create(
        &self,
        id: SnapshotId,
        kind: Kind,
        owner: Option<Owner>,
    ) -> Result<(), DriverError> {
        let directory = self.inner.directory(id);
        disk::create(&directory, kind == Kind::Active, owner)
            .map_err(DriverError::io("create", directory))
    }

    /// Undoes [`Overlayfs::create`] after the snapshot could not be recorded. Blocks.
    pub fn discard(&self, id: SnapshotId) {
        let directory = self.inner.directory(id);
        if let Err(error) = disk::remove(&directory) {
            // The next clean-up tries again.
            tracing::warn!(path = %directory.display(), %error, "cannot delete a directory");
        }
    }

    /// Who owns the root directory of the layer at `path`.
    pub fn owner(path: &Path) -> Result<Owner, DriverError> {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = fs::metadata(path).map_err(DriverError::io("stat", path))?;
        Ok(Owner {
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }

    /// The mounts of snapshot `id` over `lowers` (nearest first), which may be anything that can
    /// be a lower directory: a bind mount where nothing is stacked, an overlay otherwise.
    pub fn compose(&self, id: SnapshotId, kind: Kind, lowers: &[PathBuf]) -> Vec<Mount> {
        let writable = kind == Kind::Active;
        match lowers {
            [] => vec![bind(&self.layer(id), writable)],
            [only] if !writable => vec![bind(only, false)],
            _ => {
                let mut options = self.inner.options.clone();
                if writable {
                    let work = self.inner.directory(id).join("work");
                    options.push(format!("workdir={}", work.display()));
                    options.push(format!("upperdir={}", self.layer(id).display()));
                }
                let lowers: Vec<_> = lowers
                    .iter()
                    .map(|lower| lower.display().to_string())
                    .collect();
                options.push(format!("lowerdir={}", lowers.join(":")));
                vec![Mount {
                    fstype: "overlay".to_owned(),
                    source: "overlay".to_owned(),
                    target: String::new(),
                    options,
                }]
            }
        }
    }

    /// Computes the usage of a committed snapshot in the background and records it.
    pub fn count_later(&self, key: SnapshotKey, id: SnapshotId) {
        let this = self.clone();
        tokio::spawn(async move {
            // The semaphore is never closed.
            let Ok(_turn) = this.inner.walks.acquire().await else {
                return;
            };
            match this.count(&key, id).await {
                // Removed before its turn came.
                Ok(_) | Err(DriverError::Store(StoreError::NotFound { .. })) => {}
                Err(error) => tracing::warn!(snapshot = %key, %error, "cannot compute usage"),
            }
        });
    }

    /// Walks a committed snapshot and records what it uses.
    pub async fn count(&self, key: &SnapshotKey, id: SnapshotId) -> Result<Usage, DriverError> {
        // It may have been removed, and its directory with it.
        self.inner.store.read()?.info(key)?;
        let usage = self.walk(id).await?;
        let key = key.clone();
        self.inner
            .store
            .write(Durability::Soon, move |writer| {
                writer.set_usage(&key, usage)
            })
            .await?;
        Ok(usage)
    }

    /// What the layer of `id` uses now.
    pub async fn walk(&self, id: SnapshotId) -> Result<Usage, DriverError> {
        let path = self.layer(id);
        blocking(move || disk::usage(&path).map_err(DriverError::io("walk", path))).await
    }

    async fn create_snapshot(&self, request: CreateRequest) -> Result<Vec<Mount>, DriverError> {
        let reservation = self.inner.store.reserve_id().await?;
        let id = reservation.id();
        let parent = match &request.parent {
            Some(name) => {
                let parent = self
                    .inner
                    .store
                    .read()?
                    .snapshot(&request.key.sibling(name));
                Some(parent.map_err(|error| match error {
                    StoreError::NotFound { key } => StoreError::ParentNotFound { parent: key },
                    other => other,
                })?)
            }
            None => None,
        };
        let this = self.clone();
        let kind = request.kind;
        blocking(move || {
            let owner = parent
                .map(|parent| Self::owner(&this.layer(parent.id)))
                .transpose()?;
            this.create(id, kind, owner)
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
            .inner
            .store
            .write(Durability::Now, move |writer| writer.create(&new))
            .await;
        let this = self.clone();
        blocking(move || match created {
            Ok(snapshot) => this.mounts_of(&snapshot),
            Err(error) => {
                this.discard(id);
                Err(error.into())
            }
        })
        .await
    }

    /// The mounts of a snapshot whose whole chain is made of ordinary layers. Blocks shortly.
    fn mounts_of(&self, snapshot: &Snapshot) -> Result<Vec<Mount>, DriverError> {
        let kind = snapshot.info.kind;
        if kind == Kind::Committed {
            return Err(StoreError::WrongKind {
                operation: "mount",
                key: snapshot.info.name.clone(),
                kind,
            }
            .into());
        }
        let lowers = match snapshot.parents.as_slice() {
            // Not stacked, so not short.
            [only] if kind == Kind::View => vec![self.layer(*only)],
            parents => parents
                .iter()
                .map(|id| self.lower(*id))
                .collect::<Result<_, _>>()?,
        };
        Ok(self.compose(snapshot.id, kind, &lowers))
    }
}

#[async_trait]
impl Driver for Overlayfs {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    async fn recover(&self) -> Result<(), DriverError> {
        let mut uncounted = Vec::new();
        let reader = self.inner.store.read()?;
        reader.for_each(|key, snapshot| {
            if snapshot.info.kind == Kind::Committed && snapshot.usage.is_none() {
                uncounted.push((key, snapshot.id));
            }
            Ok(())
        })?;
        drop(reader);
        for (key, id) in uncounted {
            // A snapshot of another driver has no directory here.
            if self.layer(id).exists() {
                self.count_later(key, id);
            }
        }
        self.cleanup().await
    }

    async fn prepare(&self, request: CreateRequest) -> Result<Prepared, DriverError> {
        self.create_snapshot(request).await.map(Prepared::Active)
    }

    async fn view(&self, request: CreateRequest) -> Result<Vec<Mount>, DriverError> {
        self.create_snapshot(request).await
    }

    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>, DriverError> {
        let snapshot = self.inner.store.read()?.snapshot(key)?;
        let this = self.clone();
        blocking(move || this.mounts_of(&snapshot)).await
    }

    async fn commit(&self, commit: CommitSnapshot) -> Result<(), DriverError> {
        let name = commit.key.sibling(&commit.name);
        let snapshot = self
            .inner
            .store
            .write(Durability::Now, move |writer| writer.commit(&commit))
            .await?;
        if snapshot.usage.is_none() {
            self.count_later(name, snapshot.id);
        }
        Ok(())
    }

    async fn remove(&self, key: &SnapshotKey) -> Result<(), DriverError> {
        let key = key.clone();
        self.inner
            .store
            .write(Durability::Soon, move |writer| writer.remove(&key))
            .await?;
        Ok(())
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage, DriverError> {
        let snapshot = self.inner.store.read()?.snapshot(key)?;
        match (snapshot.info.kind, snapshot.usage) {
            (Kind::View, _) => Ok(Usage::default()),
            (Kind::Active, _) => self.walk(snapshot.id).await,
            (Kind::Committed, Some(usage)) => Ok(usage),
            (Kind::Committed, None) => self.count(key, snapshot.id).await,
        }
    }

    async fn cleanup(&self) -> Result<(), DriverError> {
        let _one = self.inner.cleaning.lock().await;
        // A removal that a power cut would undo must not cost the data.
        self.inner.store.flush().await?;
        let this = self.clone();
        blocking(move || {
            let inner = &this.inner;
            // The order matters: see `Store::live_ids`.
            let directories = disk::numbered(&inner.snapshots, "")
                .map_err(DriverError::io("list", &inner.snapshots))?;
            let links = disk::numbered(&inner.lowers, "s")
                .map_err(DriverError::io("list", &inner.lowers))?;
            let live = inner.store.live_ids()?;
            for (id, path) in links.iter().chain(&directories) {
                if live.contains(id) {
                    continue;
                }
                match disk::remove(path) {
                    Ok(()) => tracing::debug!(path = %path.display(), "deleted"),
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "cannot delete");
                    }
                }
            }
            Ok(())
        })
        .await
    }
}

impl Inner {
    fn directory(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.to_string())
    }
}

fn bind(source: &Path, writable: bool) -> Mount {
    Mount {
        fstype: "bind".to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec![
            if writable { "rw" } else { "ro" }.to_owned(),
            "rbind".to_owned(),
        ],
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(DriverError::Internal(format!("file system work: {error}"))))
}
