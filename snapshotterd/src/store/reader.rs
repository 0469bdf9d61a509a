//! Isolated reads.

use std::{fmt, ops::Bound, sync::Arc};

use redb::{ReadOnlyTable, ReadTransaction, ReadableDatabase as _};

use super::{
    Filter, Info, Kind, Snapshot, SnapshotId, SnapshotKey, StoreError,
    filter::Shortcut,
    schema::{CHILDREN, IDS, REFS, Record, SNAPSHOTS},
};

/// One consistent view of the store. It pins old pages while it lives: do not keep it over waits.
pub struct Reader {
    transaction: ReadTransaction,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reader")
    }
}

impl Reader {
    pub(super) fn begin(database: &redb::Database) -> Result<Self, StoreError> {
        Ok(Self {
            transaction: database.begin_read()?,
        })
    }

    /// The transaction, for tables that belong to a driver.
    pub fn transaction(&self) -> &ReadTransaction {
        &self.transaction
    }

    /// What containerd may know about `key`.
    pub fn info(&self, key: &SnapshotKey) -> Result<Info, StoreError> {
        info(&key.key, self.record(key)?)
    }

    /// `key` with its ancestors.
    pub fn snapshot(&self, key: &SnapshotKey) -> Result<Snapshot, StoreError> {
        let record = self.record(key)?;
        let parents = self.ancestors(record.parent_id)?;
        snapshot(&key.key, record, parents)
    }

    /// The key or name that `id` has now.
    pub fn key_of(&self, id: SnapshotId) -> Result<Option<SnapshotKey>, StoreError> {
        Ok(self.ids_table()?.get(id.0)?.map(|entry| {
            let (snapshotter, key, _) = entry.value();
            SnapshotKey::new(snapshotter, key)
        }))
    }

    /// Every id in use.
    pub fn ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        self.ids_table()?
            .range::<u64>(..)?
            .map(|entry| Ok(SnapshotId(entry?.0.value())))
            .collect()
    }

    /// The names of the snapshots built directly on `id`.
    pub fn children(&self, id: SnapshotId) -> Result<Vec<SnapshotId>, StoreError> {
        self.transaction
            .open_table(CHILDREN)?
            .range((id.0, 0)..=(id.0, u64::MAX))?
            .map(|entry| Ok(SnapshotId(entry?.0.value().1)))
            .collect()
    }

    /// The snapshots of one plugin whose label `containerd.io/snapshot.ref` is `reference`.
    pub fn by_reference(
        &self,
        snapshotter: &str,
        reference: &str,
    ) -> Result<Vec<SnapshotKey>, StoreError> {
        self.transaction
            .open_table(REFS)?
            .range((snapshotter, reference, 0)..=(snapshotter, reference, u64::MAX))?
            .map(|entry| {
                let id = SnapshotId(entry?.0.value().2);
                self.key_of(id)?.ok_or_else(|| {
                    StoreError::corrupt(format!("reference {reference:?} names id {id}"))
                })
            })
            .collect()
    }

    /// Every snapshot of every plugin, in the order of plugin name and key.
    pub fn for_each(
        &self,
        mut visit: impl FnMut(SnapshotKey, Snapshot) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for entry in self.snapshots_table()?.range::<(&str, &str)>(..)? {
            let (key, value) = entry?;
            let (snapshotter, key) = key.value();
            let record = Record::parse(value.value(), key)?;
            let parents = self.ancestors(record.parent_id)?;
            visit(
                SnapshotKey::new(snapshotter, key),
                snapshot(key, record, parents)?,
            )?;
        }
        Ok(())
    }

    /// Up to `limit` snapshots of `snapshotter` that match, in the order of their names, after
    /// `after`. Fewer than `limit` means that there are no more.
    pub fn page(
        &self,
        snapshotter: &str,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Info>, StoreError> {
        let candidates = match filter.shortcut() {
            Shortcut::Reference(reference) => self.by_reference(snapshotter, reference)?,
            Shortcut::Name(name) => vec![SnapshotKey::new(snapshotter, name)],
            Shortcut::None => return self.scan(snapshotter, filter, after, limit),
        };
        let mut page = Vec::new();
        for key in candidates {
            match self.info(&key) {
                Ok(info) if filter.matches(&info) => page.push(info),
                Ok(_) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        page.sort_by(|a, b| a.name.cmp(&b.name));
        page.retain(|info| after.is_none_or(|after| info.name.as_str() > after));
        page.truncate(limit);
        Ok(page)
    }

    fn scan(
        &self,
        snapshotter: &str,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Info>, StoreError> {
        let start = match after {
            Some(after) => Bound::Excluded((snapshotter, after)),
            None => Bound::Included((snapshotter, "")),
        };
        let mut page = Vec::new();
        let table = self.snapshots_table()?;
        for entry in table.range::<(&str, &str)>((start, Bound::Unbounded))? {
            let (key, value) = entry?;
            let (owner, key) = key.value();
            if owner != snapshotter || page.len() == limit {
                break;
            }
            let info = info(key, Record::parse(value.value(), key)?)?;
            if filter.matches(&info) {
                page.push(info);
            }
        }
        Ok(page)
    }

    /// How many snapshots there are of each plugin name and state.
    pub fn counts(&self) -> Result<Vec<(Arc<str>, Kind, u64)>, StoreError> {
        let mut counts = std::collections::BTreeMap::new();
        for entry in self.snapshots_table()?.range::<(&str, &str)>(..)? {
            let (key, value) = entry?;
            let (snapshotter, key) = key.value();
            let kind = Record::parse(value.value(), key)?.kind(key)?;
            *counts.entry((Arc::from(snapshotter), kind)).or_insert(0) += 1;
        }
        Ok(counts
            .into_iter()
            .map(|((name, kind), count)| (name, kind, count))
            .collect())
    }

    fn record(&self, key: &SnapshotKey) -> Result<Record, StoreError> {
        match self
            .snapshots_table()?
            .get((key.snapshotter.as_ref(), key.key.as_ref()))?
        {
            Some(bytes) => Record::parse(bytes.value(), &key.key),
            None => Err(StoreError::NotFound {
                key: key.key.to_string(),
            }),
        }
    }

    fn ancestors(&self, first: u64) -> Result<Vec<SnapshotId>, StoreError> {
        let ids = self.ids_table()?;
        ancestors(first, |id| Ok(ids.get(id)?.map(|entry| entry.value().2)))
    }

    fn snapshots_table(
        &self,
    ) -> Result<ReadOnlyTable<(&'static str, &'static str), &'static [u8]>, StoreError> {
        Ok(self.transaction.open_table(SNAPSHOTS)?)
    }

    fn ids_table(
        &self,
    ) -> Result<ReadOnlyTable<u64, (&'static str, &'static str, u64)>, StoreError> {
        Ok(self.transaction.open_table(IDS)?)
    }
}

pub(super) fn info(key: &str, record: Record) -> Result<Info, StoreError> {
    Ok(Info {
        name: key.to_owned(),
        kind: record.kind(key)?,
        parent: (record.parent_id != 0).then_some(record.parent),
        created: record.created.unwrap_or_default(),
        updated: record.updated.unwrap_or_default(),
        labels: record.labels,
    })
}

pub(super) fn snapshot(
    key: &str,
    record: Record,
    parents: Vec<SnapshotId>,
) -> Result<Snapshot, StoreError> {
    Ok(Snapshot {
        id: SnapshotId(record.id),
        usage: record.usage(),
        parents,
        info: info(key, record)?,
    })
}

/// Follows parents from `first` (0: none). Parents have lower positions in time, not lower ids,
/// so a damaged table is recognised by its length.
pub(super) fn ancestors(
    first: u64,
    parent_of: impl Fn(u64) -> Result<Option<u64>, StoreError>,
) -> Result<Vec<SnapshotId>, StoreError> {
    const DEEPEST: usize = 1 << 16;
    let mut chain = Vec::new();
    let mut next = first;
    while next != 0 {
        if chain.len() == DEEPEST {
            return Err(StoreError::corrupt(format!("endless chain at id {next}")));
        }
        chain.push(SnapshotId(next));
        next = parent_of(next)?
            .ok_or_else(|| StoreError::corrupt(format!("parent id {next} does not exist")))?;
    }
    Ok(chain)
}
