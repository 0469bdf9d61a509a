//! Settings of what stands behind the service: drivers, caches, registries, containerd.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{ByteSize, HumanDuration};

type Check = Result<(), (&'static str, String)>;

/// The host's containerd, asked about images, manifests and its version.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    /// Its gRPC socket. Empty: containerd is never asked.
    pub address: PathBuf,
}

/// Registries.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// A directory in containerd's `hosts.toml` layout. Empty: none.
    pub config_path: PathBuf,
    /// A docker `config.json` with credentials. Empty: `/root/.docker/config.json`.
    pub docker_config: PathBuf,
    /// Hosts (`host:port`) that are spoken to without TLS; loopback always is, as containerd
    /// does it.
    pub plain_http: Vec<String>,
}

/// Caches of remote layers.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// How long the cache of a layer that no snapshot uses is kept.
    pub keep_unreferenced: HumanDuration,
}

/// The lazy driver.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lazy {
    /// How long all layers of an image together may take to resolve before a Prepare is answered
    /// with a writable layer, which containerd then pulls. Less than `rpc_timeout`.
    pub resolve_timeout: HumanDuration,
    /// What is downloaded beyond what is read.
    pub hydration: Hydration,
    /// When a lazy layer may be used under a name that only its image vouches for.
    pub trust: TrustPolicy,
    /// An idle layer mount is unmounted after this time.
    pub unmount_after: HumanDuration,
    /// Largest start list of one layer that is prefetched.
    pub prefetch_limit: ByteSize,
}

/// What is downloaded beyond what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hydration {
    /// Every layer, until it is complete and proven.
    Full,
    /// As `full`, but only while nothing else wants the link.
    Idle,
    /// Nothing.
    Off,
}

/// When a lazy layer may be used under a name that only its image vouches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TrustPolicy {
    /// At once.
    Claimed,
    /// Only after its content has been hashed.
    Proven,
}

/// The overlayfs driver.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overlayfs {
    /// Further options of every overlay mount, such as `volatile`. `index=off` is added where the
    /// kernel knows it, unless `index` is set here.
    pub mount_options: Vec<String>,
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            address: "/run/containerd/containerd.sock".into(),
        }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d".into(),
            docker_config: PathBuf::new(),
            plain_http: Vec::new(),
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            keep_unreferenced: HumanDuration(Duration::from_secs(3600)),
        }
    }
}

impl Default for Lazy {
    fn default() -> Self {
        Self {
            resolve_timeout: HumanDuration(Duration::from_secs(8)),
            hydration: Hydration::Full,
            trust: TrustPolicy::Claimed,
            unmount_after: HumanDuration(Duration::from_secs(600)),
            prefetch_limit: ByteSize(256 << 20),
        }
    }
}

impl Containerd {
    pub(super) fn validate(&self) -> Check {
        absolute_or_empty("containerd.address", &self.address)
    }
}

impl Registry {
    pub(super) fn validate(&self) -> Check {
        absolute_or_empty("registry.config_path", &self.config_path)?;
        absolute_or_empty("registry.docker_config", &self.docker_config)?;
        match self
            .plain_http
            .iter()
            .find(|host| host.is_empty() || host.contains(['/', ' ']))
        {
            Some(host) => Err((
                "registry.plain_http",
                format!("{host:?} is not a host or host:port"),
            )),
            None => Ok(()),
        }
    }
}

impl Lazy {
    pub(super) fn validate(&self, rpc_timeout: Duration) -> Check {
        if self.resolve_timeout.0 >= rpc_timeout {
            return Err((
                "lazy.resolve_timeout",
                format!(
                    "must be shorter than rpc_timeout ({})",
                    HumanDuration(rpc_timeout)
                ),
            ));
        }
        Ok(())
    }
}

impl Overlayfs {
    pub(super) fn validate(&self) -> Check {
        const OURS: [&str; 3] = ["lowerdir", "upperdir", "workdir"];
        for option in &self.mount_options {
            let name = option.split('=').next().unwrap_or_default();
            if option.contains(',') || name.is_empty() || OURS.contains(&name.trim_end_matches('+'))
            {
                return Err((
                    "overlayfs.mount_options",
                    format!("{option:?} is not allowed here"),
                ));
            }
        }
        Ok(())
    }
}

fn absolute_or_empty(key: &'static str, path: &std::path::Path) -> Check {
    if path.as_os_str().is_empty() || path.is_absolute() {
        Ok(())
    } else {
        Err((key, "must be an absolute path or empty".to_owned()))
    }
}
