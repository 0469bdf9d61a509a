//! Descriptors, manifests and indexes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    ANNOTATION_REF_NAME, ANNOTATION_TOC_DIGEST, HostPlatform, LayerMediaType, MAX_INDEX_MANIFESTS,
    MAX_LAYERS, MAX_MANIFEST_BYTES, OciError, Platform, UnknownLayerType, json, limit, media_type,
    null_is_default,
};
use crate::digest::{Digest, DigestError};

/// Points at a blob or a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Where else it can be fetched; a hint that nothing here follows.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub urls: Vec<String>,
    /// Annotations.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Everything else (`data`, `artifactType`).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The manifest of one image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u64,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, bottom first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub layers: Vec<Descriptor>,
    /// Annotations.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// Everything else (`subject`, `artifactType`).
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A list of manifests, one per platform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u64,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What a registry answers to a request for a manifest.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "one per request, taken apart at once"
)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

impl Descriptor {
    /// A descriptor of `bytes`.
    pub fn of(media_type: impl Into<String>, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// A descriptor without annotations.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: None,
            extra: Map::new(),
        }
    }

    /// Classifies the media type of a layer.
    pub fn layer_type(&self) -> Result<LayerMediaType, UnknownLayerType> {
        LayerMediaType::parse(&self.media_type)
    }

    /// The TOC digest its annotation binds, if there is one.
    pub fn toc_digest(&self) -> Option<Result<Digest, DigestError>> {
        let text = self.annotations.get(ANNOTATION_TOC_DIGEST)?;
        Some(text.parse())
    }
}

impl Document {
    /// Reads a manifest or index within the limits of this module. `served` is the media type the
    /// registry or the pointing descriptor gave, if any (parameters such as a charset allowed).
    pub fn parse(bytes: &[u8], served: Option<&str>) -> Result<Self, OciError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            #[serde(default)]
            schema_version: u64,
            #[serde(default, deserialize_with = "null_is_default")]
            media_type: String,
            layers: Option<serde::de::IgnoredAny>,
            config: Option<serde::de::IgnoredAny>,
            manifests: Option<serde::de::IgnoredAny>,
        }

        limit("manifest", "bytes", bytes.len(), MAX_MANIFEST_BYTES)?;
        let probe: Probe = json("manifest", bytes)?;
        let served = served
            .and_then(|text| text.split(';').next())
            .map_or("", str::trim);
        let known = |name: &str| media_type::is_manifest(name) || media_type::is_index(name);
        let named = match (probe.media_type.as_str(), served) {
            ("", "") => "",
            // Registries serve documents without a media type of their own as plain JSON.
            ("", other) if known(other) => other,
            ("", "application/json" | "application/octet-stream" | "text/plain") => "",
            ("", other) => return Err(OciError::UnknownManifestType(other.to_owned())),
            (own, _) if !known(own) => return Err(OciError::UnknownManifestType(own.to_owned())),
            (own, other) if known(other) && own != other => {
                return Err(OciError::TypeMismatch {
                    document: own.to_owned(),
                    served: other.to_owned(),
                });
            }
            (own, _) => own,
        };
        let has_layers = probe.layers.is_some() || probe.config.is_some();
        let is_index = match named {
            "" if has_layers => false,
            "" if probe.manifests.is_some() => true,
            "" => return Err(OciError::Unrecognised),
            name => media_type::is_index(name),
        };
        if is_index && has_layers {
            return Err(OciError::Ambiguous("layers or config"));
        }
        if !is_index && probe.manifests.is_some() {
            return Err(OciError::Ambiguous("manifests"));
        }
        if probe.schema_version != 2 {
            return Err(OciError::SchemaVersion {
                what: if is_index { "index" } else { "manifest" },
                actual: probe.schema_version,
            });
        }
        if is_index {
            let index: Index = json("index", bytes)?;
            let count = index.manifests.len();
            limit("index", "manifests", count, MAX_INDEX_MANIFESTS)?;
            Ok(Self::Index(index))
        } else {
            let manifest: Manifest = json("manifest", bytes)?;
            limit("manifest", "layers", manifest.layers.len(), MAX_LAYERS)?;
            Ok(Self::Manifest(manifest))
        }
    }
}

impl Manifest {
    /// Reads a manifest; an index is an error. See [`Document::parse`].
    pub fn parse(bytes: &[u8], served: Option<&str>) -> Result<Self, OciError> {
        match Document::parse(bytes, served)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => Err(OciError::UnknownManifestType(
                media_type::OCI_INDEX.to_owned(),
            )),
        }
    }

    /// An OCI manifest without annotations.
    pub fn new(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media_type::OCI_MANIFEST.to_owned()),
            config,
            layers,
            annotations: BTreeMap::new(),
            extra: Map::new(),
        }
    }

    /// The media type it is pushed with.
    pub fn media_type(&self) -> &str {
        self.media_type
            .as_deref()
            .unwrap_or(media_type::OCI_MANIFEST)
    }

    /// `true` when it is a container image and no other artifact.
    pub fn is_image(&self) -> bool {
        media_type::is_image_config(&self.config.media_type)
    }

    /// The document's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        super::to_json(self)
    }
}

impl Index {
    /// Reads an index, that of an image layout (`index.json`) among them; a manifest is an error.
    pub fn parse(bytes: &[u8], served: Option<&str>) -> Result<Self, OciError> {
        match Document::parse(bytes, served)? {
            Document::Index(index) => Ok(index),
            Document::Manifest(_) => Err(OciError::UnknownManifestType(
                media_type::OCI_MANIFEST.to_owned(),
            )),
        }
    }

    /// An OCI index without annotations.
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media_type::OCI_INDEX.to_owned()),
            manifests,
            annotations: BTreeMap::new(),
            extra: Map::new(),
        }
    }

    /// The media type it is pushed with.
    pub fn media_type(&self) -> &str {
        self.media_type.as_deref().unwrap_or(media_type::OCI_INDEX)
    }

    /// The manifest (or nested index) that fits `host` best.
    pub fn choose(&self, host: &HostPlatform) -> Option<&Descriptor> {
        host.choose(
            self.manifests
                .iter()
                .filter(|descriptor| {
                    // Descriptors of old layouts come without a media type.
                    let name = descriptor.media_type.as_str();
                    name.is_empty() || media_type::is_manifest(name) || media_type::is_index(name)
                })
                .map(|descriptor| (descriptor.platform.as_ref(), descriptor)),
        )
    }

    /// The entry of an image layout that carries `tag`.
    pub fn tagged(&self, tag: &str) -> Option<&Descriptor> {
        self.manifests.iter().find(|descriptor| {
            descriptor
                .annotations
                .get(ANNOTATION_REF_NAME)
                .is_some_and(|name| name == tag)
        })
    }

    /// The document's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        super::to_json(self)
    }
}
