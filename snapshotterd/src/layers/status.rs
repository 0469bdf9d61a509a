//! What people ask about layers: the admin API and the metrics.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use formats::{
    blobmap::BlobMap,
    digest::Digest,
    tree::{InodeId, Kind, LayerTree},
};
use serde_json::{Value, json};
use storage::ranges::report;

use super::{
    Layers,
    blobs::describe,
    record::{LayerNumber, LayerRecord, Origin},
};
use crate::{
    metrics::{Scrape, defs},
    store::{SnapshotId, SnapshotKey, StoreError},
};

impl Layers {
    /// Every layer, and every ordinary snapshot that might have been a lazy one.
    pub fn list(&self) -> Result<Value, StoreError> {
        let names = self.names()?;
        let mut snapshots: HashMap<LayerNumber, Vec<&SnapshotKey>> = HashMap::new();
        for (id, lazy) in self.table.snapshots() {
            snapshots
                .entry(lazy.layer)
                .or_default()
                .extend(names.get(&id));
        }
        let layers: Vec<Value> = self
            .table
            .layers()
            .iter()
            .map(|record| {
                let used = snapshots.remove(&record.number).unwrap_or_default();
                self.describe_layer(record, &used)
            })
            .collect();
        let ordinary: Vec<Value> = self
            .table
            .reasons()
            .into_iter()
            .filter_map(|(id, why)| {
                let key = names.get(&id)?;
                Some(json!({
                    "snapshot": &*key.key,
                    "snapshotter": &*key.snapshotter,
                    "lazy": false,
                    "why_not": why,
                }))
            })
            .collect();
        let presents = match &*self.presents.borrow() {
            None => json!({ "lazy": Value::Null }),
            Some(Ok(())) => json!({ "lazy": true }),
            Some(Err(why)) => json!({ "lazy": false, "why_not": why }),
        };
        Ok(json!({ "node": presents, "layers": layers, "not_lazy": ordinary }))
    }

    /// The layers that image `reference` names.
    pub fn image(&self, reference: &str) -> Result<Option<Value>, StoreError> {
        let of_image = |record: &Arc<LayerRecord>| {
            record
                .origins
                .iter()
                .any(|origin| origin.image == reference)
        };
        let records: Vec<_> = self.matching(None).into_iter().filter(of_image).collect();
        let names = self.names()?;
        let reader = self.store.read()?;
        let mut not_lazy = Vec::new();
        for (id, why) in self.table.reasons() {
            let Some(key) = names.get(&id) else { continue };
            let labels = reader.info(key)?.labels;
            let named = crate::resolve::labels::IMAGE_REF
                .iter()
                .any(|label| labels.get(*label).is_some_and(|image| image == reference));
            if named {
                not_lazy.push(json!({ "snapshot": &*key.key, "why_not": why }));
            }
        }
        if records.is_empty() && not_lazy.is_empty() {
            return Ok(None);
        }
        let layers: Vec<Value> = records
            .iter()
            .map(|record| {
                let mut layer = self.describe_layer(record, &[]);
                if let Some(liar) = record.false_claims().find(|o| o.image == reference) {
                    layer["verdict"] = json!("refuted");
                    layer["verdict_why"] = json!(false_claim(record, liar));
                }
                layer
            })
            .collect();
        let count = |field: &str| {
            layers
                .iter()
                .filter_map(|layer| layer[field].as_u64())
                .sum::<u64>()
        };
        let (local, payload) = (count("local_bytes"), count("payload_bytes"));
        Ok(Some(json!({
            "image": reference,
            "blob_bytes": count("blob_bytes"),
            "payload_bytes": payload,
            "local_bytes": local,
            "complete": layers.iter().all(|layer| layer["complete"] == json!(true)),
            "layers": layers,
            "not_lazy": not_lazy,
        })))
    }

    /// The paths that readers of a layer touched, in order of their first touch.
    pub async fn touched(&self, digest: Digest) -> Result<Option<Value>, String> {
        let Some(record) = self.matching(Some(digest)).into_iter().next() else {
            return Ok(None);
        };
        let Some(blob) = self.blobs.open(record.number) else {
            return Ok(Some(json!({
                "layer": digest,
                "files": [],
                "note": "nothing of the layer was read since its cache was opened last",
            })));
        };
        let touched = blob.touched();
        let (opener, known) = (self.opener().clone(), Arc::clone(&record));
        let layer = tokio::task::spawn_blocking(move || opener.load(&known))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| report(&error))?;
        let paths = paths_by_chunk(&layer.tree, &layer.map);
        let mut seen = HashSet::new();
        let mut files = Vec::new();
        for chunk in touched {
            let Some(path) = paths.get(&chunk.0) else {
                continue;
            };
            if seen.insert(path) {
                files.push(json!({
                    "path": String::from_utf8_lossy(path),
                    "chunk": chunk.0,
                }));
            }
        }
        Ok(Some(json!({ "layer": digest, "files": files })))
    }

    /// Readers that wait now, and for what.
    pub fn why(&self) -> Value {
        let mut waiting = Vec::new();
        for (number, blob) in self.blobs.all() {
            let status = blob.status();
            let Some(record) = self.table.layer(number) else {
                continue;
            };
            for chunk in status.waiting {
                waiting.push(json!({
                    "node": record.node,
                    "layer": record.identity.layer,
                    "image": record.origins.first().map(|origin| &origin.image),
                    "source": status.layer,
                    "chunk": chunk.chunk,
                    "decoded_offset": chunk.decoded_offset,
                    "remote_start": chunk.remote_start,
                    "remote_end": chunk.remote_end,
                    "readers": chunk.readers,
                    "waiting_ms": chunk.waiting_ms,
                    "last_error": status.last_error,
                }));
            }
        }
        json!({ "waiting": waiting })
    }

    /// Hydrates `digest`'s layers (or all of `image`, or all) and waits until they are over.
    pub async fn hydrate_and_wait(
        self: &Arc<Self>,
        digest: Option<Digest>,
        image: Option<&str>,
    ) -> Result<Value, String> {
        let mut waits = Vec::new();
        let mut layers = self.matching(digest);
        layers.retain(|record| {
            image.is_none_or(|image| record.origins.iter().any(|origin| origin.image == image))
        });
        for record in &layers {
            if record.complete {
                continue;
            }
            let blob = self
                .blobs
                .get(record.number)
                .await
                .map_err(|error| error.to_string())?;
            self.hydrate_now(record, &blob);
            // Keeps the cache open until it is over.
            let over = blob.hydrated();
            waits.push(async move {
                let _ = over.await;
                drop(blob);
            });
        }
        futures_util::future::join_all(waits).await;
        let mut verdicts = Vec::new();
        for record in layers {
            // The verdict reaches the table a moment after the pass is over.
            for _ in 0..500 {
                if !self.watched.lock().contains(&record.number) {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            if let Some(record) = self.table.layer(record.number) {
                verdicts.push(json!({
                    "layer": record.identity.layer,
                    "complete": record.complete,
                    "verdict": record.verdict.name(),
                    "why": record.verdict.reason(),
                    "false_claims": false_claims(&record),
                }));
            }
        }
        Ok(json!({ "layers": verdicts }))
    }

    /// Adds what the caches know to a scrape.
    pub fn scrape(&self, scrape: &mut Scrape) {
        let mut by_verdict: BTreeMap<&str, u64> = BTreeMap::new();
        for record in self.table.layers() {
            *by_verdict.entry(record.verdict.name()).or_default() += 1;
        }
        for (verdict, count) in by_verdict {
            scrape.sample(&defs::LAZY_LAYERS, &[verdict], number(count));
        }
        scrape.sample(
            &defs::LAZY_MOUNTS,
            &[],
            number(self.mounts.mounted() as u64),
        );
        let (mut local, mut waiting, mut open) = (0, 0, 0);
        for (_, blob) in self.blobs.all() {
            let status = blob.status();
            open += 1;
            local += status.local_bytes;
            waiting += status.waiting_readers as u64;
        }
        for (cause, bytes, requests) in self.blobs.totals().by_cause() {
            scrape.sample(&defs::LAZY_FETCHED_BYTES_TOTAL, &[cause], number(bytes));
            scrape.sample(&defs::LAZY_REQUESTS_TOTAL, &[cause], number(requests));
        }
        scrape.sample(&defs::LAZY_OPEN_CACHES, &[], number(open));
        scrape.sample(&defs::LAZY_LOCAL_BYTES, &[], number(local));
        scrape.sample(&defs::LAZY_WAITING_READERS, &[], number(waiting));
        let disk = self.opener().scheduler.disk_report();
        for (def, value) in [
            (&defs::LAZY_DISK_FULL, u64::from(disk.full)),
            (&defs::LAZY_REFUSED_WRITES_TOTAL, disk.refused_writes),
            (&defs::LAZY_UNSTORED_BYTES_TOTAL, disk.unstored_bytes),
            (&defs::LAZY_UNSTORED_HELD_BYTES, disk.memory_bytes),
        ] {
            scrape.sample(def, &[], number(value));
        }
    }

    fn names(&self) -> Result<HashMap<SnapshotId, SnapshotKey>, StoreError> {
        let reader = self.store.read()?;
        let mut names = HashMap::new();
        for id in self.table.known_snapshots() {
            if let Some(key) = reader.key_of(id)? {
                names.insert(id, key);
            }
        }
        Ok(names)
    }

    fn describe_layer(&self, record: &LayerRecord, snapshots: &[&SnapshotKey]) -> Value {
        let mounts: Vec<Value> = self
            .table
            .mounts()
            .into_iter()
            .filter(|(_, key)| key.layer == record.number)
            .map(|(number, key)| {
                json!({
                    "number": number,
                    "path": self.mounts.target(number),
                    "variant": key.variant,
                    "mounted": self.mounts.is_mounted(number),
                })
            })
            .collect();
        let images: Vec<&str> = record
            .origins
            .iter()
            .map(|origin| origin.image.as_str())
            .collect();
        let keys: Vec<&str> = snapshots.iter().map(|key| &*key.key).collect();
        let mut value = json!({
            "number": record.number,
            "digest": record.identity.layer,
            "toc_digest": record.identity.index,
            "diff_id": record.content_diff_id.or(record.diff_id),
            "false_claims": false_claims(record),
            "format": record.identity.format,
            "lazy": true,
            "name": describe(record),
            "images": images,
            "snapshots": keys,
            "node": record.node,
            "blob_bytes": record.blob_len,
            "device_bytes": record.device_len,
            "empty": record.empty,
            "resolve_ms": record.resolve_ms,
            "complete": record.complete,
            "verdict": record.verdict.name(),
            "verdict_why": record.verdict.reason(),
            "mounts": mounts,
        });
        let status = self.blobs.open(record.number).map(|blob| blob.status());
        match status {
            Some(status) => {
                value["payload_bytes"] = json!(status.payload_bytes);
                value["local_bytes"] = json!(status.local_bytes);
                value["percent_local"] = json!(status.percent_local);
                value["cache"] = json!(status);
            }
            None if record.complete => {
                value["percent_local"] = json!(100.0);
            }
            // Known when somebody uses it.
            None => value["percent_local"] = Value::Null,
        }
        value
    }
}

/// Images that claim a DiffID which the layer does not have.
fn false_claims(record: &LayerRecord) -> Vec<Value> {
    let liars = record.false_claims();
    liars
        .map(|liar| json!({ "image": liar.image, "why": false_claim(record, liar) }))
        .collect()
}

fn false_claim(record: &LayerRecord, liar: &Origin) -> String {
    match (liar.diff_id, record.content_diff_id) {
        (Some(claim), Some(actual)) => {
            format!("the image claims DiffID {claim}, the content has {actual}")
        }
        _ => String::new(),
    }
}

/// Which file each chunk belongs to. Hard links go by their first name.
fn paths_by_chunk(tree: &LayerTree, map: &BlobMap) -> HashMap<u32, Vec<u8>> {
    let mut paths = HashMap::new();
    let mut queue = vec![(Vec::new(), InodeId::ROOT)];
    while let Some((path, id)) = queue.pop() {
        match &tree.inode(id).kind {
            Kind::Directory(directory) => {
                for (name, child) in &directory.entries {
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(name);
                    queue.push((below, *child));
                }
            }
            Kind::Regular(file) => {
                for extent in &file.extents {
                    let range = extent.decoded.0..extent.decoded.0 + extent.len;
                    for chunk in map.overlapping(range) {
                        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
                        paths.entry(chunk).or_insert_with(|| path.clone());
                    }
                }
            }
            _ => {}
        }
    }
    paths
}

#[expect(
    clippy::cast_precision_loss,
    reason = "metrics are doubles; counts and bytes stay below 2^53"
)]
fn number(value: u64) -> f64 {
    value as f64
}
