//! The tables of layers, their mounts, and the snapshots made of them. All of it is also in
//! memory, so that a lookup never touches the disk.
//!
//! Numbers are taken inside the transaction that uses them. Writes of [`Durability::Soon`] may be
//! lost by a power cut, numbers included; nothing outside the root refers to a number before the
//! durable commit of the snapshot that needs it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::RwLock;
use redb::{ReadableTable as _, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};

use super::record::{Identity, LayerNumber, LayerRecord, LazySnapshot, MountKey, MountNumber};
use crate::store::{Durability, SnapshotId, Store, StoreError, Writer};

const LAYERS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lazy-layers");
const IDENTITIES: TableDefinition<'_, &str, u64> = TableDefinition::new("lazy-identities");
const MOUNTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lazy-mounts");
const MOUNT_KEYS: TableDefinition<'_, &str, u64> = TableDefinition::new("lazy-mount-keys");
const SNAPSHOTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("lazy-snapshots");
const REASONS: TableDefinition<'_, u64, &str> = TableDefinition::new("lazy-reasons");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("lazy-counters");

const LAYER_COUNTER: &str = "layer";
const NODE_COUNTER: &str = "node";
const MOUNT_COUNTER: &str = "mount";

#[derive(Debug, Default)]
struct Memory {
    layers: BTreeMap<LayerNumber, Arc<LayerRecord>>,
    /// The turn of the write that each of them is from.
    turns: HashMap<LayerNumber, u64>,
    identities: HashMap<Identity, LayerNumber>,
    nodes: HashMap<u64, LayerNumber>,
    mounts: BTreeMap<MountNumber, MountKey>,
    snapshots: HashMap<SnapshotId, LazySnapshot>,
    reasons: HashMap<SnapshotId, String>,
}

impl Memory {
    /// Takes what a write has left, unless a later one is here already: who wrote first need not
    /// be the first to hear of it.
    fn put_layer(&mut self, record: Arc<LayerRecord>, turn: u64) {
        let latest = self.turns.entry(record.number).or_default();
        if turn < *latest {
            return;
        }
        *latest = turn;
        self.identities.insert(record.identity, record.number);
        self.nodes.insert(record.node, record.number);
        self.layers.insert(record.number, record);
    }
}

/// The tables.
#[derive(Debug)]
pub struct LayerTable {
    store: Store,
    memory: RwLock<Memory>,
    /// Counts writes of layers, inside of them: in the order in which the disk has them.
    turns: Arc<AtomicU64>,
}

impl LayerTable {
    /// Creates the tables where they are missing and loads them. Blocks.
    pub fn open(store: &Store) -> Result<Self, StoreError> {
        store.write_blocking(Durability::Soon, |writer| {
            let transaction = writer.transaction();
            transaction.open_table(LAYERS)?;
            transaction.open_table(IDENTITIES)?;
            transaction.open_table(MOUNTS)?;
            transaction.open_table(MOUNT_KEYS)?;
            transaction.open_table(SNAPSHOTS)?;
            transaction.open_table(REASONS)?;
            transaction.open_table(COUNTERS)?;
            Ok(())
        })?;
        let mut memory = Memory::default();
        let reader = store.read()?;
        let read = reader.transaction();
        for row in read.open_table(LAYERS)?.iter()? {
            let (key, value) = row?;
            let record = decode("layer", key.value(), value.value())?;
            memory.put_layer(Arc::new(record), 0);
        }
        for row in read.open_table(MOUNTS)?.iter()? {
            let (key, value) = row?;
            let mount = decode("mount", key.value(), value.value())?;
            memory.mounts.insert(MountNumber(key.value()), mount);
        }
        for row in read.open_table(SNAPSHOTS)?.iter()? {
            let (key, value) = row?;
            let snapshot = decode("lazy snapshot", key.value(), value.value())?;
            memory.snapshots.insert(SnapshotId(key.value()), snapshot);
        }
        for row in read.open_table(REASONS)?.iter()? {
            let (key, value) = row?;
            memory
                .reasons
                .insert(SnapshotId(key.value()), value.value().to_owned());
        }
        Ok(Self {
            store: store.clone(),
            memory: RwLock::new(memory),
            turns: Arc::default(),
        })
    }

    /// The layer of an identity, if this node knows it.
    pub fn by_identity(&self, identity: &Identity) -> Option<Arc<LayerRecord>> {
        let memory = self.memory.read();
        let number = memory.identities.get(identity)?;
        memory.layers.get(number).cloned()
    }

    /// The layer with that number.
    pub fn layer(&self, number: LayerNumber) -> Option<Arc<LayerRecord>> {
        self.memory.read().layers.get(&number).cloned()
    }

    /// The layer behind a BlobFs file.
    pub fn by_node(&self, node: u64) -> Option<Arc<LayerRecord>> {
        let memory = self.memory.read();
        let number = memory.nodes.get(&node)?;
        memory.layers.get(number).cloned()
    }

    /// All layers, by number.
    pub fn layers(&self) -> Vec<Arc<LayerRecord>> {
        self.memory.read().layers.values().cloned().collect()
    }

    /// Stores a layer under new numbers (those in `record` are ignored), or returns the one that
    /// has its identity already.
    pub async fn insert(&self, record: LayerRecord) -> Result<Arc<LayerRecord>, StoreError> {
        let turns = Arc::clone(&self.turns);
        let (stored, turn) = self
            .store
            .write(Durability::Soon, move |writer| {
                let turn = next_turn(&turns);
                let mut record = record.clone();
                let transaction = writer.transaction();
                let mut identities = transaction.open_table(IDENTITIES)?;
                let identity = record.identity.to_string();
                let mut layers = transaction.open_table(LAYERS)?;
                if let Some(number) = identities.get(identity.as_str())?
                    && let Some(known) = layers.get(number.value())?
                {
                    let known = decode("layer", number.value(), known.value())?;
                    return Ok((known, turn));
                }
                record.number = LayerNumber(next(writer, LAYER_COUNTER)?);
                record.node = next(writer, NODE_COUNTER)?;
                layers.insert(record.number.0, encode(&record)?.as_slice())?;
                identities.insert(identity.as_str(), record.number.0)?;
                Ok((record, turn))
            })
            .await?;
        let stored = Arc::new(stored);
        self.memory.write().put_layer(Arc::clone(&stored), turn);
        Ok(stored)
    }

    /// Changes a layer's record where `change` says so by returning true. `change` may run more
    /// than once.
    pub async fn update(
        &self,
        number: LayerNumber,
        durability: Durability,
        mut change: impl FnMut(&mut LayerRecord) -> bool + Send + 'static,
    ) -> Result<Option<Arc<LayerRecord>>, StoreError> {
        let turns = Arc::clone(&self.turns);
        let changed = self
            .store
            .write(durability, move |writer| {
                let turn = next_turn(&turns);
                let mut layers = writer.transaction().open_table(LAYERS)?;
                let mut record: LayerRecord = match layers.get(number.0)? {
                    Some(known) => decode("layer", number, known.value())?,
                    None => return Ok(None),
                };
                if change(&mut record) {
                    layers.insert(number.0, encode(&record)?.as_slice())?;
                }
                Ok(Some((record, turn)))
            })
            .await?;
        let Some((record, turn)) = changed else {
            return Ok(None);
        };
        let record = Arc::new(record);
        let mut memory = self.memory.write();
        if memory.layers.contains_key(&number) {
            memory.put_layer(Arc::clone(&record), turn);
        }
        drop(memory);
        Ok(Some(record))
    }

    /// Forgets a layer and its mounts, unless a snapshot is made of it; false then. The caller has
    /// made sure that nothing else uses them.
    pub async fn remove(&self, number: LayerNumber) -> Result<bool, StoreError> {
        let mounts: Vec<(MountNumber, MountKey)> = self
            .mounts()
            .into_iter()
            .filter(|(_, key)| key.layer == number)
            .collect();
        let gone = mounts.clone();
        let removed = self
            .store
            .write(Durability::Now, move |writer| {
                let transaction = writer.transaction();
                for row in transaction.open_table(SNAPSHOTS)?.iter()? {
                    let (key, value) = row?;
                    let snapshot: LazySnapshot =
                        decode("lazy snapshot", key.value(), value.value())?;
                    if snapshot.layer == number {
                        return Ok(false);
                    }
                }
                let mut layers = transaction.open_table(LAYERS)?;
                if let Some(record) = layers.remove(number.0)? {
                    let record: LayerRecord = decode("layer", number, record.value())?;
                    transaction
                        .open_table(IDENTITIES)?
                        .remove(record.identity.to_string().as_str())?;
                }
                let mut table = transaction.open_table(MOUNTS)?;
                let mut keys = transaction.open_table(MOUNT_KEYS)?;
                for (mount, key) in &gone {
                    table.remove(mount.0)?;
                    keys.remove(key.to_string().as_str())?;
                }
                Ok(true)
            })
            .await?;
        if !removed {
            return Ok(false);
        }
        let mut memory = self.memory.write();
        if let Some(record) = memory.layers.remove(&number) {
            memory.turns.remove(&number);
            memory.identities.remove(&record.identity);
            memory.nodes.remove(&record.node);
        }
        for (mount, _) in mounts {
            memory.mounts.remove(&mount);
        }
        Ok(true)
    }

    /// The mounts for `keys`, under new numbers where there is none yet.
    pub async fn mounts_for(&self, keys: &[MountKey]) -> Result<Vec<MountNumber>, StoreError> {
        let wanted = keys.to_vec();
        let numbers = self
            .store
            .write(Durability::Soon, move |writer| {
                let transaction = writer.transaction();
                let mut keys = transaction.open_table(MOUNT_KEYS)?;
                let mut mounts = transaction.open_table(MOUNTS)?;
                let mut numbers = Vec::with_capacity(wanted.len());
                for key in &wanted {
                    let name = key.to_string();
                    let known = keys.get(name.as_str())?.map(|number| number.value());
                    let number = if let Some(number) = known {
                        number
                    } else {
                        let number = next(writer, MOUNT_COUNTER)?;
                        keys.insert(name.as_str(), number)?;
                        mounts.insert(number, encode(key)?.as_slice())?;
                        number
                    };
                    numbers.push(MountNumber(number));
                }
                Ok(numbers)
            })
            .await?;
        let mut memory = self.memory.write();
        for (number, key) in numbers.iter().zip(keys) {
            memory.mounts.insert(*number, key.clone());
        }
        drop(memory);
        Ok(numbers)
    }

    /// What a mount number stands for.
    pub fn mount(&self, number: MountNumber) -> Option<MountKey> {
        self.memory.read().mounts.get(&number).cloned()
    }

    /// All mounts known, by number.
    pub fn mounts(&self) -> Vec<(MountNumber, MountKey)> {
        let memory = self.memory.read();
        memory
            .mounts
            .iter()
            .map(|(number, key)| (*number, key.clone()))
            .collect()
    }

    /// What a committed snapshot is made of, if it is lazy.
    pub fn snapshot(&self, id: SnapshotId) -> Option<LazySnapshot> {
        self.memory.read().snapshots.get(&id).cloned()
    }

    /// All lazy snapshots.
    pub fn snapshots(&self) -> Vec<(SnapshotId, LazySnapshot)> {
        let memory = self.memory.read();
        memory
            .snapshots
            .iter()
            .map(|(id, snapshot)| (*id, snapshot.clone()))
            .collect()
    }

    /// Makes a snapshot lazy, in the transaction that creates it; [`Self::bound`] when that
    /// is committed. Fails if the layer has been removed meanwhile.
    pub fn bind(
        writer: &Writer<'_>,
        id: SnapshotId,
        snapshot: &LazySnapshot,
    ) -> Result<(), StoreError> {
        let layers = writer.transaction().open_table(LAYERS)?;
        if layers.get(snapshot.layer.0)?.is_none() {
            return Err(StoreError::NotFound {
                key: format!("layer {}", snapshot.layer),
            });
        }
        let mut snapshots = writer.transaction().open_table(SNAPSHOTS)?;
        snapshots.insert(id.0, encode(snapshot)?.as_slice())?;
        Ok(())
    }

    /// See [`Self::bind`].
    pub fn bound(&self, id: SnapshotId, snapshot: LazySnapshot) {
        self.memory.write().snapshots.insert(id, snapshot);
    }

    /// Remembers why a snapshot is not lazy, for display.
    pub async fn set_reason(&self, id: SnapshotId, reason: &str) -> Result<(), StoreError> {
        let text = reason.to_owned();
        self.store
            .write(Durability::Soon, move |writer| {
                let mut reasons = writer.transaction().open_table(REASONS)?;
                reasons.insert(id.0, text.as_str())?;
                Ok(())
            })
            .await?;
        self.memory.write().reasons.insert(id, reason.to_owned());
        Ok(())
    }

    /// Why a snapshot is not lazy.
    pub fn reason(&self, id: SnapshotId) -> Option<String> {
        self.memory.read().reasons.get(&id).cloned()
    }

    /// All reasons, by snapshot.
    pub fn reasons(&self) -> Vec<(SnapshotId, String)> {
        let memory = self.memory.read();
        memory
            .reasons
            .iter()
            .map(|(id, reason)| (*id, reason.clone()))
            .collect()
    }

    /// Forgets what is recorded of snapshots that are gone. A crash may bring it back.
    pub async fn forget(&self, gone: Vec<SnapshotId>) -> Result<(), StoreError> {
        let known: Vec<SnapshotId> = {
            let memory = self.memory.read();
            gone.into_iter()
                .filter(|id| memory.snapshots.contains_key(id) || memory.reasons.contains_key(id))
                .collect()
        };
        if known.is_empty() {
            return Ok(());
        }
        let rows = known.clone();
        self.store
            .write(Durability::Soon, move |writer| {
                let transaction = writer.transaction();
                let mut snapshots = transaction.open_table(SNAPSHOTS)?;
                let mut reasons = transaction.open_table(REASONS)?;
                for id in &rows {
                    snapshots.remove(id.0)?;
                    reasons.remove(id.0)?;
                }
                Ok(())
            })
            .await?;
        let mut memory = self.memory.write();
        for id in known {
            memory.snapshots.remove(&id);
            memory.reasons.remove(&id);
        }
        Ok(())
    }

    /// Snapshots something is recorded of.
    pub fn known_snapshots(&self) -> Vec<SnapshotId> {
        let memory = self.memory.read();
        let reasons = memory.reasons.keys();
        memory.snapshots.keys().chain(reasons).copied().collect()
    }
}

fn next(writer: &Writer<'_>, name: &str) -> Result<u64, StoreError> {
    let mut counters = writer.transaction().open_table(COUNTERS)?;
    let number = counters.get(name)?.map_or(0, |value| value.value()) + 1;
    counters.insert(name, number)?;
    Ok(number)
}

/// Only from within a write: there is one at a time.
fn next_turn(turns: &AtomicU64) -> u64 {
    turns.fetch_add(1, Ordering::Relaxed) + 1
}

fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|error| StoreError::Corrupt {
        what: format!("record cannot be encoded: {error}"),
    })
}

fn decode<T: DeserializeOwned>(
    what: &str,
    key: impl Display,
    bytes: &[u8],
) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Corrupt {
        what: format!("{what} {key}: {error}"),
    })
}

#[cfg(test)]
mod tests;
