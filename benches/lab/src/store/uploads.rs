//! Upload sessions: content that arrives over several requests.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;

use super::{Incoming, RepoName, Store, StoreError};

/// The sessions of one server. They live in memory: a restart forgets them, as the specification
/// allows.
#[derive(Debug, Default)]
pub(crate) struct Uploads {
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    ids: Ids,
}

/// One upload.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) repo: RepoName,
    /// `None` once the upload is committed, or after a write failed.
    pub(crate) content: AsyncMutex<Option<Incoming>>,
}

impl Uploads {
    pub(crate) fn begin(&self, store: &Store, repo: &RepoName) -> Result<String, StoreError> {
        let id = self.ids.next();
        let session = Session {
            repo: repo.clone(),
            content: AsyncMutex::new(Some(store.incoming()?)),
        };
        self.sessions.lock().insert(id.clone(), Arc::new(session));
        Ok(id)
    }

    pub(crate) fn find(&self, repo: &RepoName, id: &str) -> Option<Arc<Session>> {
        let session = self.sessions.lock().get(id).cloned()?;
        (session.repo == *repo).then_some(session)
    }

    pub(crate) fn end(&self, id: &str) -> bool {
        self.sessions.lock().remove(id).is_some()
    }
}

/// Makes identifiers nobody guesses by accident. They guard nothing worth more than a test.
#[derive(Debug, Default)]
pub(crate) struct Ids {
    seed: RandomState,
    count: AtomicU64,
}

impl Ids {
    pub(crate) fn next(&self) -> String {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        format!(
            "{:016x}{:016x}",
            self.seed.hash_one(n),
            self.seed.hash_one((n, "second half"))
        )
    }
}
