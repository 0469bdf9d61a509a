//! What layer mounts are made of.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fuse::BlobFs;
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::sync::watch;

use super::{
    blobs::{Opener, describe},
    mounts::{GiveUp, Parts, Provider},
    record::MountKey,
    variants,
};

/// BlobFs has to serve by then for a mount that needs it.
const SERVING_LIMIT: Duration = Duration::from_secs(7);

/// BlobFs as it comes up: not yet, serving, or why it never will.
pub type Serving = Option<Result<Arc<BlobFs>, String>>;

/// Provides metadata images and devices.
#[derive(Debug)]
pub struct LayerParts {
    opener: Opener,
    blobfs: watch::Receiver<Serving>,
    direct_io: Arc<AtomicBool>,
}

impl LayerParts {
    /// Devices of incomplete layers are files on the BlobFs that `blobfs` will hold; those of
    /// complete ones are plain files, read past their page cache while `direct_io` says so.
    pub fn new(
        opener: Opener,
        blobfs: watch::Receiver<Serving>,
        direct_io: Arc<AtomicBool>,
    ) -> Self {
        Self {
            opener,
            blobfs,
            direct_io,
        }
    }
}

impl Provider for LayerParts {
    fn parts(&self, key: &MountKey) -> BoxFuture<'static, Result<Parts, String>> {
        let (opener, key) = (self.opener.clone(), key.clone());
        let (mut blobfs, direct_io) = (self.blobfs.clone(), Arc::clone(&self.direct_io));
        async move {
            let record = opener
                .table
                .layer(key.layer)
                .filter(|record| record.ready)
                .ok_or("the layer is not known")?;
            let (restoring, variant) = (opener.clone(), key.variant.clone());
            let known = Arc::clone(&record);
            let metadata = tokio::task::spawn_blocking(move || {
                variants::restore(&restoring, &known, &variant)
            })
            .await
            .map_err(|error| error.to_string())??;
            if record.complete {
                return Ok(Parts {
                    metadata,
                    device: Some(opener.dir(record.number).data()),
                    on_blobfs: false,
                    direct_io: direct_io.load(Ordering::Relaxed),
                });
            }
            let serving = blobfs.wait_for(Option::is_some);
            let serving = tokio::time::timeout(SERVING_LIMIT, serving)
                .await
                .map_err(|_| "BlobFs does not serve yet")?
                .map_err(|_| "the daemon is stopping")?;
            match &*serving {
                Some(Ok(blobfs)) => Ok(Parts {
                    metadata,
                    device: Some(blobfs.path(record.node)),
                    on_blobfs: true,
                    direct_io: false,
                }),
                Some(Err(error)) => Err(format!("BlobFs: {error}")),
                None => Err("BlobFs does not serve yet".to_owned()),
            }
        }
        .boxed()
    }

    fn metadata(&self, key: &MountKey) -> PathBuf {
        self.opener.dir(key.layer).metadata(&key.variant)
    }

    fn give_up(&self, key: &MountKey, which: GiveUp) -> usize {
        let Some(record) = self.opener.table.layer(key.layer) else {
            return 0;
        };
        match &*self.blobfs.borrow() {
            Some(Ok(blobfs)) => match which {
                GiveUp::Ended => blobfs.abandon_ended(record.node),
                GiveUp::All => blobfs.abandon(record.node),
            },
            _ => 0,
        }
    }

    fn describe(&self, key: &MountKey) -> String {
        self.opener
            .table
            .layer(key.layer)
            .map_or_else(|| key.layer.to_string(), |record| describe(&record))
    }
}
