//! The least any system could need.

use std::time::Duration;

use lab::LinkModel;

/// Local start + 4 round trips + one slow start + the bytes the workload needs at the link's rate.
pub fn floor(link: &LinkModel, local_start: Duration, needed_bytes: u64) -> Duration {
    let bytes_per_second = link.rate_bits_per_s as f64 / 8.0;
    let bandwidth_delay = bytes_per_second * link.rtt.as_secs_f64();
    let first = f64::from(link.mss) * f64::from(link.initial_window);
    // Doubling from the initial window until a window fills the link.
    let rounds = (bandwidth_delay / first).log2().ceil().max(0.0);
    let sent_meanwhile = first * (2f64.powf(rounds) - 1.0);
    let slow_start = rounds * link.rtt.as_secs_f64() - sent_meanwhile / bytes_per_second;
    let transfer = needed_bytes as f64 / bytes_per_second;
    local_start + link.rtt * 4 + Duration::from_secs_f64(slow_start.max(0.0) + transfer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_grows_with_bytes_and_shrinks_with_rate() {
        let local = Duration::from_millis(200);
        let wan = floor(&LinkModel::wan(), local, 9_600_000);
        assert!(
            wan > Duration::from_millis(1100) && wan < Duration::from_millis(1500),
            "{wan:?}"
        );
        assert!(floor(&LinkModel::cloud(), local, 9_600_000) < wan);
        assert!(floor(&LinkModel::wan(), local, 20_000_000) > wan);
    }
}
