//! The order in which readers first touched chunks: what a start needs, for optimising an image.

use std::ops::Range;

use formats::blobmap::BlobMap;
use parking_lot::Mutex;

use super::{
    bits::Bits,
    layer::{PAGE, pages_of},
};

/// Chunks remembered at most.
const KEPT: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Touched {
    /// Decoded pages that were read: most reads are over with one look at it.
    pages: Bits,
    chunks: Bits,
    order: Mutex<Vec<u32>>,
}

impl Touched {
    pub(crate) fn new(map: &BlobMap) -> Self {
        Self {
            pages: Bits::new(map.decoded_len().div_ceil(PAGE)),
            chunks: Bits::new(map.chunks().len() as u64),
            order: Mutex::default(),
        }
    }

    pub(crate) fn note(&self, map: &BlobMap, range: &Range<u64>) {
        let pages = pages_of(range);
        if self.pages.all(pages.clone()) {
            return;
        }
        self.pages.set_range(pages);
        for chunk in map.overlapping(range.clone()) {
            if self.chunks.set(chunk as u64) {
                continue;
            }
            let mut order = self.order.lock();
            if order.len() < KEPT {
                // Chunk numbers fit: BlobMap::new checked it.
                order.push(u32::try_from(chunk).unwrap_or(u32::MAX));
            }
        }
    }

    pub(crate) fn list(&self) -> Vec<u32> {
        self.order.lock().clone()
    }
}
