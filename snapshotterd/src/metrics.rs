//! Metrics in Prometheus' text format.
//!
//! Every family is a const in [`defs`] with unit, labels and stability; `docs/METRICS.md` lists
//! them, and a test compares the two. Values that other parts already keep are read at scrape time
//! by a collector instead of being counted twice.

pub mod defs;
mod text;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

use self::defs::Def;

/// The registry; clones share it.
#[derive(Clone, Default)]
pub struct Metrics {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    families: Mutex<BTreeMap<&'static str, Family>>,
    collectors: Mutex<Vec<Collector>>,
}

type Collector = Arc<dyn Fn(&mut Scrape) + Send + Sync>;

struct Family {
    def: &'static Def,
    series: BTreeMap<Vec<String>, Value>,
}

#[derive(Clone)]
enum Value {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

/// A number that only grows.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

/// A number that goes up and down.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

/// How often something took how long.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<Buckets>);

#[derive(Debug, Default)]
struct Buckets {
    counts: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

/// Upper bounds of histogram buckets in microseconds: from a memory operation to the deadline.
const BOUNDS_US: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000,
];

/// What a collector adds its samples to.
#[derive(Debug, Default)]
pub struct Scrape {
    samples: Vec<(&'static Def, Vec<String>, f64)>,
}

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The present value.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Gauge {
    /// Adds `amount`, which may be negative.
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The present value.
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Histogram {
    /// Records one duration.
    pub fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// How many durations were recorded.
    pub fn count(&self) -> u64 {
        self.0
            .counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }
}

impl Scrape {
    /// Adds a sample of `def` with the values of its labels, in their order.
    pub fn sample(&mut self, def: &'static Def, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), def.labels.len(), "labels of {}", def.name);
        self.samples
            .push((def, labels.iter().map(ToString::to_string).collect(), value));
    }
}

impl Metrics {
    /// The counter of `def` with these label values.
    pub fn counter(&self, def: &'static Def, labels: &[&str]) -> Counter {
        match self.series(def, labels, || Value::Counter(Counter::default())) {
            Value::Counter(counter) => counter,
            // The const says otherwise: a slip in the program, seen as a metric that stays absent.
            _ => Counter::default(),
        }
    }

    /// The gauge of `def` with these label values.
    pub fn gauge(&self, def: &'static Def, labels: &[&str]) -> Gauge {
        match self.series(def, labels, || Value::Gauge(Gauge::default())) {
            Value::Gauge(gauge) => gauge,
            _ => Gauge::default(),
        }
    }

    /// The histogram of `def` with these label values.
    pub fn histogram(&self, def: &'static Def, labels: &[&str]) -> Histogram {
        match self.series(def, labels, || Value::Histogram(Histogram::default())) {
            Value::Histogram(histogram) => histogram,
            _ => Histogram::default(),
        }
    }

    /// Calls `collector` at every scrape. It must not block for long.
    pub fn collect(&self, collector: impl Fn(&mut Scrape) + Send + Sync + 'static) {
        self.inner.collectors.lock().push(Arc::new(collector));
    }

    /// The exposition.
    pub fn render(&self) -> String {
        let collectors: Vec<_> = self.inner.collectors.lock().clone();
        let mut scrape = Scrape::default();
        for collector in collectors {
            collector(&mut scrape);
        }
        text::render(&self.inner.families.lock(), scrape.samples)
    }

    fn series(&self, def: &'static Def, labels: &[&str], new: impl FnOnce() -> Value) -> Value {
        debug_assert_eq!(labels.len(), def.labels.len(), "labels of {}", def.name);
        debug_assert!(defs::ALL.contains(&def), "{} is not listed", def.name);
        let mut families = self.inner.families.lock();
        let family = families.entry(def.name).or_insert_with(|| Family {
            def,
            series: BTreeMap::new(),
        });
        family
            .series
            .entry(labels.iter().map(ToString::to_string).collect())
            .or_insert_with(new)
            .clone()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// Where metrics are served besides the admin socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Nowhere.
    Off,
    /// `IP:PORT`
    Tcp(SocketAddr),
    /// `unix:/path`
    Unix(PathBuf),
}

impl Address {
    /// Parses the configured address.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::Off);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(format!("{text:?} is not an absolute path"))
            };
        }
        text.parse()
            .map(Self::Tcp)
            .map_err(|_| format!("{text:?} is neither IP:PORT nor unix:/path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_what_was_counted() {
        let metrics = Metrics::default();
        metrics
            .counter(&defs::RPC_ERRORS_TOTAL, &["Prepare", "NotFound"])
            .add(3);
        metrics
            .histogram(&defs::RPC_DURATION_SECONDS, &["Prepare"])
            .observe(Duration::from_millis(3));
        metrics.gauge(&defs::RPC_IN_FLIGHT, &[]).add(2);
        metrics.collect(|scrape| scrape.sample(&defs::SNAPSHOTS, &["a\"b", "active"], 7.0));
        let text = metrics.render();
        for line in [
            "# TYPE snapshotterd_rpc_errors_total counter",
            "snapshotterd_rpc_errors_total{method=\"Prepare\",code=\"NotFound\"} 3",
            "snapshotterd_rpc_duration_seconds_bucket{method=\"Prepare\",le=\"0.0025\"} 0",
            "snapshotterd_rpc_duration_seconds_bucket{method=\"Prepare\",le=\"0.005\"} 1",
            "snapshotterd_rpc_duration_seconds_bucket{method=\"Prepare\",le=\"+Inf\"} 1",
            "snapshotterd_rpc_duration_seconds_sum{method=\"Prepare\"} 0.003",
            "snapshotterd_rpc_duration_seconds_count{method=\"Prepare\"} 1",
            "snapshotterd_rpc_in_flight 2",
            "snapshotterd_snapshots{snapshotter=\"a\\\"b\",kind=\"active\"} 7",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn every_metric_is_documented() -> std::io::Result<()> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/METRICS.md");
        let document = std::fs::read_to_string(path)?;
        for def in defs::ALL {
            let labels = if def.labels.is_empty() {
                "-".to_owned()
            } else {
                format!("`{}`", def.labels.join("`, `"))
            };
            let row = format!(
                "| `{}` | {} | {} | {} | {labels} | {} |",
                def.name,
                def.shape.name(),
                def.unit,
                def.stability.name(),
                def.help,
            );
            assert!(document.contains(&row), "docs/METRICS.md lacks\n{row}");
        }
        Ok(())
    }

    #[test]
    fn addresses() {
        assert_eq!(Address::parse(""), Ok(Address::Off));
        assert!(matches!(
            Address::parse("127.0.0.1:9100"),
            Ok(Address::Tcp(_))
        ));
        assert!(matches!(
            Address::parse("unix:/run/m.sock"),
            Ok(Address::Unix(_))
        ));
        assert!(Address::parse("unix:m.sock").is_err());
        assert!(Address::parse(":9100").is_err());
    }
}
