//! Tables and records on disk.
//!
//! Records are protobuf messages, so that fields can be added without a new schema version; the
//! version changes when an older daemon would misread the tables.

use std::ops::Range;

use prost::Message;
use prost_types::Timestamp;
use redb::{Database, Durability, ReadableTable, TableDefinition, WriteTransaction};

use super::{Kind, Labels, StoreError, Usage};

pub(super) const CACHE_BYTES: usize = 8 << 20;
const VERSION: u64 = 1;
const ID_BLOCK: u64 = 1024;

/// `schema` (the version) and `next-id` (the first id not reserved yet).
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// (plugin name, key) to [`Record`].
pub(super) const SNAPSHOTS: TableDefinition<'_, (&str, &str), &[u8]> =
    TableDefinition::new("snapshots");
/// Id to (plugin name, key, parent's id or 0).
pub(super) const IDS: TableDefinition<'_, u64, (&str, &str, u64)> = TableDefinition::new("ids");
/// (parent's id, child's id).
pub(super) const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
/// (plugin name, value of `containerd.io/snapshot.ref`, id).
pub(super) const REFS: TableDefinition<'_, (&str, &str, u64), ()> = TableDefinition::new("refs");

/// One snapshot.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(uint32, tag = "2")]
    pub(super) kind: u32,
    /// 0: none.
    #[prost(uint64, tag = "3")]
    pub(super) parent_id: u64,
    #[prost(string, tag = "4")]
    pub(super) parent: String,
    #[prost(message, optional, tag = "5")]
    pub(super) created: Option<Timestamp>,
    #[prost(message, optional, tag = "6")]
    pub(super) updated: Option<Timestamp>,
    #[prost(btree_map = "string, string", tag = "7")]
    pub(super) labels: Labels,
    #[prost(message, optional, tag = "8")]
    pub(super) usage: Option<UsageRecord>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct UsageRecord {
    #[prost(uint64, tag = "1")]
    bytes: u64,
    #[prost(uint64, tag = "2")]
    inodes: u64,
}

impl Record {
    pub(super) fn parse(bytes: &[u8], key: &str) -> Result<Self, StoreError> {
        Self::decode(bytes)
            .map_err(|error| StoreError::corrupt(format!("record of {key:?}: {error}")))
    }

    pub(super) fn kind(&self, key: &str) -> Result<Kind, StoreError> {
        match self.kind {
            1 => Ok(Kind::View),
            2 => Ok(Kind::Active),
            3 => Ok(Kind::Committed),
            other => Err(StoreError::corrupt(format!("kind {other} of {key:?}"))),
        }
    }

    pub(super) fn set_kind(&mut self, kind: Kind) {
        self.kind = match kind {
            Kind::View => 1,
            Kind::Active => 2,
            Kind::Committed => 3,
        };
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        self.usage
            .map(|UsageRecord { bytes, inodes }| Usage { bytes, inodes })
    }

    pub(super) fn set_usage(&mut self, usage: Option<Usage>) {
        self.usage = usage.map(|Usage { bytes, inodes }| UsageRecord { bytes, inodes });
    }
}

/// A stored record, or an error; what was read is written and read again. For fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok(record) = Record::parse(data, "key") else {
        return;
    };
    let _ = (record.kind("key"), record.usage());
    let written = record.encode_to_vec();
    let again = Record::parse(&written, "key").map(|record| record.encode_to_vec());
    assert_eq!(again.ok(), Some(written));
}

/// Creates the tables, checks the version and reserves the first block of ids.
pub(super) fn prepare(database: &Database) -> Result<Range<u64>, StoreError> {
    let mut transaction = database.begin_write()?;
    transaction
        .set_durability(Durability::Immediate)
        .map_err(|error| StoreError::corrupt(error.to_string()))?;
    {
        let mut meta = transaction.open_table(META)?;
        let found = meta.get("schema")?.map(|value| value.value());
        match found {
            None => {
                meta.insert("schema", VERSION)?;
            }
            Some(VERSION) => {}
            Some(found) => {
                return Err(StoreError::Schema {
                    found,
                    supported: VERSION,
                });
            }
        }
        transaction.open_table(SNAPSHOTS)?;
        transaction.open_table(IDS)?;
        transaction.open_table(CHILDREN)?;
        transaction.open_table(REFS)?;
    }
    let block = next_id_block(&transaction)?;
    transaction.commit()?;
    Ok(block)
}

/// Takes the next block of ids off the counter. Id 0 means "none" and is never handed out.
pub(super) fn next_id_block(transaction: &WriteTransaction) -> Result<Range<u64>, StoreError> {
    let mut meta = transaction.open_table(META)?;
    let first = meta.get("next-id")?.map_or(1, |value| value.value());
    let end = first
        .checked_add(ID_BLOCK)
        .ok_or_else(|| StoreError::corrupt("ids are used up"))?;
    meta.insert("next-id", end)?;
    Ok(first..end)
}
