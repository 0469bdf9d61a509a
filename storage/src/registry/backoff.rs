//! When to try again.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, header::RETRY_AFTER};

use super::dates::parse_http_date;

/// How often and how patiently transient failures are retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first one, without progress in between.
    pub retries: u32,
    /// Pause before the first retry; it doubles each time.
    pub first_pause: Duration,
    /// Longest pause.
    pub longest_pause: Duration,
    /// Longest `Retry-After` that is obeyed; a server that asks for more is asked again then.
    pub longest_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            retries: 6,
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(8),
            longest_retry_after: Duration::from_secs(60),
        }
    }
}

impl RetryPolicy {
    /// The pause before retry number `retry` (from 0): half of it fixed, half of it random, so
    /// that many clients do not come back together.
    pub(super) fn pause(&self, retry: u32) -> Duration {
        let factor = 1u32.checked_shl(retry).unwrap_or(u32::MAX);
        let pause = self.first_pause.saturating_mul(factor);
        let pause = pause.min(self.longest_pause);
        pause / 2 + jitter(pause / 2)
    }
}

/// A random duration up to `most`.
pub(super) fn jitter(most: Duration) -> Duration {
    // The keys of a RandomState are random; hashing nothing with them gives a random number.
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

/// `Retry-After`, in seconds or as a date.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        // Fractions are not allowed but seen. Negative and infinite ones do not convert.
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let at = UNIX_EPOCH + Duration::from_secs(parse_http_date(text)?);
    Some(at.duration_since(now).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(value: &str, now: u64) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, value.parse().unwrap());
        retry_after(&headers, UNIX_EPOCH + Duration::from_secs(now))
    }

    #[test]
    fn retry_after_in_both_forms() {
        assert_eq!(after("120", 0), Some(Duration::from_secs(120)));
        assert_eq!(after(" 0.5 ", 0), Some(Duration::from_millis(500)));
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(after(date, 784_111_770), Some(Duration::from_secs(7)));
        assert_eq!(after(date, 884_111_770), Some(Duration::ZERO));
        for bad in ["", "soon", "-1", "inf", "NaN", "1e400"] {
            assert_eq!(after(bad, 0), None, "{bad}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), UNIX_EPOCH), None);
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let policy = RetryPolicy::default();
        for retry in 0..200 {
            let pause = policy.pause(retry);
            let full = policy.first_pause.saturating_mul(1 << retry.min(20));
            let full = full.min(policy.longest_pause);
            assert!(pause >= full / 2 && pause <= full, "{retry}: {pause:?}");
        }
    }
}
