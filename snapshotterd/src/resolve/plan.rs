//! What a manifest says about the layers of its image.

use std::sync::Arc;

use formats::{
    digest::Digest,
    oci::{Compression, Document, ImageConfig, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest},
};
use tracing::debug;

use super::{
    reason::NotLazy,
    remote::{Remote, RemoteError},
};
use crate::{
    containerd::Containerd,
    layers::record::{Identity, Origin},
};

/// Manifests of one index that are looked at.
const MAX_MANIFESTS: usize = 64;

/// One layer of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// Digest of its index, or why it has none.
    pub index: Result<Digest, String>,
    /// Media type.
    pub media_type: String,
    /// Whether the media type can be lazy.
    pub can_be_lazy: bool,
    /// The DiffID that the config claims, if the config could be read.
    pub diff_id: Option<Digest>,
}

impl PlannedLayer {
    /// The index digest, or why the layer of `image` is not lazy.
    pub fn bound_index(&self, image: &str) -> Result<Digest, NotLazy> {
        if !self.can_be_lazy {
            return Err(NotLazy::MediaType {
                image: image.to_owned(),
                layer: self.digest,
                media_type: self.media_type.clone(),
            });
        }
        self.index.clone().map_err(|detail| NotLazy::NoTocDigest {
            image: image.to_owned(),
            layer: self.digest,
            media_type: detail,
        })
    }
}

/// All layers of a manifest, bottom first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The manifest.
    pub manifest: Digest,
    /// The layers.
    pub layers: Vec<PlannedLayer>,
}

impl Plan {
    /// The layer with that digest.
    pub fn layer(&self, digest: Digest) -> Option<&PlannedLayer> {
        self.layers.iter().find(|layer| layer.digest == digest)
    }
}

/// Why the DiffID of a layer is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// It may be later.
    Now(String),
    /// Nothing names it.
    Never(String),
}

/// Where manifests and configs are read from: containerd's content store, else the registry, by
/// digest always.
#[derive(Clone)]
pub struct Documents {
    /// The containerd that hosts us, if it may be asked.
    pub containerd: Option<Containerd>,
    /// The registry.
    pub remote: Arc<dyn Remote>,
}

impl Documents {
    /// The plan of the image manifest `digest`, or, without one, of what the name leads to now.
    pub async fn plan(
        &self,
        namespace: &str,
        image: &str,
        digest: Option<Digest>,
    ) -> Result<Plan, NotLazy> {
        let failed = |error: RemoteError| NotLazy::Manifest {
            image: image.to_owned(),
            detail: error.detail,
            transient: error.transient,
        };
        let (digest, bytes) = if let Some(digest) = digest {
            let bytes = match self.stored(namespace, digest, MAX_MANIFEST_BYTES).await {
                Some(bytes) => bytes,
                None => self.remote.manifest(image, digest).await.map_err(failed)?,
            };
            (digest, bytes)
        } else {
            let found = self.remote.named(image).await.map_err(failed)?;
            (found.digest, found.bytes)
        };
        let unusable = |detail: String| NotLazy::Manifest {
            image: image.to_owned(),
            detail,
            transient: false,
        };
        let manifest = match Document::parse(&bytes, None) {
            Ok(Document::Manifest(manifest)) => manifest,
            Ok(Document::Index(_)) => return Err(unusable(format!("{digest} is an index"))),
            Err(error) => return Err(unusable(storage::ranges::report(&error))),
        };
        let config = self.config(namespace, image, &manifest).await;
        Ok(plan(digest, &manifest, config.as_ref()))
    }

    /// The DiffID that the image `origin` claims for a layer.
    pub async fn find_diff_id(
        &self,
        origin: &Origin,
        identity: &Identity,
    ) -> Result<Digest, Unknown> {
        let image = &origin.image;
        let manifests = match origin.manifest {
            Some(manifest) => vec![manifest],
            None => self.manifests_of(origin).await?,
        };
        for manifest in manifests {
            let plan = self
                .plan(&origin.namespace, image, Some(manifest))
                .await
                .map_err(|error| {
                    let text = error.to_string();
                    if error.is_transient() {
                        Unknown::Now(text)
                    } else {
                        Unknown::Never(text)
                    }
                })?;
            let layer = plan.layers.iter().find(|layer| {
                layer.digest == identity.layer && layer.index.as_ref() == Ok(&identity.index)
            });
            if let Some(layer) = layer {
                return layer
                    .diff_id
                    .ok_or_else(|| Unknown::Now(format!("the config of {image} cannot be read")));
            }
        }
        Err(Unknown::Never(format!(
            "{image} does not name the layer any more"
        )))
    }

    /// The manifests behind a name, as containerd's image store has it.
    async fn manifests_of(&self, origin: &Origin) -> Result<Vec<Digest>, Unknown> {
        let image = &origin.image;
        let Some(containerd) = self
            .containerd
            .as_ref()
            .filter(|_| !origin.namespace.is_empty())
        else {
            return Err(Unknown::Never(format!(
                "{image} was announced without a manifest digest"
            )));
        };
        let found = containerd
            .image(&origin.namespace, image)
            .await
            .map_err(|error| Unknown::Now(storage::ranges::report(&error)))?
            .ok_or_else(|| Unknown::Now(format!("containerd does not know {image} yet")))?;
        let Some(bytes) = self
            .stored(&origin.namespace, found.target, MAX_MANIFEST_BYTES)
            .await
        else {
            return Err(Unknown::Now(format!("{} is not stored", found.target)));
        };
        match Document::parse(&bytes, None) {
            Ok(Document::Manifest(_)) => Ok(vec![found.target]),
            Ok(Document::Index(index)) => {
                let mut stored = Vec::new();
                for manifest in index.manifests.iter().take(MAX_MANIFESTS) {
                    let digest = manifest.digest;
                    let there = self
                        .stored(&origin.namespace, digest, MAX_MANIFEST_BYTES)
                        .await;
                    if there.is_some() {
                        stored.push(digest);
                    }
                }
                Ok(stored)
            }
            Err(error) => Err(Unknown::Never(storage::ranges::report(&error))),
        }
    }

    /// The config; without it the DiffIDs are not known yet, which is no reason not to start.
    async fn config(
        &self,
        namespace: &str,
        image: &str,
        manifest: &Manifest,
    ) -> Option<ImageConfig> {
        let (digest, size) = (manifest.config.digest, manifest.config.size);
        let bytes = match self.stored(namespace, digest, MAX_CONFIG_BYTES).await {
            Some(bytes) => bytes,
            None => match self.remote.document(image, digest, size).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    debug!(image, %digest, error = %error, "image config cannot be read");
                    return None;
                }
            },
        };
        match ImageConfig::parse(&bytes).and_then(|config| {
            config.check_against(manifest)?;
            Ok(config)
        }) {
            Ok(config) => Some(config),
            Err(error) => {
                debug!(image, %digest, error = %error, "image config cannot be used");
                None
            }
        }
    }

    async fn stored(&self, namespace: &str, digest: Digest, limit: usize) -> Option<Vec<u8>> {
        let containerd = self.containerd.as_ref().filter(|_| !namespace.is_empty())?;
        match containerd.blob(namespace, digest, limit as u64).await {
            Ok(found) => found,
            Err(error) => {
                let error = storage::ranges::report(&error);
                debug!(%digest, error, "not from containerd's content store");
                None
            }
        }
    }
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Documents")
            .field("containerd", &self.containerd)
            .finish_non_exhaustive()
    }
}

fn plan(digest: Digest, manifest: &Manifest, config: Option<&ImageConfig>) -> Plan {
    let layers = manifest
        .layers
        .iter()
        .enumerate()
        .map(|(position, descriptor)| PlannedLayer {
            digest: descriptor.digest,
            size: descriptor.size,
            index: match descriptor.toc_digest() {
                Some(Ok(digest)) => Ok(digest),
                Some(Err(error)) => Err(format!("{}: {error}", descriptor.media_type)),
                None => Err(descriptor.media_type.clone()),
            },
            media_type: descriptor.media_type.clone(),
            can_be_lazy: descriptor
                .layer_type()
                .is_ok_and(|kind| kind.compression == Compression::Gzip),
            diff_id: config.and_then(|config| config.rootfs.diff_ids.get(position).copied()),
        })
        .collect();
    Plan {
        manifest: digest,
        layers,
    }
}

#[cfg(test)]
mod tests {
    use formats::oci::{ANNOTATION_TOC_DIGEST, Descriptor, media_type};

    use super::*;

    #[test]
    fn says_per_layer_what_binds_its_index() {
        let descriptor = |kind: &str, toc: Option<&str>| {
            let mut descriptor = Descriptor::new(kind, Digest::of(kind.as_bytes()), 7);
            if let Some(toc) = toc {
                descriptor
                    .annotations
                    .insert(ANNOTATION_TOC_DIGEST.to_owned(), toc.to_owned());
            }
            descriptor
        };
        let toc = Digest::of(b"toc");
        let manifest = Manifest::new(
            Descriptor::new(media_type::OCI_CONFIG, Digest::of(b"config"), 2),
            vec![
                descriptor(media_type::OCI_LAYER_GZIP, Some(&toc.to_string())),
                descriptor(media_type::DOCKER_LAYER_GZIP, None),
                descriptor(media_type::OCI_LAYER_ZSTD, Some(&toc.to_string())),
                descriptor(media_type::OCI_LAYER, Some("sha256:zz")),
            ],
        );
        let plan = plan(Digest::of(b"manifest"), &manifest, None);
        assert_eq!(plan.layers[0].bound_index("i").ok(), Some(toc));
        let why = |n: usize| plan.layers[n].bound_index("i").unwrap_err().kind();
        assert_eq!(why(1), "no-toc-digest");
        assert_eq!(why(2), "media-type");
        assert_eq!(why(3), "media-type");
    }
}
