//! One TOML file, and defaults so that none is needed.
//!
//! Precedence: defaults, then the file, then flags. Unknown keys are errors. `snapshotterd config
//! dump` prints the result, `docs/config.md` explains every key (a test compares it with these
//! structs).

mod drivers;
mod error;
mod units;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use self::{
    drivers::{Cache, Containerd, Hydration, Lazy, Overlayfs, Registry, TrustPolicy},
    error::ConfigError,
    units::{ByteSize, HumanDuration},
};

/// Where the file is looked for when no flag names one.
pub const DEFAULT_PATH: &str = "/etc/snapshotterd/config.toml";

/// The effective configuration.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Persistent data: metadata store, unpacked layers, caches.
    pub root: PathBuf,
    /// Sockets, locks and mount points: gone after a reboot.
    pub state: PathBuf,
    /// A short directory for the lower directories of overlays, all of which have to fit into
    /// 4 KiB of mount options. Below /run; one per daemon.
    pub lowers: PathBuf,
    /// The gRPC socket that containerd's `proxy_plugins` entry names. Empty:
    /// `snapshotterd.sock` in the state directory.
    pub address: PathBuf,
    /// The driver of plugin names that have no entry under `snapshotters`; `none` refuses them.
    pub default_driver: DefaultDriver,
    /// How long a request may take before it is answered with an error.
    pub rpc_timeout: HumanDuration,
    /// Per plugin name.
    pub snapshotters: BTreeMap<String, Snapshotter>,
    /// Logging.
    pub log: Log,
    /// Metrics.
    pub metrics: Metrics,
    /// The host's containerd, as a client.
    pub containerd: Containerd,
    /// Registries.
    pub registry: Registry,
    /// Caches of remote layers.
    pub cache: Cache,
    /// The lazy driver.
    pub lazy: Lazy,
    /// The overlayfs driver.
    pub overlayfs: Overlayfs,
}

/// One plugin name.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshotter {
    /// Which driver keeps its snapshots. Changing it does not convert existing ones.
    pub driver: DriverKind,
}

/// The drivers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverKind {
    /// Layers are served before they are downloaded.
    Lazy,
    /// Layers are unpacked by containerd.
    Overlayfs,
}

/// What happens with plugin names that are not configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DefaultDriver {
    /// The lazy driver serves them.
    Lazy,
    /// The overlayfs driver serves them.
    Overlayfs,
    /// They are refused.
    None,
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as
    /// `info,snapshotterd::store=debug`.
    pub level: String,
    /// The format of the lines on standard error.
    pub format: LogFormat,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Metrics.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Where to serve `GET /metrics`: `IP:PORT` or `unix:/path`. Empty: only on the admin socket.
    pub address: String,
}

/// What flags change.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--lowers`
    pub lowers: Option<PathBuf>,
    /// `--address`
    pub address: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/snapshotterd".into(),
            state: "/run/snapshotterd".into(),
            lowers: "/run/sd/l".into(),
            address: PathBuf::new(),
            default_driver: DefaultDriver::Lazy,
            rpc_timeout: HumanDuration(Duration::from_secs(10)),
            snapshotters: BTreeMap::new(),
            log: Log::default(),
            metrics: Metrics::default(),
            containerd: Containerd::default(),
            registry: Registry::default(),
            cache: Cache::default(),
            lazy: Lazy::default(),
            overlayfs: Overlayfs::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl Config {
    /// Reads the file at `path`, or at [`DEFAULT_PATH`] if there is one, and applies flags.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, overrides).map_err(|error| error.in_file(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {
                Self::parse("", overrides)
            }
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Parses a file's text and applies flags.
    pub fn parse(text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut config: Self =
            toml::from_str(text).map_err(|error| ConfigError::syntax(text, &error))?;
        let Overrides {
            root,
            state,
            lowers,
            address,
            log_level,
        } = overrides.clone();
        let set = |field: &mut PathBuf, value: Option<PathBuf>| {
            if let Some(value) = value {
                *field = value;
            }
        };
        set(&mut config.root, root);
        set(&mut config.state, state);
        set(&mut config.lowers, lowers);
        set(&mut config.address, address);
        if let Some(level) = log_level {
            config.log.level = level;
        }
        if config.address.as_os_str().is_empty() {
            config.address = config.state.join("snapshotterd.sock");
        }
        config
            .validate()
            .map_err(|(key, problem)| ConfigError::invalid(text, key, problem))?;
        Ok(config)
    }

    /// The effective configuration as a file.
    pub fn dump(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|error| ConfigError::Dump(error.to_string()))
    }

    /// The driver behind a plugin name.
    pub fn driver_of(&self, snapshotter: &str) -> Option<DriverKind> {
        match self.snapshotters.get(snapshotter) {
            Some(entry) => Some(entry.driver),
            None => self.default_driver.kind(),
        }
    }

    /// Every driver that some plugin name can select.
    pub fn drivers(&self) -> BTreeSet<DriverKind> {
        self.snapshotters
            .values()
            .map(|entry| entry.driver)
            .chain(self.default_driver.kind())
            .collect()
    }

    /// The metadata store's file.
    pub fn store_path(&self) -> PathBuf {
        self.root.join("metadata.redb")
    }

    /// The admin API's socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.state.join("admin.sock")
    }

    fn validate(&self) -> Result<(), (&'static str, String)> {
        for (key, path) in [
            ("root", &self.root),
            ("state", &self.state),
            ("lowers", &self.lowers),
            ("address", &self.address),
        ] {
            validate_path(path).map_err(|problem| (key, problem))?;
        }
        if self.address.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err((
                "address",
                format!("a socket path has at most {SOCKET_PATH_LIMIT} bytes"),
            ));
        }
        if self.admin_socket().as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err((
                "state",
                format!("too long for the admin socket ({SOCKET_PATH_LIMIT} bytes with its name)"),
            ));
        }
        if self.lowers.as_os_str().len() > LOWERS_LIMIT {
            return Err((
                "lowers",
                format!(
                    "at most {LOWERS_LIMIT} bytes, so that 128 layers fit into the 4 KiB of one \
                     mount call"
                ),
            ));
        }
        let timeout = self.rpc_timeout.0;
        if timeout < Duration::from_secs(1) || timeout > Duration::from_secs(60) {
            return Err(("rpc_timeout", "allowed are 1s to 60s".to_owned()));
        }
        if self.snapshotters.keys().any(String::is_empty) {
            return Err(("snapshotters", "a plugin name is empty".to_owned()));
        }
        crate::logging::check(&self.log.level).map_err(|problem| ("log.level", problem))?;
        crate::metrics::Address::parse(&self.metrics.address)
            .map_err(|problem| ("metrics.address", problem))?;
        self.containerd.validate()?;
        self.registry.validate()?;
        self.lazy.validate(timeout)?;
        self.overlayfs.validate()
    }
}

impl DefaultDriver {
    fn kind(self) -> Option<DriverKind> {
        match self {
            Self::Lazy => Some(DriverKind::Lazy),
            Self::Overlayfs => Some(DriverKind::Overlayfs),
            Self::None => None,
        }
    }
}

/// `sun_path` has 108 bytes with its NUL.
const SOCKET_PATH_LIMIT: usize = 107;
const LOWERS_LIMIT: usize = 20;

fn validate_path(path: &Path) -> Result<(), String> {
    let Some(text) = path.to_str() else {
        return Err("must be UTF-8".to_owned());
    };
    if !path.is_absolute() {
        return Err(format!("must be an absolute path, not {text:?}"));
    }
    // Overlay separates and escapes with these.
    if let Some(bad) = text
        .chars()
        .find(|c| matches!(c, ':' | ',' | '\\') || c.is_control())
    {
        return Err(format!("must not contain {bad:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
