//! Image configs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::{
    MAX_CONFIG_BYTES, MAX_LAYERS, Manifest, OciError, Platform, json, limit, null_is_default,
};
use crate::digest::Digest;

/// The config of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// When it was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Who made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// CPU architecture.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// Variant of the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// How a container of the image runs by default.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ContainerConfig,
    /// The layers' content.
    #[serde(default, deserialize_with = "null_is_default")]
    pub rootfs: RootFs,
    /// How the layers came to be, oldest first.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub history: Vec<History>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `config` of an image config.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ContainerConfig {
    /// `user[:group]`, names or numbers; empty is root.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub user: String,
    /// `NAME=value`.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub env: Vec<String>,
    /// The program; arguments follow from `cmd` or the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments, or the program where there is no entrypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Where it starts; empty is `/`.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub working_dir: String,
    /// Labels.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// `port/protocol` as keys.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub exposed_ports: BTreeMap<String, Value>,
    /// Paths of volumes as keys.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub volumes: BTreeMap<String, Value>,
    /// The signal that asks it to end (`SIGTERM`, `15`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `rootfs` of an image config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type", default = "layers")]
    pub kind: String,
    /// Digests of the uncompressed layers, bottom first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<Digest>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One step of an image's history.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// When, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// The step made no layer.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub empty_layer: bool,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl ImageConfig {
    /// Reads a config within the limits of this module.
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        limit("image config", "bytes", bytes.len(), MAX_CONFIG_BYTES)?;
        let config: Self = json("image config", bytes)?;
        if config.rootfs.kind != "layers" {
            return Err(OciError::RootFsType(config.rootfs.kind));
        }
        let diff_ids = config.rootfs.diff_ids.len();
        limit("image config", "diff IDs", diff_ids, MAX_LAYERS)?;
        Ok(config)
    }

    /// Checks that the config speaks of as many layers as the manifest.
    pub fn check_against(&self, manifest: &Manifest) -> Result<(), OciError> {
        let (layers, diff_ids) = (manifest.layers.len(), self.rootfs.diff_ids.len());
        if layers == diff_ids {
            Ok(())
        } else {
            Err(OciError::LayerCount { layers, diff_ids })
        }
    }

    /// The platform it says it is for.
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            variant: self.variant.clone(),
            extra: Map::new(),
        }
    }

    /// The document's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        super::to_json(self)
    }
}

impl Default for RootFs {
    fn default() -> Self {
        Self {
            kind: layers(),
            diff_ids: Vec::new(),
            extra: Map::new(),
        }
    }
}

fn layers() -> String {
    "layers".to_owned()
}

/// The chain ID of every layer, bottom first, as containerd names committed snapshots.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => *diff_id,
            Some(below) => {
                let mut hasher = Sha256::new();
                hasher.update(below.to_string());
                hasher.update(b" ");
                hasher.update(diff_id.to_string());
                Digest::finish(hasher)
            }
        };
        chain.push(next);
    }
    chain
}
