//! Which nodes are in use, and their sources.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock},
};

use parking_lot::RwLock;
use storage::source::{BlobSource, SourceError};
use tokio::sync::Mutex;

use super::Nodes;

/// Inode numbers start here; the numbers below are for BlobFs itself.
const FIRST_INO: u64 = 256;

/// The inode number of a node.
pub(super) fn ino(number: u64) -> Option<u64> {
    number.checked_add(FIRST_INO)
}

/// The node of an inode number.
pub(super) fn number(ino: u64) -> Option<u64> {
    ino.checked_sub(FIRST_INO)
}

/// Nodes in use. Reads go through it at every request, so looking up takes a shared lock only.
pub(super) struct NodeTable {
    nodes: Arc<dyn Nodes>,
    used: RwLock<HashMap<u64, Used>>,
}

struct Used {
    node: Arc<Node>,
    handles: usize,
}

/// A node and, once opened, its source.
struct Node {
    source: OnceLock<Arc<dyn BlobSource>>,
    opening: Mutex<()>,
}

impl fmt::Debug for NodeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeTable")
            .field("used", &self.used.read().len())
            .finish_non_exhaustive()
    }
}

impl NodeTable {
    pub(super) fn new(nodes: Arc<dyn Nodes>) -> Self {
        Self {
            nodes,
            used: RwLock::default(),
        }
    }

    /// The source, if it is open already.
    pub(super) fn source(&self, number: u64) -> Option<Arc<dyn BlobSource>> {
        self.used.read().get(&number)?.node.source.get().cloned()
    }

    /// The source, opened if need be; one opening at a time.
    pub(super) async fn open(&self, number: u64) -> Result<Arc<dyn BlobSource>, SourceError> {
        let node = self.node(number);
        if let Some(source) = node.source.get() {
            return Ok(Arc::clone(source));
        }
        let _opening = node.opening.lock().await;
        if let Some(source) = node.source.get() {
            return Ok(Arc::clone(source));
        }
        let source = self.nodes.open(number).await?;
        Ok(Arc::clone(node.source.get_or_init(|| source)))
    }

    /// Its length in bytes.
    pub(super) fn size(&self, number: u64) -> Option<u64> {
        self.nodes
            .size(number)
            .or_else(|| self.source(number).map(|source| source.len()))
    }

    pub(super) fn add_handle(&self, number: u64) {
        let mut used = self.used.write();
        used.entry(number).or_insert_with(Used::new).handles += 1;
    }

    /// Gives a handle back; the last one closes the node.
    pub(super) fn drop_handle(&self, number: u64) {
        let mut used = self.used.write();
        let Some(entry) = used.get_mut(&number) else {
            return;
        };
        entry.handles = entry.handles.saturating_sub(1);
        if entry.handles == 0 {
            used.remove(&number);
            drop(used);
            self.nodes.closed(number);
        }
    }

    /// Nodes in use, in order.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<_> = self.used.read().keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    fn node(&self, number: u64) -> Arc<Node> {
        if let Some(used) = self.used.read().get(&number) {
            return Arc::clone(&used.node);
        }
        let mut used = self.used.write();
        Arc::clone(&used.entry(number).or_insert_with(Used::new).node)
    }
}

impl Used {
    fn new() -> Self {
        Self {
            node: Arc::new(Node {
                source: OnceLock::new(),
                opening: Mutex::new(()),
            }),
            handles: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_inode_numbers_are_one_to_one() {
        for n in [0, 1, 77, u64::MAX - FIRST_INO] {
            assert_eq!(number(ino(n).unwrap()), Some(n));
        }
        assert_eq!(ino(u64::MAX), None);
        assert_eq!(number(1), None, "the root is no node");
    }
}
