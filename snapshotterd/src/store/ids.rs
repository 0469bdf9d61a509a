//! Numeric ids: handed out before a transaction, never twice.

use std::{collections::HashSet, ops::Range, sync::Arc};

use parking_lot::Mutex;

use super::SnapshotId;

/// Ids are reserved on disk in blocks, so that taking one is a memory operation and a crash only
/// loses the rest of a block.
#[derive(Debug)]
pub(super) struct Ids {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: Range<u64>,
    reserved: HashSet<SnapshotId>,
}

/// An id taken from [`Store::reserve_id`](super::Store::reserve_id). Hold it until the snapshot is
/// recorded or given up: while it lives, a concurrent clean-up leaves directories of that id alone.
#[derive(Debug)]
pub struct ReservedId {
    id: SnapshotId,
    ids: Arc<Ids>,
}

impl Ids {
    pub(super) fn new(block: Range<u64>) -> Self {
        Self {
            state: Mutex::new(State {
                free: block,
                reserved: HashSet::new(),
            }),
        }
    }

    pub(super) fn take(this: &Arc<Self>) -> Option<ReservedId> {
        let mut state = this.state.lock();
        let id = SnapshotId(state.free.next()?);
        state.reserved.insert(id);
        Some(ReservedId {
            id,
            ids: Arc::clone(this),
        })
    }

    /// Two callers may extend at once; the earlier block's rest is then lost, which is harmless.
    pub(super) fn extend(&self, block: Range<u64>) {
        let mut state = self.state.lock();
        if state.free.is_empty() {
            state.free = block;
        }
    }

    pub(super) fn reserved(&self) -> HashSet<SnapshotId> {
        self.state.lock().reserved.clone()
    }
}

impl ReservedId {
    /// The id.
    pub fn id(&self) -> SnapshotId {
        self.id
    }
}

impl Drop for ReservedId {
    fn drop(&mut self) {
        self.ids.state.lock().reserved.remove(&self.id);
    }
}
