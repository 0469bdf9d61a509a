//! A fixed-size bitmap that many threads set and test without a lock.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// A `u64` as an index. All indexes here are bounded by the length of something in memory.
pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Bits that are set once and rarely cleared. Setting releases, testing acquires: whoever sees a
/// bit sees what was written before it was set.
#[derive(Debug)]
pub(crate) struct Bits {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl Bits {
    pub(crate) fn new(len: u64) -> Self {
        let words = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, len }
    }

    /// Bits as they lie on disk: little-endian words. Bits beyond `len` are dropped.
    pub(crate) fn from_words(len: u64, words: impl IntoIterator<Item = u64>) -> Self {
        let bits = Self::new(len);
        for (slot, word) in bits.words.iter().zip(words) {
            slot.store(word, Ordering::Relaxed);
        }
        let tail = len % 64;
        if tail != 0
            && let Some(last) = bits.words.last()
        {
            last.fetch_and((1 << tail) - 1, Ordering::Relaxed);
        }
        bits
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        self.words
            .get(index(bit / 64))
            .is_some_and(|word| word.load(Ordering::SeqCst) & (1 << (bit % 64)) != 0)
    }

    /// Sets one bit; whether it was set before.
    pub(crate) fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.words
            .get(index(bit / 64))
            .is_some_and(|word| word.fetch_or(mask, Ordering::SeqCst) & mask != 0)
    }

    /// Sets a range.
    pub(crate) fn set_range(&self, range: Range<u64>) {
        for (word, mask) in masks(range.start..range.end.min(self.len)) {
            self.words[word].fetch_or(mask, Ordering::SeqCst);
        }
    }

    /// Clears a range.
    pub(crate) fn clear_range(&self, range: Range<u64>) {
        for (word, mask) in masks(range.start..range.end.min(self.len)) {
            self.words[word].fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// Clears every bit that is not set in `words` as well.
    pub(crate) fn keep_only(&self, words: &[u64]) {
        for (number, slot) in self.words.iter().enumerate() {
            slot.fetch_and(words.get(number).copied().unwrap_or(0), Ordering::SeqCst);
        }
    }

    /// Whether every bit of the range is set. An empty range is.
    pub(crate) fn all(&self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        range.end <= self.len
            && masks(range)
                .all(|(word, mask)| self.words[word].load(Ordering::SeqCst) & mask == mask)
    }

    /// The first clear bit in the range.
    pub(crate) fn first_clear(&self, range: Range<u64>) -> Option<u64> {
        self.first(range, |word| !word)
    }

    /// The first set bit in the range.
    pub(crate) fn first_set(&self, range: Range<u64>) -> Option<u64> {
        self.first(range, |word| word)
    }

    /// The maximal runs of clear bits in the range, in order.
    pub(crate) fn clear_runs(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let end = range.end.min(self.len);
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = self.first_clear(at..end)?;
            let stop = self.first_set(start..end).unwrap_or(end);
            at = stop;
            Some(start..stop)
        })
    }

    pub(crate) fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    pub(crate) fn words(&self) -> impl Iterator<Item = u64> {
        self.words.iter().map(|word| word.load(Ordering::SeqCst))
    }

    fn first(&self, range: Range<u64>, view: impl Fn(u64) -> u64) -> Option<u64> {
        masks(range.start..range.end.min(self.len)).find_map(|(word, mask)| {
            let hits = view(self.words[word].load(Ordering::SeqCst)) & mask;
            (hits != 0).then(|| word as u64 * 64 + u64::from(hits.trailing_zeros()))
        })
    }
}

/// The words that a range touches, each with the mask of its bits in the range.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = if range.is_empty() {
        0..0
    } else {
        range.start / 64..range.end.div_ceil(64)
    };
    words.map(move |word| {
        let from = range.start.saturating_sub(word * 64);
        let to = (range.end - word * 64).min(64);
        let high = if to == 64 { u64::MAX } else { (1 << to) - 1 };
        (index(word), high & (u64::MAX << from))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_vec_of_bools(
            len in 1_u64..300,
            steps in proptest::collection::vec((any::<bool>(), 0_u64..300, 0_u64..300), 1..20),
        ) {
            let bits = Bits::new(len);
            let mut model = vec![false; index(len)];
            for (set, a, b) in steps {
                let range = a.min(b).min(len)..a.max(b).min(len);
                model[index(range.start)..index(range.end)].fill(set);
                if set { bits.set_range(range.clone()) } else { bits.clear_range(range.clone()) }
                let part = &model[index(range.start)..];
                prop_assert_eq!(bits.all(range.start..len), part.iter().all(|b| *b));
                let at = |i: usize| range.start + i as u64;
                prop_assert_eq!(
                    bits.first_clear(range.start..len),
                    part.iter().position(|b| !b).map(at)
                );
            }
            prop_assert_eq!(bits.count(), model.iter().filter(|b| **b).count() as u64);
            let mut cleared = vec![true; index(len)];
            for run in bits.clear_runs(0..len) {
                prop_assert!(!run.is_empty());
                cleared[index(run.start)..index(run.end)].fill(false);
            }
            prop_assert_eq!(&cleared, &model);
            let again = Bits::from_words(len, bits.words());
            prop_assert_eq!(again.words().collect::<Vec<_>>(), bits.words().collect::<Vec<_>>());
        }
    }

    #[test]
    fn foreign_tail_bits_are_dropped() {
        let bits = Bits::from_words(3, [u64::MAX]);
        assert_eq!(bits.count(), 3);
        assert!(!bits.all(0..4), "beyond the end nothing is set");
    }
}
