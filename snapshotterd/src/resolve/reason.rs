//! Why a layer is not lazy.

use std::{fmt, sync::Arc, time::Duration};

use formats::digest::Digest;

/// Why a layer gets an ordinary unpack. Every text goes to the log and the status of the image.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotLazy {
    /// The host sends no image labels: annotations are not enabled for this plugin.
    #[error(
        "no image labels on the request: enable_remote_snapshot_annotations (transfer service) or \
         disable_snapshot_annotations = false (CRI) is not set, or the client sends none"
    )]
    NoAnnotations,
    /// A label that names a digest does not hold one.
    #[error("label {label} holds {value:?}, which is no sha256 digest")]
    BadLabel {
        /// The label.
        label: String,
        /// What it holds.
        value: String,
    },
    /// The layer was announced without the parent it has (parallel unpacking).
    #[error(
        "the host unpacks in parallel and does not name the parent: lazy layers need a plugin \
         without the rebase capability"
    )]
    ParallelUnpack,
    /// Lazy answers are turned off.
    #[error("lazy loading is turned off: {0}")]
    Off(String),
    /// The manifest cannot be read.
    #[error("manifest of {image} cannot be used: {detail}")]
    Manifest {
        /// The image.
        image: String,
        /// What happened.
        detail: String,
        /// Trying again later may help.
        transient: bool,
    },
    /// The manifest does not list the layer.
    #[error("manifest of {image} does not list layer {layer}")]
    NotInManifest {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
    },
    /// The descriptor binds no index.
    #[error(
        "layer {layer} of {image} has no TOC digest annotation ({media_type}): it is not eStargz, or cannot \
         be verified chunk by chunk; snapctl image convert makes a lazy image of it"
    )]
    NoTocDigest {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// Its media type, or what is known of it.
        media_type: String,
    },
    /// The media type is not one that can be lazy.
    #[error(
        "layer {layer} of {image} has media type {media_type}, which cannot be loaded lazily yet"
    )]
    MediaType {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The index is not the one that the manifest binds.
    #[error(
        "the TOC of layer {layer} of {image} has digest {actual}, the manifest says {expected}: \
         they do not belong together; convert and push the image again"
    )]
    TocDigest {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// What the manifest says.
        expected: Digest,
        /// What the blob holds.
        actual: Digest,
    },
    /// Footer or TOC are malformed, or the TOC says what cannot be presented.
    #[error(
        "the index of layer {layer} of {image} cannot be used: {detail}; if the image claims to be \
         eStargz, convert and push it again"
    )]
    Index {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// What is wrong, and where.
        detail: String,
    },
    /// The registry does not deliver.
    #[error("cannot fetch the index of layer {layer} of {image}: {detail}")]
    Registry {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// Registry, repository, range and what happened.
        detail: String,
        /// Trying again later may help.
        transient: bool,
    },
    /// The time for all layers of an image together is over.
    #[error(
        "layer {layer} of {image} was not resolved within {} s: still {step}{}; if its registry is \
         only slow, raise lazy.resolve_timeout",
        limit.as_secs_f32(),
        Last(trouble.as_deref())
    )]
    Deadline {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
        /// The limit.
        limit: Duration,
        /// What was under way.
        step: &'static str,
        /// What failed last and was being tried again.
        trouble: Option<String>,
    },
    /// A layer below is refuted or unusable.
    #[error("the chain below cannot carry a lazy layer: {0}")]
    Parent(String),
    /// Local trouble: disk, store, mount.
    #[error("local failure: {0}")]
    Local(Arc<str>),
}

struct Last<'a>(Option<&'a str>);

impl fmt::Display for Last<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(trouble) => write!(f, "; last failure: {trouble}"),
            None => f.write_str(", with no answer so far"),
        }
    }
}

impl NotLazy {
    /// Local trouble.
    pub fn local(error: &dyn std::error::Error) -> Self {
        Self::Local(storage::ranges::report(error).into())
    }

    /// Whether another attempt may end differently without anybody changing the image.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Manifest { transient, .. } | Self::Registry { transient, .. } => *transient,
            Self::Deadline { .. } | Self::Local(_) | Self::Parent(_) => true,
            _ => false,
        }
    }

    /// One word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoAnnotations => "no-annotations",
            Self::BadLabel { .. } => "bad-label",
            Self::ParallelUnpack => "parallel-unpack",
            Self::Off(_) => "off",
            Self::Manifest { .. } => "manifest",
            Self::NotInManifest { .. } => "not-in-manifest",
            Self::NoTocDigest { .. } => "no-toc-digest",
            Self::MediaType { .. } => "media-type",
            Self::TocDigest { .. } => "toc-digest",
            Self::Index { .. } => "index",
            Self::Registry { .. } => "registry",
            Self::Deadline { .. } => "deadline",
            Self::Parent(_) => "parent",
            Self::Local(_) => "local",
        }
    }
}
