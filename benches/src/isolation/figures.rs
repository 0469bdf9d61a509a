//! Percentiles, and what a process holds.

use std::{fmt, fs, io};

use serde::Serialize;

use crate::node::status_bytes;

/// Latencies of one kind of read in seconds, by round.
#[derive(Debug, Default)]
pub(super) struct Samples {
    first: Vec<Vec<f64>>,
    beside: Vec<Vec<f64>>,
    second: Vec<Vec<f64>>,
}

/// One kind of read.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which kind.
    pub reads: &'static str,
    /// How many were timed alone, and beside the stuck ones.
    pub samples: (usize, usize),
    /// Median in seconds, alone and beside the stuck ones. This and the next: the median over the
    /// measurements, so that a burst of foreign work spoils one of them, not the figure.
    pub p50: (f64, f64),
    /// 99th percentile, the same.
    pub p99: (f64, f64),
    /// The smallest 99th percentile of one measurement, the same.
    pub quietest_p99: (f64, f64),
    /// The second 99th percentile over the first.
    pub ratio: f64,
    /// 99th percentile alone after the stuck reads over the one before them: what the noise of the
    /// machine does to the ratio.
    pub noise: f64,
    /// What the ratio may be.
    pub target: f64,
}

impl Row {
    /// Whether the target is met.
    pub fn met(&self) -> bool {
        self.ratio <= self.target
    }
}

impl Samples {
    pub(super) fn push(&mut self, first: Vec<f64>, beside: Vec<f64>, second: Vec<f64>) {
        self.first.push(first);
        self.beside.push(beside);
        self.second.push(second);
    }

    pub(super) fn row(&self, reads: &'static str, target: f64) -> Row {
        let alone: Vec<&Vec<f64>> = self.first.iter().chain(&self.second).collect();
        let beside: Vec<&Vec<f64>> = self.beside.iter().collect();
        let count = |of: &[&Vec<f64>]| of.iter().map(|one| one.len()).sum();
        let typical = |of: &[&Vec<f64>], percent| {
            let each: Vec<f64> = of.iter().map(|one| percentile(one, percent)).collect();
            percentile(&each, 50)
        };
        let least = |of: &[&Vec<f64>]| {
            let each = of.iter().map(|one| percentile(one, 99));
            each.fold(f64::INFINITY, f64::min)
        };
        let p99 = (typical(&alone, 99), typical(&beside, 99));
        let [first, second] = [&self.first, &self.second].map(|of| {
            let each: Vec<&Vec<f64>> = of.iter().collect();
            typical(&each, 99)
        });
        Row {
            reads,
            samples: (count(&alone), count(&beside)),
            p50: (typical(&alone, 50), typical(&beside, 50)),
            p99,
            quietest_p99: (least(&alone), least(&beside)),
            ratio: p99.1 / p99.0,
            noise: second / first,
            target,
        }
    }
}

/// The smallest value that at least `percent` of the values do not exceed.
pub(super) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Held {
    /// Threads.
    pub threads: u64,
    /// Anonymous memory in bytes.
    pub anonymous_bytes: u64,
    /// Open descriptors that are no connections to the two registries.
    pub descriptors: u64,
    /// Connections to the registry that stalls.
    pub stalling_connections: u64,
    /// Connections to the other one.
    pub answering_connections: u64,
}

impl Held {
    /// Of process `pid`, the only client of the registries on these ports of loopback.
    pub(super) fn of(pid: u32, stalling: u16, answering: u16) -> io::Result<Self> {
        let table = fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
        let (a, b) = (
            connections(&table, stalling),
            connections(&table, answering),
        );
        let all = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        Ok(Self {
            threads: fs::read_dir(format!("/proc/{pid}/task"))?.count() as u64,
            anonymous_bytes: status_bytes(pid, "RssAnon"),
            descriptors: all.saturating_sub(a + b),
            stalling_connections: a,
            answering_connections: b,
        })
    }

    /// The larger of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            threads: self.threads.max(other.threads),
            anonymous_bytes: self.anonymous_bytes.max(other.anonymous_bytes),
            descriptors: self.descriptors.max(other.descriptors),
            stalling_connections: self.stalling_connections.max(other.stalling_connections),
            answering_connections: self.answering_connections.max(other.answering_connections),
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} threads, {:.1} MB anonymous, {} descriptors, connections: {} stalled registry, {} other",
            self.threads,
            self.anonymous_bytes as f64 / 1e6,
            self.descriptors,
            self.stalling_connections,
            self.answering_connections
        )
    }
}

/// Open connections to a port, in a table of the kernel (`/proc/PID/net/tcp`).
fn connections(table: &str, port: u16) -> u64 {
    const ESTABLISHED: &str = "01";
    let remote = format!(":{port:04X}");
    let lines = table.lines().filter(|line| {
        let mut words = line.split_whitespace().skip(2);
        words.next().is_some_and(|peer| peer.ends_with(&remote))
            && words.next() == Some(ESTABLISHED)
    });
    lines.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert!((percentile(&values, 50) - 100.0).abs() < 1e-9);
        assert!((percentile(&values, 99) - 198.0).abs() < 1e-9);
        assert!(percentile(&[], 99).is_nan());
    }

    #[test]
    fn slow_reads_beside_the_stuck_ones_miss_the_target() {
        let mut samples = Samples::default();
        samples.push(vec![1.0; 100], vec![1.1; 100], vec![1.0; 100]);
        assert!(samples.row("local", 1.2).met());
        // A burst in one measurement changes nothing, one in most of them does.
        samples.push(vec![1.0; 100], vec![1.1; 100], vec![1.0; 100]);
        samples.push(vec![1.0; 100], vec![9.0; 100], vec![5.0; 100]);
        assert!(samples.row("local", 1.2).met());
        samples.push(vec![1.0; 100], vec![3.0; 100], vec![1.0; 100]);
        samples.push(vec![1.0; 100], vec![3.0; 100], vec![1.0; 100]);
        let row = samples.row("local", 1.2);
        assert!(!row.met());
        assert!((row.ratio - 3.0).abs() < 1e-9 && (row.noise - 1.0).abs() < 1e-9);
        assert!((row.quietest_p99.1 - 1.1).abs() < 1e-9);
    }

    #[test]
    fn only_the_clients_end_of_an_open_connection_counts() {
        let table = "  sl  local_address rem_address   st\n\
             0: 0100007F:1F90 0100007F:C001 01 \n\
             1: 0100007F:C001 0100007F:1F90 01 \n\
             2: 0100007F:C002 0100007F:1F90 06 \n";
        assert_eq!(connections(table, 0x1f90), 1);
    }
}
