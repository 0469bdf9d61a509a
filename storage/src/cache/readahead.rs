//! Notices readers that go through a blob in order, and says how far ahead to fetch for them.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// Readers told apart.
const STREAMS: usize = 4;
/// Requests of one reader arrive out of order by this much.
const SLACK: u64 = 512 << 10;
const WINDOW_MIN: u64 = 512 << 10;
const WINDOW_MAX: u64 = 8 << 20;
const OFF: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Decoded offset where the next read is expected.
    next: u64,
    /// Reads in order so far.
    hits: u32,
    /// Remote bytes to keep ahead.
    window: u64,
    /// Remote offset up to which was asked.
    ahead: u64,
    /// The same as a decoded offset.
    ahead_decoded: u64,
    last_used: u64,
}

/// The streams of one blob.
#[derive(Debug)]
pub(crate) struct Readahead {
    streams: Mutex<([Stream; STREAMS], u64)>,
    /// Decoded offsets at which a reader should be looked at again.
    markers: [AtomicU64; STREAMS],
}

/// What to fetch ahead of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) stream: usize,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Default for Readahead {
    fn default() -> Self {
        Self {
            streams: Mutex::default(),
            markers: [const { AtomicU64::new(OFF) }; STREAMS],
        }
    }
}

impl Readahead {
    /// The stream whose marker a read that was served locally has reached. Lock-free; once.
    pub(crate) fn passed(&self, start: u64, end: u64) -> Option<usize> {
        self.markers.iter().position(|marker| {
            let at = marker.load(Ordering::Relaxed);
            at != OFF
                && at < end
                && start < at.saturating_add(SLACK)
                && marker
                    .compare_exchange(at, OFF, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
        })
    }

    /// Notes a read of decoded bytes `start..end` whose last remote byte is before `remote_end`,
    /// by the reader of `stream` or by one to be found out. Says what should be fetched ahead of
    /// it, at least `least` bytes, if it belongs to a reader in order.
    pub(crate) fn note(
        &self,
        stream: Option<usize>,
        start: u64,
        end: u64,
        remote_end: u64,
        least: u64,
    ) -> Option<Ahead> {
        let mut guard = self.streams.lock();
        let (streams, clock) = &mut *guard;
        *clock += 1;
        // Reads served locally are not noted, so a reader may turn up anywhere in what was
        // fetched ahead for it.
        let belongs = |s: &Stream| {
            s.last_used != 0
                && start <= s.next.max(s.ahead_decoded).saturating_add(SLACK)
                && s.next <= end.saturating_add(SLACK)
        };
        let Some(index) = stream.or_else(|| streams.iter().position(belongs)) else {
            let oldest = (0..STREAMS).min_by_key(|i| streams[*i].last_used)?;
            streams[oldest] = Stream {
                next: end,
                last_used: *clock,
                ..Stream::default()
            };
            self.markers[oldest].store(OFF, Ordering::Release);
            return None;
        };
        let stream = streams.get_mut(index)?;
        stream.last_used = *clock;
        if end <= stream.next {
            return None;
        }
        stream.next = end;
        stream.hits += 1;
        if stream.hits < 2 {
            return None;
        }
        let from = stream.ahead.max(remote_end);
        if stream.window != 0 && from - remote_end > stream.window / 2 {
            return None;
        }
        let least = least.clamp(WINDOW_MIN, WINDOW_MAX);
        stream.window = (stream.window * 2).clamp(least, WINDOW_MAX);
        let to = remote_end.saturating_add(stream.window);
        if to <= from {
            return None;
        }
        stream.ahead = to;
        Some(Ahead {
            stream: index,
            from,
            to,
        })
    }

    /// Sets the decoded offsets at which the reader should be looked at again, and up to which it
    /// was fetched ahead for.
    pub(crate) fn mark(&self, stream: usize, marker: u64, ahead: u64) {
        if let Some(s) = self.streams.lock().0.get_mut(stream) {
            s.ahead_decoded = ahead;
        }
        if let Some(slot) = self.markers.get(stream) {
            slot.store(marker, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    #[test]
    fn grows_for_a_reader_in_order_and_not_for_a_random_one() {
        let ahead = Readahead::default();
        let mut asked = 0;
        for i in 0..100 {
            let (start, end) = (i * 128 * K, (i + 1) * 128 * K);
            if let Some(next) = ahead.note(None, start, end, end / 2, 0) {
                assert!(next.from >= asked, "nothing is asked for twice");
                assert!(next.to > next.from);
                asked = next.to;
            }
        }
        assert!(asked >= 100 * 64 * K + 4 * 1024 * K, "{asked}");

        let ahead = Readahead::default();
        for i in [5_u64, 900, 17, 300, 44, 2000, 120, 1500] {
            let start = i * 1024 * K;
            assert_eq!(ahead.note(None, start, start + 4 * K, start / 2, 0), None);
        }
    }

    #[test]
    fn a_marker_fires_once() {
        let ahead = Readahead::default();
        ahead.mark(1, 1000 * K, 2000 * K);
        assert_eq!(ahead.passed(0, 999 * K), None);
        assert_eq!(ahead.passed(5000 * K, 5001 * K), None, "another reader");
        assert_eq!(ahead.passed(990 * K, 1010 * K), Some(1));
        assert_eq!(ahead.passed(990 * K, 1010 * K), None);
    }
}
