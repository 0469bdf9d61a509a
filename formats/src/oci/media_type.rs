//! Media types of image documents and layers.

use core::fmt;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, tar.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Prefix of the OCI layers that are not to be pushed to other registries.
pub const OCI_LAYER_NONDISTRIBUTABLE: &str =
    "application/vnd.oci.image.layer.nondistributable.v1.tar";
/// Docker v2 schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker v2 schema 2 manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, tar.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Docker layer, zstd.
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
/// Docker layer that is fetched from its `urls` instead of the registry.
pub const DOCKER_LAYER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";

/// What a client accepts when it asks for a manifest, most wanted first.
pub const MANIFEST_TYPES: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX];

/// `true` for a manifest of one image.
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// `true` for a list of manifests.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// `true` for the config of a container image (others belong to artifacts).
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// How a layer's tar is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip, of one or several members.
    Gzip,
    /// zstd frames.
    Zstd,
}

/// Who defined a media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `application/vnd.oci.*`
    Oci,
    /// `application/vnd.docker.*`
    Docker,
}

/// A layer media type, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerMediaType {
    /// Who defined it.
    pub family: Family,
    /// How the tar is compressed.
    pub compression: Compression,
    /// Not to be pushed elsewhere; it may have to be fetched from the descriptor's `urls`.
    pub nondistributable: bool,
}

/// A layer whose media type is none of the known ones (encrypted layers among them).
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("unsupported layer media type {0:?}")]
pub struct UnknownLayerType(pub String);

impl LayerMediaType {
    /// Classifies a layer's media type.
    pub fn parse(media_type: &str) -> Result<Self, UnknownLayerType> {
        let (family, nondistributable, rest) =
            if let Some(rest) = media_type.strip_prefix(OCI_LAYER_NONDISTRIBUTABLE) {
                (Family::Oci, true, rest)
            } else if let Some(rest) = media_type.strip_prefix(OCI_LAYER) {
                (Family::Oci, false, rest)
            } else if let Some(rest) = media_type.strip_prefix(DOCKER_LAYER_FOREIGN) {
                (Family::Docker, true, rest)
            } else if let Some(rest) = media_type.strip_prefix(DOCKER_LAYER) {
                (Family::Docker, false, rest)
            } else {
                return Err(UnknownLayerType(media_type.to_owned()));
            };
        let compression = match (family, rest) {
            (_, "") => Compression::None,
            // containerd accepts both spellings in both families.
            (_, "+gzip" | ".gzip") => Compression::Gzip,
            (_, "+zstd" | ".zstd") => Compression::Zstd,
            _ => return Err(UnknownLayerType(media_type.to_owned())),
        };
        Ok(Self {
            family,
            compression,
            nondistributable,
        })
    }

    /// The same layer compressed otherwise.
    #[must_use]
    pub fn with_compression(self, compression: Compression) -> Self {
        Self {
            compression,
            ..self
        }
    }
}

impl fmt::Display for LayerMediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.family, self.nondistributable) {
            (Family::Oci, false) => OCI_LAYER,
            (Family::Oci, true) => OCI_LAYER_NONDISTRIBUTABLE,
            (Family::Docker, false) => DOCKER_LAYER,
            (Family::Docker, true) => DOCKER_LAYER_FOREIGN,
        })?;
        f.write_str(match (self.family, self.compression) {
            (_, Compression::None) => "",
            (Family::Oci, Compression::Gzip) => "+gzip",
            (Family::Oci, Compression::Zstd) => "+zstd",
            (Family::Docker, Compression::Gzip) => ".gzip",
            (Family::Docker, Compression::Zstd) => ".zstd",
        })
    }
}
