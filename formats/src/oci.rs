//! OCI and Docker v2 image documents: manifests, indexes, image configs, image layouts.
//!
//! Written from the OCI image specification v1.1 and the Docker image manifest v2 schema 2
//! documentation. Fields without a type here are kept in `extra`, so that a document that is read,
//! changed and written again loses nothing. Sizes are bytes.

mod config;
mod layout;
mod manifest;
pub mod media_type;
mod platform;

pub use config::{ContainerConfig, History, ImageConfig, RootFs, chain_ids};
pub use layout::{LAYOUT_VERSION, OciLayout, blob_path};
pub use manifest::{Descriptor, Document, Index, Manifest};
pub use media_type::{Compression, Family, LayerMediaType, UnknownLayerType};
pub use platform::{HostPlatform, Platform};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};

/// Annotation on a layer descriptor: digest of the eStargz TOC. Passed to snapshotters as label.
pub const ANNOTATION_TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Annotation on a layer descriptor: uncompressed size of an eStargz layer in decimal.
pub const ANNOTATION_UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";
/// Annotation on a descriptor in an image layout: the tag.
pub const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation on a descriptor in an image layout: the full image name, as containerd writes it.
pub const ANNOTATION_IMAGE_NAME: &str = "io.containerd.image.name";

/// Largest manifest or index that is read; registries refuse larger ones.
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// Largest image config that is read.
pub const MAX_CONFIG_BYTES: usize = 16 << 20;
/// Most layers of one manifest, and most diff IDs or history entries of one config.
pub const MAX_LAYERS: usize = 4096;
/// Most manifests of one index.
pub const MAX_INDEX_MANIFESTS: usize = 4096;

/// Why a document was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OciError {
    /// Not the JSON that was expected.
    #[error("malformed {what}: {source}")]
    Json {
        /// The kind of document.
        what: &'static str,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// A size or count is over its limit.
    #[error("{what} has {actual} {unit}, the limit is {limit}")]
    TooLarge {
        /// The kind of document or field.
        what: &'static str,
        /// What is counted.
        unit: &'static str,
        /// How many it has.
        actual: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// `schemaVersion` is not 2.
    #[error("{what} has schemaVersion {actual}, only 2 is supported")]
    SchemaVersion {
        /// The kind of document.
        what: &'static str,
        /// What it says.
        actual: u64,
    },
    /// A media type that is neither a manifest nor an index.
    #[error("unsupported manifest media type {0:?}")]
    UnknownManifestType(String),
    /// The document names another media type than the registry did.
    #[error("manifest says it is {document:?}, it was served as {served:?}")]
    TypeMismatch {
        /// `mediaType` in the document.
        document: String,
        /// The `Content-Type` or the media type of the descriptor.
        served: String,
    },
    /// A document that is a manifest to one reader and an index to another.
    #[error("ambiguous manifest: it has {0:?} although its media type says otherwise")]
    Ambiguous(&'static str),
    /// Neither media type nor content tell what it is.
    #[error("manifest has no media type, no layers and no manifests")]
    Unrecognised,
    /// The layout version is not 1.x.
    #[error("unsupported OCI image layout version {0:?}, only 1.0.0 is known")]
    LayoutVersion(String),
    /// The config lists another number of layers than the manifest.
    #[error("manifest has {layers} layers, image config has {diff_ids} diff IDs")]
    LayerCount {
        /// Layers of the manifest.
        layers: usize,
        /// `rootfs.diff_ids` of the config.
        diff_ids: usize,
    },
    /// `rootfs.type` is not `layers`.
    #[error("image config has rootfs type {0:?}, only \"layers\" is supported")]
    RootFsType(String),
}

fn limit(
    what: &'static str,
    unit: &'static str,
    actual: usize,
    limit: usize,
) -> Result<(), OciError> {
    if actual > limit {
        return Err(OciError::TooLarge {
            what,
            unit,
            actual,
            limit,
        });
    }
    Ok(())
}

fn json<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|source| OciError::Json { what, source })
}

fn to_json<T: serde::Serialize>(document: &T) -> Vec<u8> {
    #[expect(
        clippy::expect_used,
        reason = "the documents hold strings, numbers and string-keyed maps only, and a Vec takes all"
    )]
    serde_json::to_vec(document).expect("plain data serialises")
}

/// Docker writes `null` where OCI leaves a field out.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
