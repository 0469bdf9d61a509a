//! The transitions.

use std::{cell::Cell, fmt, ops::Range};

use redb::{ReadableTable as _, WriteTransaction};

use super::{
    CommitSnapshot, CreateSnapshot, Info, Kind, Labels, SNAPSHOT_REF, Snapshot, SnapshotKey,
    StoreError, Usage, now, reader,
    schema::{self, CHILDREN, IDS, REFS, Record, SNAPSHOTS},
};

/// Longest key or name, in bytes.
const KEY_LIMIT: usize = 8 << 10;

/// The write side inside one transaction.
///
/// | transition | from | to | refused |
/// |---|---|---|---|
/// | [`create`](Self::create) | nothing | view, active or committed | parent missing or not committed; key taken |
/// | [`commit`](Self::commit) | active | committed, same id | key missing, not active; name taken; parent missing, not committed or another one |
/// | [`remove`](Self::remove) | any | nothing | key missing; has children |
/// | [`update`](Self::update) | any | same, other labels | key missing; immutable field |
pub struct Writer<'a> {
    transaction: &'a WriteTransaction,
    written: Cell<bool>,
}

impl fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writer")
    }
}

impl<'a> Writer<'a> {
    pub(super) fn new(transaction: &'a WriteTransaction) -> Self {
        Self {
            transaction,
            written: Cell::new(false),
        }
    }

    /// Whether something may have been written, so that an error has to drop the transaction.
    pub(super) fn has_written(&self) -> bool {
        self.written.get()
    }

    /// The transaction, for tables that belong to a driver. An error returned after this call
    /// undoes what was written through it.
    pub fn transaction(&self) -> &'a WriteTransaction {
        self.written.set(true);
        self.transaction
    }

    /// Records a new snapshot.
    pub fn create(&mut self, new: &CreateSnapshot) -> Result<Snapshot, StoreError> {
        check_key(&new.key.key)?;
        let parent = new
            .parent
            .as_deref()
            .map(|name| self.parent(&new.key, name))
            .transpose()?;
        if let Some((name, kind, _)) = &parent
            && *kind != Kind::Committed
        {
            return Err(StoreError::ParentNotCommitted {
                parent: name.clone(),
                kind: *kind,
            });
        }
        if self.find(&new.key)?.is_some() {
            return Err(already_exists(&new.key.key));
        }
        let at = now();
        let mut record = Record {
            id: new.id.0,
            created: Some(at),
            updated: Some(at),
            labels: without_empty(&new.labels),
            ..Record::default()
        };
        record.set_kind(new.kind);
        if let Some((name, _, id)) = parent {
            record.parent = name;
            record.parent_id = id;
        }
        self.insert(&new.key, &record)?;
        self.snapshot(&new.key, record)
    }

    /// Turns an active snapshot into a committed one. Labels are replaced, times start anew.
    pub fn commit(&mut self, commit: &CommitSnapshot) -> Result<Snapshot, StoreError> {
        check_key(&commit.name)?;
        let name = commit.key.sibling(&commit.name);
        if self.find(&name)?.is_some() {
            return Err(already_exists(&name.key));
        }
        let active = self.require(&commit.key)?;
        let kind = active.kind(&commit.key.key)?;
        if kind != Kind::Active {
            return Err(StoreError::WrongKind {
                operation: "commit",
                key: commit.key.key.to_string(),
                kind,
            });
        }
        let mut record = active.clone();
        match commit.parent.as_deref() {
            None => {}
            Some(asked) if active.parent_id == 0 => {
                let (parent, kind, id) = self.parent(&commit.key, asked)?;
                if kind != Kind::Committed {
                    return Err(StoreError::RebaseParentNotCommitted { parent, kind });
                }
                record.parent = parent;
                record.parent_id = id;
            }
            Some(asked) if asked == active.parent => {}
            Some(asked) => {
                return Err(StoreError::ParentMismatch {
                    key: commit.key.key.to_string(),
                    actual: active.parent,
                    asked: asked.to_owned(),
                });
            }
        }
        let at = now();
        record.set_kind(Kind::Committed);
        record.created = Some(at);
        record.updated = Some(at);
        record.labels = without_empty(&commit.labels);
        record.set_usage(commit.usage);
        self.delete(&commit.key, &active)?;
        self.insert(&name, &record)?;
        self.snapshot(&name, record)
    }

    /// Removes a snapshot that nothing is built on, and returns what it was.
    pub fn remove(&mut self, key: &SnapshotKey) -> Result<Snapshot, StoreError> {
        let record = self.require(key)?;
        let has_children = self
            .transaction
            .open_table(CHILDREN)?
            .range((record.id, 0)..=(record.id, u64::MAX))?
            .next()
            .transpose()?
            .is_some();
        if has_children {
            return Err(StoreError::HasChildren {
                key: key.key.to_string(),
            });
        }
        let snapshot = self.snapshot(key, record.clone())?;
        self.delete(key, &record)?;
        Ok(snapshot)
    }

    /// Changes labels. `mask` holds field paths: empty or `labels` replaces all labels,
    /// `labels.KEY` sets one (an empty or missing value removes it); anything else is immutable.
    pub fn update(
        &mut self,
        key: &SnapshotKey,
        labels: &Labels,
        mask: &[String],
    ) -> Result<Info, StoreError> {
        let old = self.require(key)?;
        let mut record = old.clone();
        if mask.is_empty() {
            record.labels.clone_from(labels);
        }
        for path in mask {
            if path == "labels" {
                record.labels.clone_from(labels);
            } else if let Some(label) = path.strip_prefix("labels.") {
                let value = labels.get(label).cloned().unwrap_or_default();
                record.labels.insert(label.to_owned(), value);
            } else {
                return Err(StoreError::ImmutableField { path: path.clone() });
            }
        }
        record.labels = without_empty(&record.labels);
        record.updated = Some(now());
        self.replace(key, &old, &record)?;
        reader::info(&key.key, record)
    }

    /// Records a usage that was computed later. The snapshot keeps its update time.
    pub fn set_usage(&mut self, key: &SnapshotKey, usage: Usage) -> Result<(), StoreError> {
        let old = self.require(key)?;
        let mut record = old.clone();
        record.set_usage(Some(usage));
        self.replace(key, &old, &record)
    }

    /// `key` with its ancestors, as this transaction sees it.
    pub fn find_snapshot(&self, key: &SnapshotKey) -> Result<Snapshot, StoreError> {
        let record = self.require(key)?;
        self.snapshot(key, record)
    }

    pub(super) fn next_id_block(&mut self) -> Result<Range<u64>, StoreError> {
        self.written.set(true);
        schema::next_id_block(self.transaction)
    }

    fn snapshot(&self, key: &SnapshotKey, record: Record) -> Result<Snapshot, StoreError> {
        let ids = self.transaction.open_table(IDS)?;
        let parents = reader::ancestors(record.parent_id, |id| {
            Ok(ids.get(id)?.map(|entry| entry.value().2))
        })?;
        reader::snapshot(&key.key, record, parents)
    }

    fn find(&self, key: &SnapshotKey) -> Result<Option<Record>, StoreError> {
        self.transaction
            .open_table(SNAPSHOTS)?
            .get((key.snapshotter.as_ref(), key.key.as_ref()))?
            .map(|bytes| Record::parse(bytes.value(), &key.key))
            .transpose()
    }

    fn require(&self, key: &SnapshotKey) -> Result<Record, StoreError> {
        self.find(key)?.ok_or_else(|| StoreError::NotFound {
            key: key.key.to_string(),
        })
    }

    fn parent(&self, child: &SnapshotKey, name: &str) -> Result<(String, Kind, u64), StoreError> {
        let record =
            self.find(&child.sibling(name))?
                .ok_or_else(|| StoreError::ParentNotFound {
                    parent: name.to_owned(),
                })?;
        Ok((name.to_owned(), record.kind(name)?, record.id))
    }

    fn insert(&mut self, key: &SnapshotKey, record: &Record) -> Result<(), StoreError> {
        self.written.set(true);
        let name = (key.snapshotter.as_ref(), key.key.as_ref());
        self.put(key, record)?;
        self.transaction
            .open_table(IDS)?
            .insert(record.id, (name.0, name.1, record.parent_id))?;
        if record.parent_id != 0 {
            self.transaction
                .open_table(CHILDREN)?
                .insert((record.parent_id, record.id), ())?;
        }
        if let Some(reference) = record.labels.get(SNAPSHOT_REF) {
            self.transaction
                .open_table(REFS)?
                .insert((name.0, reference.as_str(), record.id), ())?;
        }
        Ok(())
    }

    fn delete(&mut self, key: &SnapshotKey, record: &Record) -> Result<(), StoreError> {
        self.written.set(true);
        let name = (key.snapshotter.as_ref(), key.key.as_ref());
        self.transaction.open_table(SNAPSHOTS)?.remove(name)?;
        self.transaction.open_table(IDS)?.remove(record.id)?;
        if record.parent_id != 0 {
            self.transaction
                .open_table(CHILDREN)?
                .remove((record.parent_id, record.id))?;
        }
        if let Some(reference) = record.labels.get(SNAPSHOT_REF) {
            self.transaction
                .open_table(REFS)?
                .remove((name.0, reference.as_str(), record.id))?;
        }
        Ok(())
    }

    /// Rewrites a record whose key, id and parent stay.
    fn replace(&mut self, key: &SnapshotKey, old: &Record, new: &Record) -> Result<(), StoreError> {
        self.written.set(true);
        let (before, after) = (old.labels.get(SNAPSHOT_REF), new.labels.get(SNAPSHOT_REF));
        if before != after {
            let mut refs = self.transaction.open_table(REFS)?;
            if let Some(reference) = before {
                refs.remove((key.snapshotter.as_ref(), reference.as_str(), old.id))?;
            }
            if let Some(reference) = after {
                refs.insert((key.snapshotter.as_ref(), reference.as_str(), old.id), ())?;
            }
        }
        self.put(key, new)
    }

    fn put(&self, key: &SnapshotKey, record: &Record) -> Result<(), StoreError> {
        use prost::Message as _;
        self.transaction.open_table(SNAPSHOTS)?.insert(
            (key.snapshotter.as_ref(), key.key.as_ref()),
            record.encode_to_vec().as_slice(),
        )?;
        Ok(())
    }
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() || key.len() > KEY_LIMIT {
        return Err(StoreError::InvalidKey {
            length: key.len(),
            limit: KEY_LIMIT,
        });
    }
    Ok(())
}

fn without_empty(labels: &Labels) -> Labels {
    labels
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn already_exists(key: &str) -> StoreError {
    StoreError::AlreadyExists {
        key: key.to_owned(),
    }
}
