//! Pulls an image into snapshotterd the way containerd's unpacker does: one extraction Prepare for
//! each layer, which the daemon answers with a lazily served layer or with mounts to unpack into.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use formats::{
    digest::Digest,
    oci::{Compression, Descriptor, chain_ids},
};
use snapshotterd::resolve::labels::REMOTE;

use crate::{
    image::{Image, Location, Store},
    runner::Reexec,
    snapshots::{LABEL_REF, Prepared, Snapshots},
    unpack,
};

/// Labels may have 4096 bytes with their key; digests beyond that are left out, as containerd does.
const MAX_LABEL_BYTES: usize = 4096;
/// containerd's default.
const CONCURRENT_DOWNLOADS: usize = 3;
const LABEL_PREFIX: &str = "containerd.io/snapshot/";

/// How a layer came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The daemon serves it lazily.
    Lazy,
    /// Downloaded and unpacked.
    Unpacked,
    /// An ordinary snapshot that was there before.
    Present,
}

/// What happened with one layer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PulledLayer {
    /// Its digest.
    pub digest: Digest,
    /// Its compressed size.
    pub bytes: u64,
    /// How it came to be there.
    pub outcome: Outcome,
    /// How long that took, in milliseconds.
    pub millis: u64,
}

/// A pulled image: its documents and the snapshot that containers are made on.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// Backend name of the top snapshot; empty for an image without layers.
    pub top: String,
    /// Layer by layer, bottom first.
    pub layers: Vec<PulledLayer>,
}

/// What pulling needs besides the image.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// Where downloads of layers that are not lazy go while they are unpacked.
    pub scratch: PathBuf,
    /// How the unpacking stage is started.
    pub reexec: Reexec,
    /// Do not let the daemon serve lazily: unpack everything (for comparison).
    pub eager: bool,
}

/// Called with bytes as they are downloaded.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// Pulls `image` from `store`.
pub async fn pull(
    store: &Arc<Store>,
    location: &Location,
    image: Image,
    snapshots: &Snapshots,
    options: &PullOptions,
    progress: &Progress,
) -> Result<Pulled> {
    let mut downloads = Downloads::new(store, &image, options, progress)?;
    let chains = chain_ids(&image.config.rootfs.diff_ids);
    let mut layers = Vec::new();
    let mut parent = String::new();
    for (index, (descriptor, chain)) in image.manifest.layers.iter().zip(&chains).enumerate() {
        let started = Instant::now();
        let chain = chain.to_string();
        let mut labels = labels(location, &image, index, &chain);
        if options.eager {
            labels.retain(|name, _| name == LABEL_REF);
        }
        let present = snapshots.find(&chain, &parent).await?;
        let (name, outcome) = if let Some(info) = present {
            // The daemon commits the layers it knows together: later ones are there already.
            let outcome = if info.labels.contains_key(REMOTE) {
                Outcome::Lazy
            } else {
                Outcome::Present
            };
            (info.name, outcome)
        } else {
            let key = format!(
                "snapctl/{}/extract-{} {chain}",
                std::process::id(),
                unique()
            );
            match snapshots.prepare_extraction(&key, &parent, &labels).await? {
                Prepared::Exists(name) => (name, Outcome::Lazy),
                Prepared::Writable(mounts) => {
                    let unpacked = async {
                        let expected = image.config.rootfs.diff_ids[index];
                        let file = downloads.take(index).await?;
                        let compression = descriptor.layer_type()?.compression;
                        unpack_layer(&file, compression, expected, mounts, options).await?;
                        let name = format!("snapctl/{}/{chain}", unique());
                        let kept = BTreeMap::from([(LABEL_REF.to_owned(), chain.clone())]);
                        snapshots.commit(&name, &key, &kept).await?;
                        Ok::<_, anyhow::Error>(name)
                    };
                    match unpacked.await {
                        Ok(name) => (name, Outcome::Unpacked),
                        Err(error) => {
                            let _ = snapshots.remove(&key).await;
                            return Err(error.context(format!(
                                "layer {} ({})",
                                index + 1,
                                descriptor.digest
                            )));
                        }
                    }
                }
            }
        };
        layers.push(PulledLayer {
            digest: descriptor.digest,
            bytes: descriptor.size,
            outcome,
            millis: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        parent = name;
    }
    Ok(Pulled {
        image,
        top: parent,
        layers,
    })
}

/// The labels containerd's annotation wrapper sends.
fn labels(
    location: &Location,
    image: &Image,
    index: usize,
    chain: &str,
) -> BTreeMap<String, String> {
    let layer = &image.manifest.layers[index];
    let mut labels = BTreeMap::from([
        (LABEL_REF.to_owned(), chain.to_owned()),
        (format!("{LABEL_PREFIX}cri.image-ref"), location.to_string()),
        (
            format!("{LABEL_PREFIX}cri.manifest-digest"),
            image.digest.to_string(),
        ),
        (
            format!("{LABEL_PREFIX}cri.layer-digest"),
            layer.digest.to_string(),
        ),
    ]);
    let key = format!("{LABEL_PREFIX}cri.image-layers");
    let mut list = String::new();
    for layer in &image.manifest.layers[index..] {
        let digest = layer.digest.to_string();
        if key.len() + list.len() + digest.len() + 1 > MAX_LABEL_BYTES {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(&digest);
    }
    labels.insert(key, list);
    for (name, value) in layer
        .annotations
        .iter()
        .filter(|(name, _)| name.starts_with(LABEL_PREFIX))
    {
        labels.entry(name.clone()).or_insert_with(|| value.clone());
    }
    labels
}

async fn unpack_layer(
    file: &Path,
    compression: Compression,
    expected: Digest,
    mounts: Vec<crate::runner::Mount>,
    options: &PullOptions,
) -> Result<()> {
    if compression == Compression::Zstd {
        bail!(
            "snapctl does not unpack zstd layers yet; convert the image, or pull it with containerd"
        );
    }
    let work = tempfile::tempdir_in(&options.scratch).context("a scratch directory")?;
    let found = unpack::in_child(&options.reexec, work.path(), mounts, compression, file).await?;
    if found != expected {
        bail!(
            "the layer's tar has digest {found}, the image says {expected}: the image is corrupt or forged"
        );
    }
    Ok(())
}

/// Downloads of the layers that are not lazy: from the first one on, all that follow are fetched
/// at the same time, as containerd does.
struct Downloads {
    store: Arc<Store>,
    layers: Vec<Descriptor>,
    scratch: tempfile::TempDir,
    progress: Progress,
    gate: Arc<tokio::sync::Semaphore>,
    started: BTreeMap<usize, tokio::task::JoinHandle<Result<PathBuf>>>,
}

impl Downloads {
    fn new(
        store: &Arc<Store>,
        image: &Image,
        options: &PullOptions,
        progress: &Progress,
    ) -> Result<Self> {
        Ok(Self {
            store: store.clone(),
            layers: image.manifest.layers.clone(),
            scratch: tempfile::tempdir_in(&options.scratch).context("a scratch directory")?,
            progress: progress.clone(),
            gate: Arc::new(tokio::sync::Semaphore::new(CONCURRENT_DOWNLOADS)),
            started: BTreeMap::new(),
        })
    }

    async fn take(&mut self, index: usize) -> Result<PathBuf> {
        if !self.started.contains_key(&index) {
            for (later, descriptor) in self.layers.iter().enumerate().skip(index) {
                let (store, descriptor) = (self.store.clone(), descriptor.clone());
                let (gate, progress) = (self.gate.clone(), self.progress.clone());
                let dir = self.scratch.path().join(later.to_string());
                self.started.entry(later).or_insert_with(|| {
                    tokio::spawn(async move {
                        let _permit = gate.acquire().await?;
                        std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
                        Ok(store.file(&descriptor, &dir, &*progress).await?)
                    })
                });
            }
        }
        match self.started.remove(&index) {
            Some(task) => task.await?,
            None => bail!("layer {index} was taken already"),
        }
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        for task in self.started.values() {
            task.abort();
        }
    }
}

fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    format!(
        "{}-{}",
        since.as_nanos(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A path for a private scratch directory beside the daemon's data, so that space is where layers
/// are kept anyway.
pub fn default_scratch() -> PathBuf {
    Path::new("/var/tmp").to_owned()
}
