//! The order in which readers first touched chunks: what a start needs, for optimising an image.

use parking_lot::Mutex;

use super::bits::Bits;

/// Chunks remembered at most.
const KEPT: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Touched {
    seen: Bits,
    order: Mutex<Vec<u32>>,
}

impl Touched {
    pub(crate) fn new(chunks: u64) -> Self {
        Self {
            seen: Bits::new(chunks),
            order: Mutex::default(),
        }
    }

    pub(crate) fn note(&self, chunk: u32) {
        if self.seen.get(u64::from(chunk)) || self.seen.set(u64::from(chunk)) {
            return;
        }
        let mut order = self.order.lock();
        if order.len() < KEPT {
            order.push(chunk);
        }
    }

    pub(crate) fn list(&self) -> Vec<u32> {
        self.order.lock().clone()
    }
}
