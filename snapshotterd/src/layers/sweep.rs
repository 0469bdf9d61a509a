//! Takes back what nobody uses: mounts, open caches, layers without snapshots.

use std::{
    collections::{BTreeSet, HashSet},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    Layers,
    record::{LayerNumber, MountNumber},
};
use crate::store::{Kind, SnapshotId, StoreError, Usage};

/// Unused layer mounts kept beyond the idle time.
const MOUNTS_KEPT: usize = 1000;
/// A cache without readers is closed after this time.
const CACHE_IDLE: Duration = Duration::from_secs(60);

impl Layers {
    /// Unmounts, closes and deletes what nobody uses. Only local work; one at a time.
    pub async fn sweep(&self) -> Result<(), StoreError> {
        let _one = self.sweeping.lock().await;
        let in_use = self.mounts_in_use().await?;
        self.mounts
            .unmount_idle(&in_use, self.config.lazy.unmount_after.0, MOUNTS_KEPT)
            .await;
        self.blobs.close_idle(CACHE_IDLE).await;
        self.remove_unreferenced(&in_use).await
    }

    /// The mounts below active snapshots and views.
    async fn mounts_in_use(&self) -> Result<BTreeSet<MountNumber>, StoreError> {
        let store = self.store.clone();
        let parents = tokio::task::spawn_blocking(move || {
            let mut parents: HashSet<SnapshotId> = HashSet::new();
            store.read()?.for_each(|_, snapshot| {
                if snapshot.info.kind != Kind::Committed {
                    parents.extend(snapshot.parents);
                }
                Ok(())
            })?;
            Ok::<_, StoreError>(parents)
        })
        .await
        .unwrap_or(Err(StoreError::Closed))?;
        Ok(parents
            .into_iter()
            .filter_map(|id| self.table.snapshot(id)?.mount)
            .collect())
    }

    /// Deletes layers that no snapshot has used for the configured time.
    async fn remove_unreferenced(&self, in_use: &BTreeSet<MountNumber>) -> Result<(), StoreError> {
        let referenced: HashSet<LayerNumber> = self
            .table
            .snapshots()
            .into_iter()
            .map(|(_, snapshot)| snapshot.layer)
            .collect();
        let keep = self.config.cache.keep_unreferenced.0;
        let due: Vec<LayerNumber> = {
            let mut unreferenced = self.unreferenced.lock();
            // What was held again meanwhile gets the whole time again.
            unreferenced
                .retain(|number, _| !referenced.contains(number) && !self.is_pinned(*number));
            self.table
                .layers()
                .iter()
                .map(|record| record.number)
                .filter(|number| !referenced.contains(number) && !self.is_pinned(*number))
                .filter(|number| {
                    let since = unreferenced.entry(*number).or_insert_with(Instant::now);
                    since.elapsed() >= keep
                })
                .collect()
        };
        for number in due {
            self.remove_layer(number, in_use).await?;
        }
        Ok(())
    }

    async fn remove_layer(
        &self,
        number: LayerNumber,
        in_use: &BTreeSet<MountNumber>,
    ) -> Result<(), StoreError> {
        let Some(record) = self.table.layer(number) else {
            return Ok(());
        };
        for (mount, key) in self.table.mounts() {
            if key.layer != number {
                continue;
            }
            // Removed snapshots below a container that still runs: the container has it.
            if in_use.contains(&mount) || self.mounts.unmount(mount).await.is_err() {
                return Ok(());
            }
        }
        // A private clone in another mount namespace can hold the device open after the umount.
        if self.blobs.has_handles(number) || !self.blobs.close(number).await {
            return Ok(());
        }
        if self.is_pinned(number) {
            return Ok(());
        }
        if !self.table.remove(number).await? {
            return Ok(());
        }
        self.unreferenced.lock().remove(&number);
        let dir = self.opener().dir(number);
        let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
        if let Ok(Err(error)) = removed {
            warn!(layer = %number, %error, "a removed layer's directory stays");
        } else {
            info!(layer = %record.identity.layer, %number, "layer removed");
        }
        Ok(())
    }

    /// What a lazy snapshot uses on disk; `None` if it is not lazy. A layer that several snapshots
    /// share counts for the first of them alone.
    pub async fn usage(&self, id: SnapshotId) -> Option<Usage> {
        let snapshot = self.table.snapshot(id)?;
        let first = self
            .table
            .snapshots()
            .into_iter()
            .filter(|(_, other)| other.layer == snapshot.layer)
            .map(|(id, _)| id)
            .min();
        if first != Some(id) {
            return Some(Usage::default());
        }
        let dir = self.opener().dir(snapshot.layer);
        let counted = tokio::task::spawn_blocking(move || {
            let mut usage = Usage::default();
            for folder in [dir.path().to_owned(), dir.blob(), dir.path().join("meta")] {
                let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
                for entry in entries {
                    if let Ok(metadata) = entry.metadata() {
                        usage.bytes += metadata.blocks() * 512;
                        usage.inodes += 1;
                    }
                }
            }
            usage
        });
        Some(counted.await.unwrap_or_default())
    }

    /// Closes every cache now, for tests of memory and for an orderly end.
    pub async fn close_caches(self: &Arc<Self>) {
        self.blobs.close_idle(Duration::ZERO).await;
    }
}
