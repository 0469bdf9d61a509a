//! The one thread that writes: group commit.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use arc_swap::ArcSwap;
use redb::Database;
use tokio::sync::oneshot;

use super::{Durability, StoreError, Writer};

/// Most changes one transaction carries.
const GROUP_LIMIT: usize = 256;
/// How long a change of [`Durability::Soon`] may stay volatile.
const SOON: Duration = Duration::from_secs(1);

/// Opens the database anew.
pub(super) type Reopen = Box<dyn Fn() -> Result<Database, StoreError> + Send>;

pub(super) struct Committer {
    jobs: Option<Sender<Box<dyn Job>>>,
    thread: Option<JoinHandle<()>>,
    thread_id: u32,
}

impl Committer {
    /// `reopen` opens the database anew: after an I/O error (a full disk, most likely) redb refuses
    /// everything until then.
    pub(super) fn start(
        database: Arc<ArcSwap<Database>>,
        reopen: Reopen,
    ) -> Result<Self, StoreError> {
        let (jobs, queue) = mpsc::channel();
        let (announce, announced) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || {
                let id = rustix::thread::gettid().as_raw_nonzero().get();
                // The receiver waits below; if it is gone there is nobody to tell.
                let _ = announce.send(id.unsigned_abs());
                run(&database, &reopen, &queue);
            })
            .map_err(|source| StoreError::File {
                path: "store-writer thread".into(),
                source,
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            thread_id: announced.recv().map_err(|_| StoreError::Closed)?,
        })
    }

    pub(super) fn thread_id(&self) -> u32 {
        self.thread_id
    }

    pub(super) fn submit<T, F>(
        &self,
        durability: Durability,
        change: F,
    ) -> Result<oneshot::Receiver<Result<T, StoreError>>, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Writer<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Change {
            durability,
            run: change,
            outcome: None,
            reply,
        });
        self.jobs
            .as_ref()
            .ok_or(StoreError::Closed)?
            .send(job)
            .map_err(|_| StoreError::Closed)?;
        Ok(answer)
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A change may hold the last handle of the store; the thread cannot join itself.
            if thread.thread().id() != thread::current().id() {
                // A panic of the thread has been answered to every waiting change already.
                let _ = thread.join();
            }
        }
    }
}

impl fmt::Debug for Committer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Committer")
            .field("thread_id", &self.thread_id)
            .finish_non_exhaustive()
    }
}

/// A queued change with its type erased.
trait Job: Send {
    fn durability(&self) -> Durability;
    /// Whether the transaction can go on: false when the change failed after it had written.
    fn apply(&mut self, writer: &mut Writer<'_>) -> bool;
    /// Answers the caller. `failure`: why the group was not committed.
    fn finish(self: Box<Self>, failure: Option<&str>);
}

struct Change<T, F> {
    durability: Durability,
    run: F,
    outcome: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Job for Change<T, F>
where
    T: Send,
    F: FnMut(&mut Writer<'_>) -> Result<T, StoreError> + Send,
{
    fn durability(&self) -> Durability {
        self.durability
    }

    fn apply(&mut self, writer: &mut Writer<'_>) -> bool {
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(writer)))
            .unwrap_or_else(|panic| Err(panicked(&*panic)));
        let usable = outcome.is_ok() || !writer.has_written();
        self.outcome = Some(outcome);
        usable
    }

    fn finish(self: Box<Self>, failure: Option<&str>) {
        let outcome = match (self.outcome, failure) {
            // An error of its own says more than the group's.
            (Some(Err(error)), _) => Err(error),
            (_, Some(reason)) => Err(StoreError::CommitFailed {
                reason: reason.to_owned(),
            }),
            (Some(Ok(value)), None) => Ok(value),
            (None, None) => Err(StoreError::Closed),
        };
        // The caller may have given up waiting.
        let _ = self.reply.send(outcome);
    }
}

fn panicked(panic: &(dyn Any + Send)) -> StoreError {
    let message = panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    StoreError::Panicked { message }
}

fn run(database: &ArcSwap<Database>, reopen: &Reopen, queue: &Receiver<Box<dyn Job>>) {
    let mut volatile = false;
    loop {
        let first = if volatile {
            match queue.recv_timeout(SOON) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        } else {
            match queue.recv() {
                Ok(job) => Some(job),
                Err(_) => break,
            }
        };
        let group: Vec<_> = first
            .into_iter()
            .chain(queue.try_iter())
            .take(GROUP_LIMIT)
            .collect();
        // An empty group is the time limit of volatile changes.
        let durability = group
            .iter()
            .map(|job| job.durability())
            .max()
            .unwrap_or(Durability::Now);
        match commit(&database.load(), group, durability) {
            None => volatile = durability == Durability::Soon,
            Some(reason) => {
                tracing::error!(reason, "the metadata store failed to commit");
                volatile = false;
                match reopen() {
                    Ok(fresh) => database.store(Arc::new(fresh)),
                    // Tried again after the next failure.
                    Err(error) => {
                        tracing::error!(error = describe(&error), "cannot reopen the store");
                    }
                }
            }
        }
    }
    if volatile && let Some(reason) = commit(&database.load(), Vec::new(), Durability::Now) {
        tracing::error!(reason, "the metadata store failed to sync at its end");
    }
}

/// Applies and commits a group, answers every change, and says why when nothing was committed.
fn commit(
    database: &Database,
    mut group: Vec<Box<dyn Job>>,
    durability: Durability,
) -> Option<String> {
    let failure = loop {
        match attempt(database, &mut group, durability) {
            Ok(Attempt::Committed) => break None,
            Ok(Attempt::Without(index)) => group.remove(index).finish(None),
            Err(error) => break Some(describe(&error)),
        }
    };
    for job in group {
        job.finish(failure.as_deref());
    }
    failure
}

enum Attempt {
    Committed,
    /// That change failed half-way: the transaction was dropped, try again without it.
    Without(usize),
}

fn attempt(
    database: &Database,
    group: &mut [Box<dyn Job>],
    durability: Durability,
) -> Result<Attempt, StoreError> {
    let mut transaction = database.begin_write()?;
    transaction
        .set_durability(match durability {
            Durability::Soon => redb::Durability::None,
            Durability::Now => redb::Durability::Immediate,
        })
        .map_err(|error| StoreError::corrupt(error.to_string()))?;
    for (index, job) in group.iter_mut().enumerate() {
        if !job.apply(&mut Writer::new(&transaction)) {
            transaction.abort()?;
            return Ok(Attempt::Without(index));
        }
    }
    transaction.commit()?;
    Ok(Attempt::Committed)
}

fn describe(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
