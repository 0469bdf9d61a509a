//! Which remote ranges to ask for when readers need certain ones.
//!
//! A request costs a round trip, so what follows is taken along: from the grid point before what is
//! needed, as much as the link moves in about one more round trip. What is needed comes first, or
//! nearly. Ranges with a small gap between them become one. The grid is the same on every node, so
//! that a mirror's cache hits.

use std::ops::Range;

use super::wire::align_down;

/// How requests are shaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Requests begin and end at multiples of this.
    pub grid_bytes: u64,
    /// How much to ask for at least; `None`: what the link moves in a round trip.
    pub window_bytes: Option<u64>,
    /// Ranges with a gap up to this become one request.
    pub gap_bytes: u64,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            grid_bytes: 64 << 10,
            window_bytes: None,
            gap_bytes: 64 << 10,
        }
    }
}

impl PlanOptions {
    /// The window on a link that moves `bandwidth_delay` bytes in a round trip (0: not known yet).
    pub(crate) fn window(&self, bandwidth_delay: u64) -> u64 {
        self.window_bytes.unwrap_or(match bandwidth_delay {
            0 => 256 << 10,
            known => (known + known / 4).clamp(128 << 10, 512 << 10),
        })
    }
}

/// The ranges to ask for, in order and disjoint. `needed` is sorted by start.
pub(crate) fn plan(
    needed: &[Range<u64>],
    blob_len: u64,
    options: &PlanOptions,
    window: u64,
) -> Vec<Range<u64>> {
    let grid = options.grid_bytes.max(1);
    let mut planned: Vec<Range<u64>> = Vec::new();
    for need in needed {
        let start = align_down(need.start, grid);
        let end = need
            .end
            .max(start.saturating_add(window))
            .checked_next_multiple_of(grid)
            .map_or(blob_len, |end| end.min(blob_len));
        match planned.last_mut() {
            Some(last) if start <= last.end.saturating_add(options.gap_bytes) => {
                last.end = last.end.max(end);
            }
            _ => planned.push(start..end),
        }
    }
    planned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const K: u64 = 1 << 10;

    #[test]
    fn widens_on_the_grid_and_merges_over_gaps() {
        let options = PlanOptions {
            grid_bytes: 64 * K,
            window_bytes: None,
            gap_bytes: 32 * K,
        };
        let needed = [
            70 * K..71 * K,
            120 * K..130 * K,
            300 * K..301 * K,
            990 * K..1000 * K,
        ];
        assert_eq!(
            plan(&needed, 1000 * K, &options, 0),
            [64 * K..192 * K, 256 * K..320 * K, 960 * K..1000 * K]
        );
        assert_eq!(
            plan(&needed[..3], 1000 * K, &options, 100 * K),
            [64 * K..192 * K, 256 * K..384 * K]
        );
    }

    proptest! {
        #[test]
        fn covers_every_need_once(
            starts in proptest::collection::vec(0_u64..10_000, 1..20),
            window in 0_u64..512,
            grid in 1_u64..100,
            gap in 0_u64..512,
        ) {
            let mut starts = starts;
            starts.sort_unstable();
            let needed: Vec<_> = starts.iter().map(|s| *s..s + 37).collect();
            let options = PlanOptions { grid_bytes: grid, gap_bytes: gap, window_bytes: None };
            let planned = plan(&needed, 10_037, &options, window);
            for need in &needed {
                prop_assert!(planned.iter().any(|p| p.start <= need.start && need.end <= p.end));
            }
            for pair in planned.windows(2) {
                prop_assert!(pair[0].end + gap < pair[1].start);
            }
        }
    }
}
