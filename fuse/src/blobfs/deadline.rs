//! How long a read may wait. The kernel can be told (`fs.fuse.*_request_timeout`) to abort a whole
//! connection for one slow request; ours fail well before.

use std::{fs, time::Duration};

use crate::table::boottime_ns;

/// The time a request has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline {
    configured: Duration,
    /// Half of the kernel's request timeout, where one is set.
    kernel: Option<Duration>,
}

impl Deadline {
    pub(super) fn new(configured: Duration) -> Self {
        let seconds = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/fs/fuse/{name}")).ok()?;
            text.trim().parse::<u64>().ok().filter(|n| *n > 0)
        };
        let limits = [
            seconds("max_request_timeout"),
            seconds("default_request_timeout"),
        ];
        let kernel = limits
            .into_iter()
            .flatten()
            .min()
            .map(|n| Duration::from_secs(n) / 2);
        if let Some(kernel) = kernel
            && kernel < configured
        {
            tracing::warn!(?kernel, ?configured, "the kernel's request timeout rules");
        }
        Self { configured, kernel }
    }

    /// What is left for a request that was read at `started_ns`. A restart gives a request its
    /// whole time again; only the kernel's own clock goes on.
    pub(super) fn left(&self, started_ns: u64) -> Duration {
        let Some(kernel) = self.kernel else {
            return self.configured;
        };
        let age = Duration::from_nanos(boottime_ns().saturating_sub(started_ns));
        let left = kernel.saturating_sub(age).max(Duration::from_secs(1));
        left.min(self.configured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_clock_goes_on_over_a_restart() {
        let free = Deadline {
            configured: Duration::from_secs(60),
            kernel: None,
        };
        assert_eq!(free.left(0), Duration::from_secs(60));
        let bound = Deadline {
            kernel: Some(Duration::from_secs(30)),
            ..free
        };
        assert!(bound.left(boottime_ns()) > Duration::from_secs(29));
        let long_ago = boottime_ns().saturating_sub(25_000_000_000);
        assert!(bound.left(long_ago) <= Duration::from_secs(5));
        assert_eq!(bound.left(0), Duration::from_secs(1));
    }
}
