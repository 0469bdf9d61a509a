//! Crashes: what was answered as durable is there afterwards, and the rest is consistent, whatever
//! part of the unsynced writes reached the disk.

use std::{io, path::Path, sync::Arc};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::{
    CreateSnapshot, Durability, Kind, Labels, SnapshotId, SnapshotKey, Store, StoreError,
    model::{self, Model, Outcome},
};

/// A disk with a volatile cache.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Image>>);

#[derive(Debug, Default)]
struct Image {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// What happened since the last sync.
    pending: Vec<Change>,
    /// Whether it refuses writes.
    full: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Length(usize),
    Write(usize, Vec<u8>),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Write(offset, data) => {
                // A lost length change: the file system extends for the write.
                if bytes.len() < offset + data.len() {
                    bytes.resize(offset + data.len(), 0);
                }
                bytes[*offset..offset + data.len()].copy_from_slice(data);
            }
        }
    }
}

impl Disk {
    /// Power off: of the unsynced writes those survive that `survives` names by position.
    fn crash(&self, survives: impl Fn(usize) -> bool) -> Self {
        let image = self.0.lock();
        let mut bytes = image.durable.clone();
        for (index, change) in image.pending.iter().enumerate() {
            if survives(index) {
                change.apply(&mut bytes);
            }
        }
        Self(Arc::new(Mutex::new(Image {
            durable: bytes.clone(),
            current: bytes,
            pending: Vec::new(),
            full: false,
        })))
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut image = self.0.lock();
        if image.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        change.apply(&mut image.current);
        image.pending.push(change);
        Ok(())
    }
}

fn index(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(io::Error::other)
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = index(offset)?;
        let image = self.0.lock();
        let from = image
            .current
            .get(start..start + out.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(index(len)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut image = self.0.lock();
        image.durable = image.current.clone();
        image.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(index(offset)?, data.to_vec()))
    }
}

fn open(disk: &Disk) -> Result<Store, StoreError> {
    let disk = disk.clone();
    Store::with_backend(Path::new("a disk in memory"), move || Ok(disk.clone()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn durable_answers_survive_and_the_rest_is_whole(
        steps in proptest::collection::vec((model::any_step(), any::<bool>()), 1..40),
        survivors in proptest::collection::vec(any::<bool>(), 64),
        in_order in any::<bool>(),
    ) {
        let disk = Disk::default();
        let store = open(&disk)?;
        let mut model = Model::default();
        // States the store may legitimately be found in: every one since the last durable answer.
        let mut possible = vec![model.clone()];
        for (number, (step, durable)) in steps.iter().enumerate() {
            let durability = if *durable { Durability::Now } else { Durability::Soon };
            model.apply(step);
            let outcome = model::apply(&store, step, durability, SnapshotId(number as u64 + 1));
            // A refusal promises nothing about what came before.
            if *durable && outcome == Outcome::Done {
                possible.clear();
            }
            possible.push(model.clone());
        }
        // In order: the process was killed at some point. Not in order: the power failed.
        let length = survivors.iter().filter(|survives| **survives).count();
        let crashed = disk.crash(|position| {
            if in_order { position < length } else { survivors[position % survivors.len()] }
        });
        let reopened = open(&crashed)?;
        let found = model::contents(&reopened)?;
        prop_assert!(
            possible.contains(&found),
            "found {found:?}\nnone of {possible:?}"
        );
    }
}

#[test]
fn a_full_disk_is_an_error_while_it_is_full() -> Result<(), StoreError> {
    let disk = Disk::default();
    let store = open(&disk)?;
    let create = |name: &str, id: u64| {
        let new = CreateSnapshot {
            key: SnapshotKey::new("lazy", name),
            kind: Kind::Active,
            parent: None,
            labels: Labels::new(),
            id: SnapshotId(id),
        };
        store.write_blocking(Durability::Now, move |writer| writer.create(&new))
    };
    create("before", 1)?;
    let before = model::contents(&store)?;
    disk.0.lock().full = true;
    for _ in 0..3 {
        assert!(create("meanwhile", 2).is_err(), "nothing can be written");
    }
    disk.0.lock().full = false;
    // The first failure after the disk has room again may still be the old database's.
    let after = create("after", 3).or_else(|_| create("after", 3))?;
    assert_eq!(after.info.name, "after");
    let contents = model::contents(&store)?;
    assert_eq!(contents.snapshots.len(), before.snapshots.len() + 1);
    Ok(())
}

/// Deleting what a removed snapshot left behind waits for this.
#[tokio::test]
async fn a_flush_makes_earlier_changes_durable() -> Result<(), StoreError> {
    let disk = Disk::default();
    let store = open(&disk)?;
    let new = CreateSnapshot {
        key: SnapshotKey::new("lazy", "a"),
        kind: Kind::Active,
        parent: None,
        labels: Labels::new(),
        id: SnapshotId(1),
    };
    store
        .write(Durability::Soon, move |writer| writer.create(&new))
        .await?;
    let key = SnapshotKey::new("lazy", "a");
    let survives = |disk: &Disk| open(&disk.crash(|_| false))?.read()?.info(&key);
    assert!(matches!(survives(&disk), Err(StoreError::NotFound { .. })));
    store.flush().await?;
    survives(&disk)?;
    Ok(())
}
