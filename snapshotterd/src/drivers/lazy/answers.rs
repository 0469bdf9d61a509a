//! Which snapshot an extraction Prepare was answered with.
//!
//! containerd is told only that the layer exists; it then lists the snapshots that carry the
//! chain ID and takes the first with the right parent. When two identities claim the same chain
//! ID, in one namespace after another or in two at once, the first must be the one that this
//! caller was answered with.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

use crate::{drivers::CreateRequest, resolve::labels::SNAPSHOT_REF, store::Info};

/// Answers remembered: far more than Prepares between an answer and its List.
const REMEMBERED: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    namespace: String,
    chain: String,
    parent: String,
}

#[derive(Debug, Default)]
struct Memory {
    names: HashMap<Asked, String>,
    order: VecDeque<Asked>,
}

/// The latest answer per namespace, chain ID and parent.
#[derive(Debug, Default)]
pub(super) struct Answers {
    memory: Mutex<Memory>,
}

impl Answers {
    /// Remembers that `request` was answered with snapshot `name`.
    pub(super) fn note(&self, request: &CreateRequest, chain: &str, name: &str) {
        let asked = Asked {
            namespace: request.namespace.clone().unwrap_or_default(),
            chain: chain.to_owned(),
            parent: request.parent.as_deref().unwrap_or_default().to_owned(),
        };
        let mut memory = self.memory.lock();
        if memory
            .names
            .insert(asked.clone(), name.to_owned())
            .is_none()
        {
            memory.order.push_back(asked);
            if memory.order.len() > REMEMBERED
                && let Some(oldest) = memory.order.pop_front()
            {
                memory.names.remove(&oldest);
            }
        }
    }

    /// Puts what this namespace was answered with first; keeps the order of the rest.
    pub(super) fn order(&self, namespace: Option<&str>, infos: &mut [Info]) {
        if infos.len() < 2 {
            return;
        }
        let memory = self.memory.lock();
        infos.sort_by_key(|info| {
            let Some(chain) = info.labels.get(SNAPSHOT_REF) else {
                return 1;
            };
            let asked = Asked {
                namespace: namespace.unwrap_or_default().to_owned(),
                chain: chain.clone(),
                parent: info.parent.clone().unwrap_or_default(),
            };
            let answered = memory
                .names
                .get(&asked)
                .is_some_and(|name| *name == info.name);
            u8::from(!answered)
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::store::{Kind, Labels, SnapshotKey, now};

    use super::*;

    fn request(namespace: &str) -> CreateRequest {
        CreateRequest {
            key: SnapshotKey::new("lazy", "k"),
            kind: Kind::Active,
            parent: None,
            labels: Labels::new(),
            namespace: Some(namespace.to_owned()),
        }
    }

    fn info(name: &str) -> Info {
        Info {
            name: name.to_owned(),
            parent: None,
            kind: Kind::Committed,
            created: now(),
            updated: now(),
            labels: Labels::from([(SNAPSHOT_REF.to_owned(), "chain".to_owned())]),
        }
    }

    #[test]
    fn each_namespace_finds_its_own_answer_first() {
        let answers = Answers::default();
        answers.note(&request("a"), "chain", "chain");
        answers.note(&request("b"), "chain", "chain+7");
        let first = |namespace: Option<&str>| {
            let mut infos = vec![info("chain"), info("chain+7")];
            answers.order(namespace, &mut infos);
            infos.swap_remove(0).name
        };
        assert_eq!(first(Some("a")), "chain");
        assert_eq!(first(Some("b")), "chain+7");
        assert_eq!(first(Some("c")), "chain");
        answers.note(&request("a"), "chain", "chain+7");
        assert_eq!(first(Some("a")), "chain+7");
    }

    #[test]
    fn memory_is_bounded() {
        let answers = Answers::default();
        for n in 0..REMEMBERED + 10 {
            answers.note(&request("a"), &n.to_string(), "x");
        }
        let memory = answers.memory.lock();
        assert_eq!(memory.names.len(), REMEMBERED);
        assert_eq!(memory.order.len(), REMEMBERED);
    }
}
