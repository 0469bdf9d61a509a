//! The layers of the node: identity to index, cache, metadata image and mount.
//!
//! A layer is known here once its index is. From then on nothing about it needs the network but
//! its bytes: names, attributes and mounts survive restarts, and a start of the daemon asks no
//! registry. What is kept on disk is described in [`dir`], what is kept in the store in [`table`].
//!
//! [`Layers::obtain`] resolves one layer; [`mounts`] shares its superblocks among chains;
//! [`blobs`] holds the caches that are in use; `sweep` takes back what nobody uses.

pub mod blobs;
pub mod dir;
mod hydration;
pub mod implied;
pub mod index;
pub mod kernel;
pub mod mounts;
mod obtain;
pub mod origin;
pub mod parts;
pub mod record;
mod recovery;
mod status;
mod sweep;
pub mod table;
pub mod variants;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, io,
    path::PathBuf,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::{Duration, Instant},
};

use formats::digest::Digest;
use fuse::{BlobFsOptions, mounts::Helper};
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use self::obtain::Wanted;
use self::{
    blobs::{Blobs, Opener},
    implied::Lookup,
    mounts::Mounts,
    parts::{LayerParts, Serving},
    record::{
        Identity, LayerNumber, LayerRecord, LazySnapshot, MountKey, MountNumber, Origin, Verdict,
    },
    table::LayerTable,
    variants::LazyLookup,
};
use crate::{
    config::Config,
    drivers::DriverError,
    metrics::{Counter, Metrics, defs},
    resolve::{plan::Documents, reason::NotLazy},
    store::{SnapshotId, Store, StoreError, Writer},
};

/// A layer that was just resolved is kept this long although no snapshot uses it yet.
const PIN: Duration = Duration::from_secs(120);
/// Name of the lower directory of chains that change nothing.
const EMPTY_LOWER: &str = "e";

type Obtaining = Shared<BoxFuture<'static, Result<Arc<LayerRecord>, NotLazy>>>;

/// What [`Layers`] is built from.
#[derive(Clone)]
pub struct LayersOptions {
    /// The effective configuration.
    pub config: Arc<Config>,
    /// The store.
    pub store: Store,
    /// Opens caches.
    pub opener: Opener,
    /// Reads manifests and configs.
    pub documents: Documents,
    /// Starts mount helpers.
    pub helper: Helper,
    /// How BlobFs is started.
    pub blobfs: BlobFsOptions,
    /// Where metrics are registered.
    pub metrics: Metrics,
}

impl fmt::Debug for LayersOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayersOptions")
            .field("opener", &self.opener)
            .finish_non_exhaustive()
    }
}

/// The layers of the node.
pub struct Layers {
    config: Arc<Config>,
    store: Store,
    table: Arc<LayerTable>,
    blobs: Arc<Blobs>,
    mounts: Arc<Mounts>,
    documents: Documents,
    blobfs_options: BlobFsOptions,
    helper: Helper,
    serving: watch::Sender<Serving>,
    presents: watch::Sender<Option<Result<(), String>>>,
    /// Complete layers are mounted past the page cache of their files.
    direct_io: Arc<AtomicBool>,
    kernel: OnceLock<kernel::Findings>,
    obtaining: Mutex<HashMap<Identity, Obtaining>>,
    /// What is being done for those.
    steps: Mutex<HashMap<Identity, &'static str>>,
    pins: Mutex<HashMap<LayerNumber, Instant>>,
    unreferenced: Mutex<HashMap<LayerNumber, Instant>>,
    watched: Mutex<HashSet<LayerNumber>>,
    prefetch_limit: u64,
    metrics: Metrics,
    /// An index was parsed since memory was given back last.
    parsed: Arc<AtomicBool>,
    sweeping: tokio::sync::Mutex<()>,
}

/// Why a layer may not be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("layer {layer} of {image} was refuted: {why}")]
pub struct Untrusted {
    layer: Digest,
    image: String,
    why: String,
}

impl Layers {
    /// Loads what is known. No network, no mounts: that is [`Self::recover`]'s.
    pub fn open(options: LayersOptions) -> io::Result<Self> {
        let table = Arc::clone(&options.opener.table);
        let parsed = Arc::clone(&options.opener.parsed);
        std::fs::create_dir_all(&options.opener.layers)?;
        let serving = watch::Sender::new(None);
        // Not before the kernel was probed.
        let direct_io = Arc::new(AtomicBool::new(false));
        let parts = LayerParts::new(
            options.opener.clone(),
            serving.subscribe(),
            Arc::clone(&direct_io),
        );
        let mounts = Mounts::open(
            options.config.lowers.clone(),
            Arc::clone(&table),
            options.helper.clone(),
            Arc::new(parts),
        )?;
        Ok(Self {
            prefetch_limit: options.config.lazy.prefetch_limit.0,
            config: options.config,
            store: options.store,
            table,
            blobs: Arc::new(Blobs::new(options.opener)),
            mounts: Arc::new(mounts),
            documents: options.documents,
            blobfs_options: options.blobfs,
            helper: options.helper,
            serving,
            presents: watch::Sender::new(None),
            direct_io,
            kernel: OnceLock::new(),
            obtaining: Mutex::default(),
            steps: Mutex::default(),
            pins: Mutex::default(),
            unreferenced: Mutex::default(),
            watched: Mutex::default(),
            metrics: options.metrics,
            parsed,
            sweeping: tokio::sync::Mutex::default(),
        })
    }

    /// The layer mounts.
    pub fn mounts(&self) -> &Arc<Mounts> {
        &self.mounts
    }

    /// What a snapshot is made of, if it is lazy.
    pub fn snapshot(&self, id: SnapshotId) -> Option<LazySnapshot> {
        self.table.snapshot(id)
    }

    /// A layer that is known here.
    pub fn record(&self, number: LayerNumber) -> Option<Arc<LayerRecord>> {
        self.table.layer(number)
    }

    /// A layer that is known here and about to be used: it is not deleted for a while.
    pub fn hold(&self, number: LayerNumber) -> Option<Arc<LayerRecord>> {
        self.pin(number);
        self.record(number)
    }

    /// Refuses a layer whose content is known not to be what an image claims it is. `claim` is the
    /// image's, if it is known; without one, an image that lied about the layer is enough.
    pub fn trusted(&self, record: &LayerRecord, claim: Option<Digest>) -> Result<(), Untrusted> {
        let refused = |origin: Option<&Origin>, why: String| {
            Err(Untrusted {
                layer: record.identity.layer,
                image: origin.map_or_else(|| "an unknown image".to_owned(), |o| o.image.clone()),
                why,
            })
        };
        if let Verdict::Refuted(why) = &record.verdict {
            return refused(record.origins.first(), why.clone());
        }
        let Some(actual) = record.content_diff_id else {
            return Ok(());
        };
        let liar = record
            .false_claims()
            .find(|origin| claim.is_none() || origin.diff_id == claim);
        let claim = match (claim, liar) {
            (Some(claim), _) => claim,
            (None, Some(liar)) => liar.diff_id.unwrap_or(actual),
            (None, None) => actual,
        };
        if claim == actual {
            return Ok(());
        }
        refused(
            liar,
            format!("the image claims DiffID {claim}, the content has {actual}"),
        )
    }

    /// The variant of a layer on top of `below`, with its image written.
    pub async fn variant(
        &self,
        record: &Arc<LayerRecord>,
        mut below: Vec<Box<dyn Lookup + Send>>,
    ) -> Result<String, NotLazy> {
        if record.implied.is_empty() {
            return Ok(implied::BASE_VARIANT.to_owned());
        }
        let (opener, record) = (self.opener().clone(), Arc::clone(record));
        tokio::task::spawn_blocking(move || variants::choose(&opener, &record, &mut below))
            .await
            .unwrap_or_else(|error| Err(error.to_string()))
            .map_err(|detail| NotLazy::Local(detail.into()))
    }

    /// The mounts for `keys`.
    pub async fn mounts_for(&self, keys: &[MountKey]) -> Result<Vec<MountNumber>, StoreError> {
        self.table.mounts_for(keys).await
    }

    /// Mounts in the background what is likely to be needed soon.
    pub fn mount_ahead(&self, numbers: Vec<MountNumber>) {
        let mounts = Arc::clone(&self.mounts);
        tokio::spawn(async move {
            // Whoever needs it tries again and reports.
            if let Err(error) = mounts.ensure(&numbers, Duration::from_secs(10)).await {
                tracing::debug!(?numbers, %error, "not mounted ahead");
            }
        });
    }

    /// See [`LayerTable::bind`].
    pub fn bind(
        writer: &Writer<'_>,
        id: SnapshotId,
        snapshot: &LazySnapshot,
    ) -> Result<(), StoreError> {
        LayerTable::bind(writer, id, snapshot)
    }

    /// See [`LayerTable::bound`].
    pub fn bound(&self, id: SnapshotId, snapshot: LazySnapshot) {
        self.table.bound(id, snapshot);
    }

    /// Remembers why a snapshot is not lazy.
    pub async fn set_reason(&self, id: SnapshotId, reason: &str) -> Result<(), StoreError> {
        self.table.set_reason(id, reason).await
    }

    /// Forgets snapshots that are gone.
    pub async fn forget(&self, gone: Vec<SnapshotId>) -> Result<(), StoreError> {
        self.table.forget(gone).await
    }

    /// Whether layers can be presented lazily on this node: known soon after a start.
    pub async fn presentable(&self, bound: Duration) -> Result<(), NotLazy> {
        let mut presents = self.presents.subscribe();
        let known = tokio::time::timeout(bound, presents.wait_for(Option::is_some)).await;
        let Ok(Ok(answer)) = known else {
            return Err(NotLazy::Off("the daemon has not recovered yet".to_owned()));
        };
        match &*answer {
            Some(Err(why)) => Err(NotLazy::Off(why.clone())),
            _ => Ok(()),
        }
    }

    /// What the kernel was found to be able to do, by name; `None` before it was probed.
    pub fn kernel(&self) -> Option<&BTreeMap<String, String>> {
        self.kernel.get().map(|found| &found.findings)
    }

    /// Counts a layer that was not answered lazily.
    pub fn count_declined(&self, reason: &NotLazy) {
        self.declined(reason.kind()).increment();
    }

    /// Asks a lazy layer for attributes.
    pub fn lookup(&self, snapshot: &LazySnapshot) -> Box<dyn Lookup + Send> {
        Box::new(LazyLookup::new(self.opener().clone(), snapshot))
    }

    /// The lower directory of chains that change nothing. Blocks shortly.
    pub fn empty_lower(&self) -> Result<PathBuf, DriverError> {
        let path = self.mounts.lowers().join(EMPTY_LOWER);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(DriverError::io("create", path)(error))
            }
            _ => Ok(path),
        }
    }

    fn opener(&self) -> &Opener {
        self.blobs.opener()
    }

    fn declined(&self, kind: &str) -> Counter {
        self.metrics.counter(&defs::LAZY_DECLINED_TOTAL, &[kind])
    }

    fn pin(&self, number: LayerNumber) {
        let mut pins = self.pins.lock();
        pins.retain(|_, since| since.elapsed() < PIN);
        pins.insert(number, Instant::now());
    }

    fn is_pinned(&self, number: LayerNumber) -> bool {
        let pins = self.pins.lock();
        pins.get(&number).is_some_and(|since| since.elapsed() < PIN)
    }
}

impl fmt::Debug for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layers")
            .field("known", &self.table.layers().len())
            .field("mounts", &self.mounts)
            .finish_non_exhaustive()
    }
}
