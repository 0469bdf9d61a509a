//! What the node remembers of a layer across restarts.

use std::fmt;

use formats::digest::Digest;
use serde::{Deserialize, Serialize};

/// How a layer's blob is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// gzip members and a TOC in the blob.
    Estargz,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Estargz => "estargz",
        })
    }
}

/// What every stored thing of a layer is keyed by. Never the layer digest alone: a manifest may
/// pair a genuine layer digest with an index of its own making, and every chunk would verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Digest of the compressed blob, as the manifest names it.
    pub layer: Digest,
    /// Its format.
    pub format: Format,
    /// Digest of the index, as bound by the manifest that named the layer.
    pub index: Digest,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} index {}", self.layer, self.format, self.index)
    }
}

/// Names a layer on this node; also its directory. Never reused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LayerNumber(pub u64);

impl fmt::Display for LayerNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Names a layer mount (and its directory under the lowers directory). Never reused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct MountNumber(pub u64);

impl fmt::Display for MountNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What is known about the claim that a layer's tree is the tar its DiffID names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "why")]
pub enum Verdict {
    /// Not examined to the end yet.
    #[default]
    Claimed,
    /// The decoded tar hashes to the DiffID and its tree is the served tree.
    Proven,
    /// It does not, or it is not.
    Refuted(String),
    /// The tar holds what a TOC cannot express.
    Unprovable(String),
}

impl Verdict {
    /// One word for lists and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Proven => "proven",
            Self::Refuted(_) => "refuted",
            Self::Unprovable(_) => "unprovable",
        }
    }

    /// The reason, where there is one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Claimed | Self::Proven => None,
            Self::Refuted(reason) | Self::Unprovable(reason) => Some(reason),
        }
    }
}

/// An image that names the layer: where its bytes can be fetched from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The image reference as the host gave it.
    pub image: String,
    /// containerd namespace the reference was seen in, empty outside of one.
    pub namespace: String,
    /// Digest of the manifest that bound the index, if it is known.
    pub manifest: Option<Digest>,
    /// The DiffID that the image claims for the layer, if it is known.
    #[serde(default)]
    pub diff_id: Option<Digest>,
}

impl Origin {
    fn is_same_image(&self, other: &Self) -> bool {
        (&self.image, &self.namespace, self.manifest)
            == (&other.image, &other.namespace, other.manifest)
    }
}

/// A directory that no entry of the layer describes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImpliedDirectory {
    /// Its path, relative to the root.
    pub path: Vec<u8>,
    /// The group of its parent, if an entry describes that one as setgid: what is made in it by
    /// an unpack gets that group and the bit.
    pub group: Option<u32>,
}

/// One layer on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Its name here.
    pub number: LayerNumber,
    /// Its file on BlobFs. Never reused.
    pub node: u64,
    /// What it is.
    pub identity: Identity,
    /// Bytes of the compressed blob.
    pub blob_len: u64,
    /// Bytes of the decoded address space, a multiple of 4096: size of the EROFS device.
    pub device_len: u64,
    /// The layer changes nothing: it needs no mount.
    pub empty: bool,
    /// Directories that the layer implies without describing them, the root aside; parents first.
    pub implied: Vec<ImpliedDirectory>,
    /// The DiffID that an image config claimed first.
    pub diff_id: Option<Digest>,
    /// The DiffID that the layer's tar has, once it has been hashed.
    #[serde(default)]
    pub content_diff_id: Option<Digest>,
    /// Whether the tar makes the served tree. What images claim is a matter of its own:
    /// [`Self::false_claims`].
    pub verdict: Verdict,
    /// The index is here; only then may anything refer to the layer.
    pub ready: bool,
    /// Every byte of the data file is there and synced.
    pub complete: bool,
    /// Images that name it, latest first.
    pub origins: Vec<Origin>,
    /// Unix second of the first resolution.
    pub created: u64,
    /// Milliseconds from asking for its index until it was ready.
    #[serde(default)]
    pub resolve_ms: u64,
}

impl LayerRecord {
    /// Origins kept per layer.
    const MAX_ORIGINS: usize = 8;

    /// Puts `origin` first; false if it was there already.
    pub fn remember(&mut self, mut origin: Origin) -> bool {
        if origin.diff_id.is_none() {
            let known = self
                .origins
                .iter()
                .find(|known| known.is_same_image(&origin));
            origin.diff_id = known.and_then(|known| known.diff_id);
        }
        if self.origins.first() == Some(&origin) {
            return false;
        }
        self.origins.retain(|known| !known.is_same_image(&origin));
        self.origins.insert(0, origin);
        self.origins.truncate(Self::MAX_ORIGINS);
        true
    }

    /// Notes what an image that is known claims.
    pub fn claim(&mut self, origin: &Origin) {
        for known in &mut self.origins {
            if known.is_same_image(origin) {
                known.diff_id = origin.diff_id;
            }
        }
    }

    /// The images that claim a DiffID which the layer does not have.
    pub fn false_claims(&self) -> impl Iterator<Item = &Origin> {
        let actual = self.content_diff_id;
        self.origins.iter().filter(move |origin| {
            matches!((origin.diff_id, actual), (Some(claim), Some(actual)) if claim != actual)
        })
    }
}

/// One EROFS superblock: a layer, a variant of its metadata image, and which occurrence in a
/// chain (overlayfs refuses the same superblock twice in one list).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MountKey {
    /// The layer.
    pub layer: LayerNumber,
    /// File stem of the metadata image.
    pub variant: String,
    /// 0 for the first in a chain.
    pub occurrence: u32,
}

impl fmt::Display for MountKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.layer, self.variant, self.occurrence)
    }
}

/// What a committed lazy snapshot is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazySnapshot {
    /// The layer.
    pub layer: LayerNumber,
    /// File stem of the metadata image.
    pub variant: String,
    /// Its mount, `None` for an empty layer.
    pub mount: Option<MountNumber>,
    /// The DiffID that the image claims for it, if it is known.
    pub diff_id: Option<Digest>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(image: &str) -> Origin {
        Origin {
            image: image.into(),
            namespace: "default".into(),
            manifest: None,
            diff_id: None,
        }
    }

    #[test]
    fn origins_are_latest_first_and_bounded() {
        let mut record = LayerRecord {
            number: LayerNumber(1),
            node: 1,
            identity: Identity {
                layer: Digest::of(b"l"),
                format: Format::Estargz,
                index: Digest::of(b"i"),
            },
            blob_len: 1,
            device_len: 4096,
            empty: false,
            implied: vec![ImpliedDirectory {
                path: b"a\xff".to_vec(),
                group: Some(7),
            }],
            diff_id: None,
            content_diff_id: None,
            verdict: Verdict::Unprovable("sparse".into()),
            ready: true,
            complete: false,
            origins: Vec::new(),
            created: 0,
            resolve_ms: 0,
        };
        assert!(record.remember(origin("a")));
        assert!(!record.remember(origin("a")));
        for n in 0..20 {
            assert!(record.remember(origin(&n.to_string())));
        }
        assert!(record.remember(origin("12")));
        assert_eq!(record.origins[0].image, "12");
        assert_eq!(record.origins.len(), LayerRecord::MAX_ORIGINS);
        let (claim, actual) = (Digest::of(b"claim"), Digest::of(b"tar"));
        let claimed = Origin {
            diff_id: Some(claim),
            ..origin("12")
        };
        assert!(record.remember(claimed.clone()));
        assert!(!record.remember(origin("12")), "what is known stays known");
        assert_eq!(record.false_claims().count(), 0, "nothing is hashed yet");
        record.content_diff_id = Some(actual);
        assert_eq!(record.false_claims().collect::<Vec<_>>(), [&claimed]);
        record.content_diff_id = Some(claim);
        assert_eq!(record.false_claims().count(), 0);
        let text = serde_json::to_vec(&record).unwrap();
        assert_eq!(
            serde_json::from_slice::<LayerRecord>(&text).unwrap(),
            record
        );
    }
}
