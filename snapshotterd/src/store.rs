//! The one metadata store: which snapshots exist, in which state, on which parent.
//!
//! One redb database holds every plugin name's snapshots in a key space of its own (containerd's
//! garbage collector prunes what it does not know *per plugin name*), with one sequence of numeric
//! ids over all of them; an id is never used twice, whatever crashes. The transition table is that
//! of containerd's own metastore, see [`Writer`].
//!
//! Readers are isolated and never wait ([`Store::read`]). Writers queue at one thread that applies
//! everything waiting in one transaction and syncs once (group commit), so sixty clients cost one
//! `fdatasync`, not sixty. Drivers add tables of their own and join the same transaction with
//! [`Writer::transaction`] and [`Reader::transaction`].
//!
//! Crash rule: what was answered is durable, except removals, which may come back after a kill or a
//! power cut (containerd lists and prunes again); [`Store::flush`] makes those durable before
//! anything on disk is deleted on their account. The database takes no file lock, see
//! [`crate::lock`]. The reasons are in `docs/adr/0010-one-store-one-writer-no-file-lock.md`.

mod backend;
mod committer;
mod error;
pub mod filter;
mod ids;
mod reader;
pub(crate) mod schema;
mod types;
mod writer;

#[cfg(test)]
mod crash;
#[cfg(test)]
mod model;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use redb::Database;

use self::{committer::Committer, ids::Ids};
pub use self::{
    error::StoreError,
    filter::{Filter, FilterError},
    ids::ReservedId,
    reader::Reader,
    types::{
        CommitSnapshot, CreateSnapshot, Info, Kind, Labels, Snapshot, SnapshotId, SnapshotKey,
        Usage, now,
    },
    writer::Writer,
};

/// The label by which containerd finds a remote snapshot; indexed.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// When a write has to be on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// Within a second, or with the next durable write: for what a kill may undo.
    Soon,
    /// Before the answer.
    Now,
}

/// A handle to the store; clones share it. The last one to go syncs and closes.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // Dropped in this order: the committer thread ends before the database goes.
    committer: Committer,
    /// Replaced after an I/O error, which leaves a database unusable.
    database: Arc<ArcSwap<Database>>,
    ids: Arc<Ids>,
    path: PathBuf,
}

impl Store {
    /// Opens the store at `path`, creating it and its directory when missing. The caller holds
    /// the root's lock ([`crate::lock`]); the store itself takes none.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|source| StoreError::File {
                path: parent.to_owned(),
                source,
            })?;
        }
        let file = path.to_owned();
        Self::with_backend(path, move || {
            backend::File::open(&file).map_err(|source| StoreError::File {
                path: file.clone(),
                source,
            })
        })
    }

    /// `backend` opens the file; also again, after an I/O error.
    fn with_backend<B: redb::StorageBackend>(
        path: &Path,
        backend: impl Fn() -> Result<B, StoreError> + Send + 'static,
    ) -> Result<Self, StoreError> {
        let open = move || -> Result<Database, StoreError> {
            Ok(Database::builder()
                .set_cache_size(schema::CACHE_BYTES)
                .create_with_backend(backend()?)?)
        };
        let database = open()?;
        let block = schema::prepare(&database)?;
        let database = Arc::new(ArcSwap::from_pointee(database));
        Ok(Self {
            inner: Arc::new(Inner {
                committer: Committer::start(Arc::clone(&database), Box::new(open))?,
                database,
                ids: Arc::new(Ids::new(block)),
                path: path.to_owned(),
            }),
        })
    }

    /// Where the database is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The kernel thread id of the only thread that writes to the database file.
    pub fn writer_thread(&self) -> u32 {
        self.inner.committer.thread_id()
    }

    /// A consistent view of everything, as of now. Point look-ups take microseconds and may be
    /// made from async code; scans of many snapshots belong on a blocking thread.
    pub fn read(&self) -> Result<Reader, StoreError> {
        Reader::begin(&self.inner.database.load())
    }

    /// Applies `change` in the next group commit and answers when that is as durable as asked.
    ///
    /// `change` may run more than once: when another change of the same group fails after it has
    /// written, the transaction is dropped and the others are applied again. Dropping the future
    /// does not undo a change that is already queued.
    pub async fn write<T, F>(&self, durability: Durability, change: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Writer<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.inner
            .committer
            .submit(durability, change)?
            .await
            .map_err(|_| StoreError::Closed)?
    }

    /// As [`Store::write`], for threads that may block.
    pub fn write_blocking<T, F>(&self, durability: Durability, change: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Writer<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        self.inner
            .committer
            .submit(durability, change)?
            .blocking_recv()
            .map_err(|_| StoreError::Closed)?
    }

    /// Makes every earlier write durable.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.write(Durability::Now, |_| Ok(())).await
    }

    /// Takes the next numeric id, so that directories can be named by it before the snapshot is
    /// recorded. Until the guard goes, [`Store::live_ids`] counts the id as live; an id that was
    /// taken and not used is lost, never reused.
    pub async fn reserve_id(&self) -> Result<ReservedId, StoreError> {
        loop {
            if let Some(id) = Ids::take(&self.inner.ids) {
                return Ok(id);
            }
            #[expect(
                clippy::redundant_closure_for_method_calls,
                reason = "the method is not general over the writer's lifetime"
            )]
            let block = self
                .write(Durability::Now, |writer| writer.next_id_block())
                .await?;
            self.inner.ids.extend(block);
        }
    }

    /// Every id that names a snapshot or is reserved for one. What a driver finds on disk under
    /// another id *in a listing made before this call* belongs to nobody.
    pub fn live_ids(&self) -> Result<std::collections::HashSet<SnapshotId>, StoreError> {
        // In this order: a reservation that ends in between is visible to the later read.
        let mut live = self.inner.ids.reserved();
        live.extend(self.read()?.ids()?);
        Ok(live)
    }
}
