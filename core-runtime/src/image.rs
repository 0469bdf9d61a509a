//! Images where they are kept: registries and OCI image layouts.
//!
//! [`Location`] is what a person types, [`Store`] reads and writes one image there, [`Image`] is an
//! image's documents, read and checked.

mod layout;
mod location;
mod registry;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use formats::{
    digest::Digest,
    oci::{Descriptor, Document, HostPlatform, ImageConfig, Index, Manifest, OciError, media_type},
};

use storage::ranges::RangeSource;

pub use layout::LayoutStore;
pub use location::{Location, LocationError};
pub use registry::{RegistryAccess, RegistryStore};

/// Called with bytes as they are moved.
pub type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The location is not understood.
    #[error(transparent)]
    Location(#[from] LocationError),
    /// A document is malformed.
    #[error("{place}: {what}")]
    Document {
        /// The image.
        place: String,
        /// Which document.
        what: String,
        /// What is wrong.
        #[source]
        source: OciError,
    },
    /// The index has nothing for this platform.
    #[error("{place} has no image for {platform}; it has {available}")]
    Platform {
        /// The image.
        place: String,
        /// What was looked for.
        platform: String,
        /// What there is.
        available: String,
    },
    /// Content does not match its descriptor.
    #[error("{place}: blob {digest} is corrupt: {detail}")]
    Corrupt {
        /// The image.
        place: String,
        /// What the descriptor says.
        digest: Digest,
        /// What was found.
        detail: String,
    },
    /// A layout lacks something.
    #[error("{place}: {what}")]
    Missing {
        /// The layout.
        place: String,
        /// What is missing.
        what: String,
    },
    /// A local file.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The registry.
    #[error(transparent)]
    Registry(#[from] storage::registry::RegistryError),
    /// A blob could not be fetched.
    #[error(transparent)]
    Fetch(#[from] storage::ranges::FetchError),
}

/// One image at one place.
#[derive(Debug)]
pub enum Store {
    /// In an OCI image layout.
    Layout(LayoutStore),
    /// In a registry.
    Registry(RegistryStore),
}

impl Store {
    /// Opens a location. Nothing is fetched yet.
    pub fn open(location: &Location, access: &RegistryAccess) -> Result<Self, ImageError> {
        Ok(match location {
            Location::Layout { dir, tag } => Self::Layout(LayoutStore::new(dir, tag.as_deref())),
            Location::Registry(reference) => Self::Registry(access.store(reference)),
        })
    }

    /// How the place is called in messages.
    pub fn place(&self) -> String {
        match self {
            Self::Layout(store) => store.place(),
            Self::Registry(store) => store.place(),
        }
    }

    /// The manifest or index the location names.
    async fn root(&self) -> Result<(Descriptor, Vec<u8>), ImageError> {
        match self {
            Self::Layout(store) => store.root(),
            Self::Registry(store) => store.root().await,
        }
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Layout(store) => store.bytes(descriptor),
            Self::Registry(store) => store.manifest(descriptor).await,
        }
    }

    /// A small blob (a config), checked against its descriptor.
    pub async fn bytes(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Layout(store) => store.bytes(descriptor),
            Self::Registry(store) => store.bytes(descriptor).await,
        }
    }

    /// A blob as a local file, checked against its descriptor: the layout's own file, or a download
    /// below `scratch`.
    pub async fn file(
        &self,
        descriptor: &Descriptor,
        scratch: &Path,
        progress: Progress<'_>,
    ) -> Result<PathBuf, ImageError> {
        match self {
            Self::Layout(store) => store.file(descriptor, progress),
            Self::Registry(store) => store.download(descriptor, scratch, progress).await,
        }
    }

    /// A blob as a source of ranges.
    pub fn range_source(
        &self,
        descriptor: &Descriptor,
    ) -> Result<Arc<dyn RangeSource>, ImageError> {
        match self {
            Self::Layout(store) => store.range_source(descriptor),
            Self::Registry(store) => Ok(store.range_source(descriptor)),
        }
    }

    /// Stores a blob from a local file, unless it is there already.
    pub async fn put_file(
        &self,
        descriptor: &Descriptor,
        file: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ImageError> {
        match self {
            Self::Layout(store) => store.put_file(descriptor, file, progress),
            Self::Registry(store) => store.upload(descriptor, file, progress).await,
        }
    }

    /// Stores a small blob.
    pub async fn put_bytes(&self, descriptor: &Descriptor, bytes: &[u8]) -> Result<(), ImageError> {
        match self {
            Self::Layout(store) => store.put_bytes(descriptor, bytes),
            Self::Registry(store) => store.upload_bytes(descriptor, bytes).await,
        }
    }

    /// Stores a manifest under the location's tag; everything it names must be there.
    pub async fn put_manifest(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        match self {
            Self::Layout(store) => store.put_manifest(descriptor, bytes),
            Self::Registry(store) => store.put_manifest(descriptor, bytes).await,
        }
    }
}

/// The documents of one image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// The manifest, byte for byte.
    pub bytes: Vec<u8>,
    /// The manifest.
    pub manifest: Manifest,
    /// The config.
    pub config: ImageConfig,
}

impl Image {
    /// Reads the image at `store` for a platform.
    pub async fn read(store: &Store, platform: &HostPlatform) -> Result<Self, ImageError> {
        let (mut descriptor, mut bytes) = store.root().await?;
        let wrong = |what: &str| {
            let (place, what) = (store.place(), what.to_owned());
            move |source| ImageError::Document {
                place,
                what,
                source,
            }
        };
        // An index may name indexes; a bound keeps a cycle from looping.
        for _ in 0..4 {
            match Document::parse(&bytes, Some(&descriptor.media_type))
                .map_err(wrong("manifest"))?
            {
                Document::Manifest(manifest) => {
                    let config = store.bytes(&manifest.config).await?;
                    let config = ImageConfig::parse(&config).map_err(wrong("image config"))?;
                    config
                        .check_against(&manifest)
                        .map_err(wrong("image config"))?;
                    let media_type = manifest.media_type().to_owned();
                    return Ok(Self {
                        digest: descriptor.digest,
                        media_type,
                        bytes,
                        manifest,
                        config,
                    });
                }
                Document::Index(index) => {
                    descriptor = choose(store, &index, platform)?;
                    bytes = store.manifest(&descriptor).await?;
                }
            }
        }
        Err(ImageError::Missing {
            place: store.place(),
            what: "no image manifest within four nested indexes".into(),
        })
    }
}

fn choose(store: &Store, index: &Index, platform: &HostPlatform) -> Result<Descriptor, ImageError> {
    let by_platform = index.choose(platform).cloned();
    // Layout indexes often state no platform: a single manifest is then meant.
    let only = || match index.manifests.as_slice() {
        [one] if one.platform.is_none() && media_type::is_manifest(&one.media_type) => {
            Some(one.clone())
        }
        _ => None,
    };
    by_platform.or_else(only).ok_or_else(|| {
        let available = index
            .manifests
            .iter()
            .filter_map(|entry| Some(entry.platform.as_ref()?.to_string()));
        ImageError::Platform {
            place: store.place(),
            platform: platform.to_string(),
            available: available.collect::<Vec<_>>().join(", "),
        }
    })
}
