//! Every metric there is. Names end in their unit; counters in `_total`.

/// A metric family.
#[derive(Debug, PartialEq, Eq)]
pub struct Def {
    /// Its name.
    pub name: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// What is counted.
    pub unit: &'static str,
    /// Counter, gauge or histogram.
    pub shape: Shape,
    /// Whether name, labels and meaning are promised.
    pub stability: Stability,
    /// The labels, in the order of their values.
    pub labels: &'static [&'static str],
}

/// Counter, gauge or histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution of durations.
    Histogram,
}

/// Whether a metric is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Changed only with a major version.
    Stable,
    /// May change with any version.
    Experimental,
}

impl Shape {
    /// The word of the exposition format.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl Stability {
    /// The word in the documentation.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Experimental => "experimental",
        }
    }
}

/// How long requests of containerd took.
pub const RPC_DURATION_SECONDS: Def = Def {
    name: "snapshotterd_rpc_duration_seconds",
    help: "Time from receiving a request to its answer.",
    unit: "seconds",
    shape: Shape::Histogram,
    stability: Stability::Stable,
    labels: &["method"],
};

/// Requests that were answered with an error.
pub const RPC_ERRORS_TOTAL: Def = Def {
    name: "snapshotterd_rpc_errors_total",
    help: "Requests answered with an error, by gRPC code.",
    unit: "requests",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["method", "code"],
};

/// Requests being worked on.
pub const RPC_IN_FLIGHT: Def = Def {
    name: "snapshotterd_rpc_in_flight",
    help: "Requests being worked on, those past their deadline included.",
    unit: "requests",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &[],
};

/// Requests whose handler panicked.
pub const RPC_PANICS_TOTAL: Def = Def {
    name: "snapshotterd_rpc_panics_total",
    help: "Requests whose handler panicked: a bug, please report it.",
    unit: "requests",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["method"],
};

/// Snapshots in the store.
pub const SNAPSHOTS: Def = Def {
    name: "snapshotterd_snapshots",
    help: "Snapshots in the metadata store.",
    unit: "snapshots",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &["snapshotter", "kind"],
};

/// The size of the store.
pub const STORE_SIZE_BYTES: Def = Def {
    name: "snapshotterd_store_size_bytes",
    help: "Size of the metadata store's file.",
    unit: "bytes",
    shape: Shape::Gauge,
    stability: Stability::Experimental,
    labels: &[],
};

/// Every definition; `docs/METRICS.md` has the same rows.
pub const ALL: &[&Def] = &[
    &RPC_DURATION_SECONDS,
    &RPC_ERRORS_TOTAL,
    &RPC_IN_FLIGHT,
    &RPC_PANICS_TOTAL,
    &SNAPSHOTS,
    &STORE_SIZE_BYTES,
];
