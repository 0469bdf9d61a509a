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

/// Layers known on this node, by what is known of their content.
pub const LAZY_LAYERS: Def = Def {
    name: "snapshotterd_lazy_layers",
    help: "Layers known on this node, by what is known of their content.",
    unit: "layers",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &["verdict"],
};

/// Layer mounts.
pub const LAZY_MOUNTS: Def = Def {
    name: "snapshotterd_lazy_mounts",
    help: "Layer mounts.",
    unit: "mounts",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &[],
};

/// Layers that were announced and not answered lazily, by reason.
pub const LAZY_DECLINED_TOTAL: Def = Def {
    name: "snapshotterd_lazy_declined_total",
    help: "Layers that were announced and not answered lazily, by reason.",
    unit: "layers",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["reason"],
};

/// Ordered passes that ended, by verdict.
pub const LAZY_VERDICTS_TOTAL: Def = Def {
    name: "snapshotterd_lazy_verdicts_total",
    help: "Ordered passes that ended, by verdict.",
    unit: "layers",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["verdict"],
};

/// Bytes of layers received from registries, by cause.
pub const LAZY_FETCHED_BYTES_TOTAL: Def = Def {
    name: "snapshotterd_lazy_fetched_bytes_total",
    help: "Bytes of layers received from registries, by cause.",
    unit: "bytes",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["cause"],
};

/// Requests for bytes of layers, by cause.
pub const LAZY_REQUESTS_TOTAL: Def = Def {
    name: "snapshotterd_lazy_requests_total",
    help: "Requests for bytes of layers, by cause.",
    unit: "requests",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &["cause"],
};

/// Layers whose chunk map is in memory.
pub const LAZY_OPEN_CACHES: Def = Def {
    name: "snapshotterd_lazy_open_caches",
    help: "Layers whose chunk map is in memory.",
    unit: "layers",
    shape: Shape::Gauge,
    stability: Stability::Experimental,
    labels: &[],
};

/// Decoded bytes that are local, of the open caches.
pub const LAZY_LOCAL_BYTES: Def = Def {
    name: "snapshotterd_lazy_local_bytes",
    help: "Decoded bytes that are local, of the open caches.",
    unit: "bytes",
    shape: Shape::Gauge,
    stability: Stability::Experimental,
    labels: &[],
};

/// Reads that wait for bytes now.
pub const LAZY_WAITING_READERS: Def = Def {
    name: "snapshotterd_lazy_waiting_readers",
    help: "Reads that wait for bytes now.",
    unit: "reads",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &[],
};

/// Whether the caches' disk takes bytes.
pub const LAZY_DISK_FULL: Def = Def {
    name: "snapshotterd_lazy_disk_full",
    help: "1 while the disk of the caches takes no bytes: readers are served from memory, hydration waits.",
    unit: "boolean",
    shape: Shape::Gauge,
    stability: Stability::Stable,
    labels: &[],
};

/// Writes to caches that failed.
pub const LAZY_REFUSED_WRITES_TOTAL: Def = Def {
    name: "snapshotterd_lazy_refused_writes_total",
    help: "Writes to caches that failed, for want of space, inodes or a working disk.",
    unit: "writes",
    shape: Shape::Counter,
    stability: Stability::Experimental,
    labels: &[],
};

/// Bytes served without having been stored.
pub const LAZY_UNSTORED_BYTES_TOTAL: Def = Def {
    name: "snapshotterd_lazy_unstored_bytes_total",
    help: "Decoded bytes that were verified, could not be stored, and were served from memory.",
    unit: "bytes",
    shape: Shape::Counter,
    stability: Stability::Stable,
    labels: &[],
};

/// Bytes held because they could not be stored.
pub const LAZY_UNSTORED_HELD_BYTES: Def = Def {
    name: "snapshotterd_lazy_unstored_held_bytes",
    help: "Decoded bytes held in memory now because they could not be stored.",
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
    &LAZY_LAYERS,
    &LAZY_MOUNTS,
    &LAZY_DECLINED_TOTAL,
    &LAZY_VERDICTS_TOTAL,
    &LAZY_FETCHED_BYTES_TOTAL,
    &LAZY_REQUESTS_TOTAL,
    &LAZY_OPEN_CACHES,
    &LAZY_LOCAL_BYTES,
    &LAZY_WAITING_READERS,
    &LAZY_DISK_FULL,
    &LAZY_REFUSED_WRITES_TOTAL,
    &LAZY_UNSTORED_BYTES_TOTAL,
    &LAZY_UNSTORED_HELD_BYTES,
];
