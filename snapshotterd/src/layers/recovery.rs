//! What follows a start, and what an end leaves behind.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use fuse::{BlobFs, mounts::mountinfo};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::{
    Layers,
    blobs::LayerNodes,
    kernel,
    record::{LayerNumber, Verdict},
};
use crate::store::StoreError;

/// Layers that go on hydrating after a start, at the same time.
const RESUME_PARALLEL: usize = 8;
/// How often memory that is free goes back to the system, if much was used.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(3);
/// How often what nobody uses is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Why recovery is incomplete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// BlobFs does not start.
    #[error("BlobFs does not start: {0}")]
    BlobFs(String),
    /// The kernel cannot present layers lazily.
    #[error("layers cannot be lazy here: {0}")]
    Kernel(String),
    /// What is mounted cannot be read.
    #[error("cannot read what is mounted")]
    Mounts(#[source] io::Error),
}

impl Layers {
    /// Takes up where the last daemon ended: serves BlobFs, adopts mounts, removes leftovers,
    /// goes on hydrating. No registry is waited for.
    pub async fn recover(self: &Arc<Self>) -> Result<(), RecoverError> {
        let nodes = Arc::new(LayerNodes::new(Arc::clone(&self.blobs)));
        let started = BlobFs::start(self.blobfs_options.clone(), nodes).await;
        let serving = match started {
            Ok(blobfs) => Ok(Arc::new(blobfs)),
            Err(error) => Err(storage::ranges::report(&error)),
        };
        let adopted = serving.as_ref().is_ok_and(|blobfs| blobfs.adopted());
        let failure = serving.as_ref().err().cloned();
        self.serving.send_replace(Some(serving));
        if let Err(error) = self.mounts.reconcile(adopted).await {
            let why = format!("cannot read what is mounted: {error}");
            self.presents.send_replace(Some(Err(why)));
            return Err(RecoverError::Mounts(error));
        }
        if let Err(error) = self.remove_leftovers().await {
            // The disk may be full: nothing else here needs them gone.
            let error = storage::ranges::report(&error);
            warn!(
                error,
                "leftovers of the former daemon stay until the next start"
            );
        }
        let weak = Arc::downgrade(self);
        tokio::spawn(sweep_forever(weak));
        tokio::spawn(give_back_forever(Arc::downgrade(self)));
        let this = Arc::clone(self);
        tokio::spawn(async move { this.resume().await });
        if let Some(error) = failure {
            let why = format!("BlobFs does not start: {error}");
            self.presents.send_replace(Some(Err(why)));
            return Err(RecoverError::BlobFs(error));
        }
        let config = &self.config;
        let (found, presents) = kernel::examine(&config.state, &config.root, &self.helper).await;
        self.direct_io.store(found.direct_io(), Ordering::Relaxed);
        // Recovery runs once.
        let _ = self.kernel.set(found);
        let unable = presents.as_ref().err().cloned();
        self.presents.send_replace(Some(presents));
        self.note_containerd();
        match unable {
            Some(why) => Err(RecoverError::Kernel(why)),
            None => Ok(()),
        }
    }

    /// Records of snapshots that are gone, layers that were never finished, directories without
    /// a layer.
    async fn remove_leftovers(&self) -> Result<(), StoreError> {
        // Listed before the tables are asked: what comes in between is not in the list.
        let layers = self.opener().layers.clone();
        let directories = tokio::task::spawn_blocking(move || numbered(&layers))
            .await
            .unwrap_or_default();
        // Known first: what is made in between is alive.
        let mut gone = self.table.known_snapshots();
        let live = self.store.live_ids()?;
        gone.retain(|id| !live.contains(id));
        self.table.forget(gone).await?;
        for record in self.table.layers() {
            let coming = self.obtaining.lock().contains_key(&record.identity);
            if !record.ready && !coming {
                self.table.remove(record.number).await?;
            }
        }
        for number in directories {
            if self.table.layer(number).is_some() {
                continue;
            }
            let dir = self.opener().dir(number);
            let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
            if let Ok(Err(error)) = removed {
                warn!(layer = %number, %error, "a leftover layer directory stays");
            }
        }
        Ok(())
    }

    /// Says which containerd hosts us, once it answers.
    fn note_containerd(&self) {
        let Some(containerd) = self.documents.containerd.clone() else {
            return;
        };
        tokio::spawn(async move {
            let address = containerd.address().display().to_string();
            match containerd.version().await {
                Ok(version) => info!(address, version, "containerd answers"),
                Err(error) => {
                    let error = storage::ranges::report(&error);
                    info!(
                        error,
                        "containerd does not answer; manifests come from the registry"
                    );
                }
            }
        });
    }

    /// Goes on hydrating what was not finished.
    async fn resume(self: Arc<Self>) {
        if self.config.lazy.hydration == crate::config::Hydration::Off {
            return;
        }
        let gate = Arc::new(Semaphore::new(RESUME_PARALLEL));
        for record in self.matching(None) {
            let over = record.complete || !matches!(record.verdict, Verdict::Claimed);
            if over {
                continue;
            }
            let Ok(permit) = Arc::clone(&gate).acquire_owned().await else {
                return;
            };
            let blob = match self.blobs.get(record.number).await {
                Ok(blob) => blob,
                Err(error) => {
                    warn!(layer = %record.identity.layer, %error, "cannot go on hydrating");
                    continue;
                }
            };
            self.hydrate_later(&record, &blob);
            let over = blob.hydrated();
            tokio::spawn(async move {
                let _ = over.await;
                drop(permit);
            });
        }
    }

    /// Stops serving. With `keep_mounts` readers wait for the next daemon; without, everything is
    /// unmounted, also what a daemon that is gone has left.
    pub async fn stop(&self, keep_mounts: bool) {
        if !keep_mounts {
            let unserved = self.serving.borrow().is_none();
            // Served while layers are unmounted: that may wait for answers.
            if unserved && let Some(blobfs) = self.take_over().await {
                self.serving.send_replace(Some(Ok(blobfs)));
            }
            if let Err(error) = self.mounts.detach_all().await {
                warn!(%error, "cannot read what is mounted");
            }
        }
        let stopping = Some(Err("the daemon is stopping".to_owned()));
        let serving = match self.serving.send_replace(stopping) {
            Some(Ok(blobfs)) => Some(blobfs),
            _ => None,
        };
        if let Some(blobfs) = serving {
            let stopped = match Arc::into_inner(blobfs) {
                Some(blobfs) => blobfs
                    .stop(keep_mounts)
                    .await
                    .map_err(|error| storage::ranges::report(&error)),
                None => Err("it is still in use".to_owned()),
            };
            if let Err(error) = stopped {
                warn!(error, "BlobFs is not ended properly");
            }
        }
        self.blobs.flush().await;
        info!(keep_mounts, "layers stopped");
    }

    /// The session of a daemon that is gone, only to end it.
    async fn take_over(&self) -> Option<Arc<BlobFs>> {
        let options = &self.blobfs_options;
        let mounted =
            mountinfo().is_ok_and(|mounts| mounts.iter().any(|m| m.target == options.mountpoint));
        if !mounted && !options.state_dir.exists() {
            return None;
        }
        let nodes = Arc::new(LayerNodes::new(Arc::clone(&self.blobs)));
        match BlobFs::start(options.clone(), nodes).await {
            Ok(blobfs) => Some(Arc::new(blobfs)),
            Err(error) => {
                let error = storage::ranges::report(&error);
                warn!(error, "cannot take BlobFs over to end it");
                None
            }
        }
    }
}

/// The numbers that have a directory. Blocks.
fn numbered(layers: &Path) -> Vec<LayerNumber> {
    let entries = fs::read_dir(layers).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(LayerNumber)
        .collect()
}

/// Parsing an index takes tens of megabytes for a moment; when things are quiet again they go back
/// to the system.
async fn give_back_forever(layers: Weak<Layers>) {
    loop {
        tokio::time::sleep(GIVE_BACK_EVERY).await;
        let Some(layers) = layers.upgrade() else {
            return;
        };
        if layers.parsed.swap(false, Ordering::Relaxed) {
            // Nothing to be done about a panic in the allocator.
            let _ = tokio::task::spawn_blocking(crate::sys::give_memory_back).await;
        }
    }
}

async fn sweep_forever(layers: Weak<Layers>) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let Some(layers) = layers.upgrade() else {
            return;
        };
        if let Err(error) = layers.sweep().await {
            warn!(error = &error as &dyn std::error::Error, "sweep");
        }
    }
}
