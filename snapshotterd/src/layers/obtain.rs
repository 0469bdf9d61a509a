//! From an identity to a layer that is known here: fetch and check the index, write the metadata
//! image, open the cache, begin with the start list.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use formats::{
    digest::Digest,
    stargz::{StargzLayer, StartList, TocError, parse_toc},
    tree::LayerTree,
};
use futures_util::FutureExt as _;
use storage::{
    cache::{CacheOptions, IndexError, LayerBlob, RawToc, Wire},
    ranges::report,
};
use tracing::{debug, info, warn};

use super::{
    Layers, Obtaining,
    dir::LayerDir,
    implied::implied_directories,
    index,
    record::{Identity, ImpliedDirectory, LayerNumber, LayerRecord, Origin, Verdict},
    variants,
};
use crate::{
    resolve::{reason::NotLazy, remote::RemoteError},
    store::Durability,
};

/// A layer that an image wants.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// What it is.
    pub identity: Identity,
    /// Bytes of its blob, as the manifest states it.
    pub blob_len: u64,
    /// The image.
    pub origin: Origin,
    /// The DiffID that the image claims for it, if known.
    pub diff_id: Option<Digest>,
}

impl Layers {
    /// The layer that `wanted` names: at once if it is known here, else as soon as its index is
    /// here. Concurrent callers share the work.
    pub async fn obtain(self: &Arc<Self>, wanted: Wanted) -> Result<Arc<LayerRecord>, NotLazy> {
        let record = match self.known_or_coming(&wanted) {
            Ok(known) => known,
            Err(coming) => coming.await?,
        };
        self.remember(record, &wanted).await
    }

    /// The layer if its index is here, else the work that brings it.
    fn known_or_coming(self: &Arc<Self>, wanted: &Wanted) -> Result<Arc<LayerRecord>, Obtaining> {
        let mut obtaining = self.obtaining.lock();
        if let Some(coming) = obtaining.get(&wanted.identity) {
            return Err(coming.clone());
        }
        if let Some(known) = self.known(&wanted.identity) {
            return Ok(known);
        }
        let coming = self.begin(wanted.clone());
        obtaining.insert(wanted.identity, coming.clone());
        Err(coming)
    }

    /// A layer whose index is here.
    fn known(&self, identity: &Identity) -> Option<Arc<LayerRecord>> {
        let record = self
            .table
            .by_identity(identity)
            .filter(|known| known.ready)?;
        // Somebody may have emptied the root below us: better fetched again than refused later.
        let there = self.opener().dir(record.number).toc().exists();
        self.pin(record.number);
        there.then_some(record)
    }

    /// Adds the image to those that name the layer, and its claim if there is none yet.
    async fn remember(
        &self,
        record: Arc<LayerRecord>,
        wanted: &Wanted,
    ) -> Result<Arc<LayerRecord>, NotLazy> {
        let mut changed = LayerRecord::clone(&record);
        let news = changed.remember(wanted.origin.clone());
        if !news && (wanted.diff_id.is_none() || record.diff_id.is_some()) {
            return Ok(record);
        }
        let (origin, diff_id) = (wanted.origin.clone(), wanted.diff_id);
        let updated = self
            .table
            .update(record.number, Durability::Soon, move |record| {
                record.diff_id = record.diff_id.or(diff_id);
                record.remember(origin.clone());
                true
            })
            .await
            .map_err(|error| NotLazy::local(&error))?;
        updated.ok_or_else(|| NotLazy::Local("the layer was removed meanwhile".into()))
    }

    fn begin(self: &Arc<Self>, wanted: Wanted) -> Obtaining {
        let this = Arc::clone(self);
        let identity = wanted.identity;
        let task = tokio::spawn(async move {
            let result = this.obtain_new(&wanted).await;
            this.obtaining.lock().remove(&identity);
            this.steps.lock().remove(&identity);
            result
        });
        async move {
            task.await
                .unwrap_or_else(|error| Err(NotLazy::Local(error.to_string().into())))
        }
        .boxed()
        .shared()
    }

    async fn obtain_new(self: &Arc<Self>, wanted: &Wanted) -> Result<Arc<LayerRecord>, NotLazy> {
        if let Some(stale) = self.table.by_identity(&wanted.identity) {
            self.discard(stale.number).await;
        }
        let record = self
            .table
            .insert(new_record(wanted))
            .await
            .map_err(|error| NotLazy::local(&error))?;
        self.pin(record.number);
        match self.fill(&record).await {
            Ok(record) => Ok(record),
            Err(reason) => {
                self.discard(record.number).await;
                Err(reason)
            }
        }
    }

    async fn fill(
        self: &Arc<Self>,
        record: &Arc<LayerRecord>,
    ) -> Result<Arc<LayerRecord>, NotLazy> {
        let begun = std::time::Instant::now();
        let opener = self.opener().clone();
        let dir = opener.dir(record.number);
        let (making, identity) = (dir.clone(), record.identity);
        blocking(move || {
            let made = making.create(&identity);
            made.map_err(|error| NotLazy::local(&error))
        })
        .await?;
        let wire = opener
            .wire(record)
            .await
            .map_err(|error| NotLazy::local(&error))?;
        self.step(record, "fetching its index");
        let toc = wire
            .fetch_index(&self.opener().limits)
            .await
            .map_err(|error| from_index(record, &error))?;
        let limits = self.opener().limits;
        self.parsed.store(true, Ordering::Relaxed);
        self.step(record, "reading its index");
        let known = Arc::clone(record);
        let made = blocking(move || make(&dir, &known, &toc, wire, &limits)).await?;
        let number = record.number;
        self.blobs.adopt(number, Arc::clone(&made.blob));
        let implied = made.implied;
        let (device_len, empty) = (made.device_len, made.empty);
        let ready = self
            .table
            .update(number, Durability::Soon, move |record| {
                record.device_len = device_len;
                record.empty = empty;
                record.implied.clone_from(&implied);
                record.ready = true;
                record.resolve_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                true
            })
            .await
            .map_err(|error| NotLazy::local(&error))?
            .ok_or_else(|| NotLazy::Local("the layer was removed meanwhile".into()))?;
        if let StartList::Until(end) = made.start_list
            && end.0 <= self.prefetch_limit
        {
            made.blob.prefetch(end);
        }
        info!(
            layer = %ready.identity.layer,
            number = %ready.number,
            start_list = ?made.start_list,
            took = ?begun.elapsed(),
            "layer resolved"
        );
        self.hydrate_later(&ready, &made.blob);
        Ok(ready)
    }

    fn step(&self, record: &LayerRecord, step: &'static str) {
        self.steps.lock().insert(record.identity, step);
    }

    /// What is being done for a layer that is coming.
    pub fn step_of(&self, identity: &Identity) -> Option<&'static str> {
        self.steps.lock().get(identity).copied()
    }

    /// Undoes the reservation of a layer that did not become one.
    async fn discard(&self, number: LayerNumber) {
        if !self.blobs.close(number).await {
            warn!(layer = %number, "the cache of a layer that failed is still in use");
        }
        if let Err(error) = self.table.remove(number).await {
            warn!(layer = %number, %error, "cannot forget a layer that failed");
            return;
        }
        let dir = self.opener().dir(number);
        let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
        if let Ok(Err(error)) = removed {
            debug!(layer = %number, %error, "leftovers stay until the next start");
        }
    }
}

fn new_record(wanted: &Wanted) -> LayerRecord {
    LayerRecord {
        number: LayerNumber(0),
        node: 0,
        identity: wanted.identity,
        blob_len: wanted.blob_len,
        device_len: 0,
        empty: false,
        implied: Vec::new(),
        diff_id: wanted.diff_id,
        content_diff_id: None,
        verdict: Verdict::Claimed,
        ready: false,
        complete: false,
        origins: vec![wanted.origin.clone()],
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        resolve_ms: 0,
    }
}

/// What an index makes of a layer.
struct Made {
    blob: Arc<LayerBlob>,
    device_len: u64,
    empty: bool,
    implied: Vec<ImpliedDirectory>,
    start_list: StartList,
}

/// Checks, parses and keeps the index, writes the metadata image, opens the cache. Blocks.
fn make(
    dir: &LayerDir,
    record: &LayerRecord,
    toc: &RawToc,
    wire: Arc<Wire>,
    limits: &formats::limits::Limits,
) -> Result<Made, NotLazy> {
    let (image, layer) = (image_of(record), record.identity.layer);
    let actual = Digest::of(&toc.json);
    if actual != record.identity.index {
        return Err(NotLazy::TocDigest {
            image,
            layer,
            expected: record.identity.index,
            actual,
        });
    }
    let unusable = |detail: String| NotLazy::Index {
        image: image.clone(),
        layer,
        detail,
    };
    let parsed = parse_toc(&toc.json, toc.toc_offset, limits)
        .map_err(|error: TocError| unusable(report(&error)))?;
    index::save(dir, &toc.json, toc.toc_offset).map_err(|error| NotLazy::local(&error))?;
    let StargzLayer {
        tree,
        map,
        start_list,
        ..
    } = parsed;
    let device_len = map.decoded_len();
    let implied = implied_directories(&tree);
    let empty = changes_nothing(&tree);
    if !empty && implied.is_empty() {
        variants::write_base(dir, &tree, device_len)
            .map_err(|error| unusable(report(error.as_ref())))?;
    }
    drop(tree);
    let blob = LayerBlob::open(wire, Arc::new(map), CacheOptions::default())
        .map_err(|error| unusable(report(&error)))?;
    // An image names its device even if it has no bytes.
    blob.create_data().map_err(|error| NotLazy::local(&error))?;
    Ok(Made {
        blob,
        device_len,
        empty,
        implied,
        start_list,
    })
}

/// Whether a tree has no entries and hides nothing.
fn changes_nothing(tree: &LayerTree) -> bool {
    tree.directory(formats::tree::InodeId::ROOT)
        .is_some_and(|root| root.entries.is_empty() && !root.opaque)
}

fn from_index(record: &LayerRecord, error: &IndexError) -> NotLazy {
    let (image, layer) = (image_of(record), record.identity.layer);
    let detail = match error {
        IndexError::Fetch { source, .. } => {
            let RemoteError { detail, transient } = RemoteError::of_fetch(source);
            return NotLazy::Registry {
                image,
                layer,
                detail,
                transient,
            };
        }
        // The layer is named already.
        IndexError::Footer { source, .. } => format!("no eStargz footer: {}", report(source)),
        IndexError::NotLazy { source, .. } => report(source),
        IndexError::Toc { source, .. } => format!("the TOC cannot be read: {}", report(source)),
        other => report(other),
    };
    NotLazy::Index {
        image,
        layer,
        detail,
    }
}

/// The image that named the layer last.
fn image_of(record: &LayerRecord) -> String {
    let origin = record.origins.first();
    origin.map_or_else(|| "(no image)".to_owned(), |origin| origin.image.clone())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NotLazy> + Send + 'static,
) -> Result<T, NotLazy> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(NotLazy::Local(error.to_string().into())))
}
