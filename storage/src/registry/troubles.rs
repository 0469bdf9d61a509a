//! What failed last with requests that are still being tried, for whoever gives up waiting first.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::error::{Object, RegistryError, Target};

/// Remembered at most.
const KEPT: usize = 64;
/// Older ones say nothing about now.
const LIFETIME: Duration = Duration::from_secs(60);

/// The last transient failure of each thing asked for lately.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    last: Mutex<VecDeque<Trouble>>,
}

#[derive(Debug)]
struct Trouble {
    repository: String,
    name: String,
    at: Instant,
    what: String,
}

impl Troubles {
    pub(super) fn note(&self, target: &Target, error: &RegistryError) {
        let Some(name) = name(&target.object) else {
            return;
        };
        let repository = target.repository.to_string();
        let mut last = self.last.lock();
        last.retain(|other| other.name != name || other.repository != repository);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(Trouble {
            repository,
            name,
            at: Instant::now(),
            what: error.brief(),
        });
    }

    pub(super) fn of(&self, repository: &str, name: &str) -> Option<String> {
        let last = self.last.lock();
        let found = last
            .iter()
            .find(|other| other.name == name && other.repository == repository)?;
        (found.at.elapsed() < LIFETIME).then(|| found.what.clone())
    }
}

fn name(object: &Object) -> Option<String> {
    match object {
        Object::Manifest(name) => Some(name.clone()),
        Object::Blob(digest) | Object::BlobRange(digest, _) => Some(digest.to_string()),
        Object::Upload(_) | Object::Token(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use formats::digest::Digest;

    use super::*;
    use crate::registry::reference::Repository;

    fn failure(digest: Digest, status: u16) -> (Target, RegistryError) {
        let target = Target {
            repository: Repository::new("r.example", "a/b").unwrap(),
            object: Object::BlobRange(digest, 0..9),
        };
        let error = RegistryError::Status {
            target: Arc::new(target.clone()),
            host: "r.example".into(),
            status,
            message: String::new(),
            retry_after: None,
        };
        (target, error)
    }

    #[test]
    fn the_latest_counts_and_few_are_kept() {
        let troubles = Troubles::default();
        let digest = Digest::of(b"1");
        for status in [500, 503] {
            let (target, error) = failure(digest, status);
            troubles.note(&target, &error);
        }
        let repository = failure(digest, 0).0.repository.to_string();
        let told = troubles.of(&repository, &digest.to_string()).unwrap();
        assert!(told.contains("503") && !told.contains("sha256"), "{told}");
        assert_eq!(troubles.of("r.example/c", &digest.to_string()), None);
        for n in 0..100_u32 {
            let (target, error) = failure(Digest::of(&n.to_le_bytes()), 500);
            troubles.note(&target, &error);
        }
        assert_eq!(troubles.last.lock().len(), KEPT);
        assert_eq!(troubles.of(&repository, &digest.to_string()), None);
    }
}
