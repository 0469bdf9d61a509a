//! What the labels of an extraction Prepare say about the layer and its image.
//!
//! Labels under `containerd.io/snapshot/` may be copied from annotations of the manifest, that
//! is, written by whoever made the image: they name things that are then verified by digest,
//! and nothing else is taken from them.

use std::collections::BTreeMap;

use formats::digest::Digest;

use super::{Following, reason::NotLazy};

/// The chain ID that a committed answer has to carry; its presence marks an extraction Prepare.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Set on every lazily answered snapshot.
pub const REMOTE: &str = "containerd.io/snapshot/remote";
/// Chain below a layer that is unpacked in parallel, without a parent (containerd 2.3 and later).
const PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";
/// Digest of the TOC of an eStargz layer.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// Labels that name the image.
pub const IMAGE_REF: [&str; 2] = [
    "containerd.io/snapshot/cri.image-ref",
    "containerd.io/snapshot/remote/stargz.reference",
];
const LAYER_DIGEST: [&str; 2] = [
    "containerd.io/snapshot/cri.layer-digest",
    "containerd.io/snapshot/remote/stargz.digest",
];
const LAYERS: [&str; 2] = [
    "containerd.io/snapshot/cri.image-layers",
    "containerd.io/snapshot/remote/stargz.layers",
];
const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
const DIFF_ID: &str = "containerd.io/snapshot/diff-id";

/// Key and value of a label together hold at most this many bytes in containerd.
const LABEL_LIMIT: usize = 4096;

/// At most this many layers are taken from a label (a label holds about 56).
const MAX_LAYERS: usize = 128;

/// What an extraction Prepare announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The chain ID the answer is committed for.
    pub chain: String,
    /// The image reference.
    pub image: String,
    /// The manifest, by digest.
    pub manifest: Option<Digest>,
    /// The layer that is asked for.
    pub layer: Digest,
    /// This and later layers.
    pub layers: Vec<Digest>,
    /// The layer's own TOC digest annotation.
    pub toc: Option<Digest>,
    /// The layer's DiffID (containerd 2.3 and later).
    pub diff_id: Option<Digest>,
    /// The layer has layers below it, whatever parent the Prepare names.
    pub has_parent_chain: bool,
}

impl Announced {
    /// How often the list of layers names `layer`; at least once for the announced one.
    pub fn times(&self, layer: Digest) -> usize {
        self.layers.iter().filter(|known| **known == layer).count()
    }

    /// Reads the labels of a Prepare that carries [`SNAPSHOT_REF`].
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Result<Self, NotLazy> {
        let first = |names: [&str; 2]| {
            names
                .iter()
                .find_map(|name| labels.get(*name))
                .filter(|value| !value.is_empty())
        };
        let missing = || NotLazy::NoAnnotations;
        let digest = |name: &str, value: &str| {
            value.parse::<Digest>().map_err(|_| NotLazy::BadLabel {
                label: name.to_owned(),
                value: value.chars().take(96).collect(),
            })
        };
        let optional = |name: &str| {
            labels
                .get(name)
                .filter(|value| !value.is_empty())
                .map(|value| digest(name, value))
                .transpose()
        };
        let chain = labels.get(SNAPSHOT_REF).ok_or_else(missing)?.clone();
        let image = first(IMAGE_REF).ok_or_else(missing)?.clone();
        let layer = digest(LAYER_DIGEST[0], first(LAYER_DIGEST).ok_or_else(missing)?)?;
        // The list is a hint: what is not a digest in it is passed over.
        let mut layers: Vec<Digest> = first(LAYERS)
            .map(|list| {
                list.split(',')
                    .filter_map(|digest| digest.trim().parse().ok())
                    .take(MAX_LAYERS)
                    .collect()
            })
            .unwrap_or_default();
        if !layers.contains(&layer) {
            layers.insert(0, layer);
        }
        Ok(Self {
            chain,
            image,
            manifest: optional(MANIFEST_DIGEST)?,
            layer,
            layers,
            toc: optional(TOC_DIGEST)?,
            diff_id: optional(DIFF_ID)?,
            has_parent_chain: labels
                .get(PARENT_CHAIN)
                .is_some_and(|chain| !chain.is_empty()),
        })
    }
}

/// The labels containerd will send for a layer further up of the same image, as far as they can
/// be told from those of one below: what is copied from the image stays, what names the layer is
/// replaced, what cannot be known is left out.
pub fn labels_above(
    labels: &BTreeMap<String, String>,
    following: &Following,
) -> BTreeMap<String, String> {
    let record = &following.resolved.record;
    let mut above = labels.clone();
    let mut replace = |key: &str, value: Option<String>| match value {
        Some(value) if above.contains_key(key) => {
            above.insert(key.to_owned(), value);
        }
        _ => {
            above.remove(key);
        }
    };
    replace(SNAPSHOT_REF, Some(following.chain.to_string()));
    replace(PARENT_CHAIN, Some(following.below.to_string()));
    replace(TOC_DIGEST, Some(record.identity.index.to_string()));
    replace(
        DIFF_ID,
        following.resolved.diff_id.map(|digest| digest.to_string()),
    );
    for key in LAYER_DIGEST {
        replace(key, Some(record.identity.layer.to_string()));
    }
    for key in LAYERS {
        let room = LABEL_LIMIT.saturating_sub(key.len());
        replace(key, Some(list_within(&following.layers, room)));
    }
    above
}

/// Digests separated by commas, as many as fit into `room` bytes.
fn list_within(digests: &[Digest], room: usize) -> String {
    let mut list = String::new();
    for digest in digests {
        let digest = digest.to_string();
        let comma = usize::from(!list.is_empty());
        if list.len() + comma + digest.len() > room {
            break;
        }
        if comma == 1 {
            list.push(',');
        }
        list.push_str(&digest);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn reads_both_families() {
        let a = Digest::of(b"a").to_string();
        let b = Digest::of(b"b").to_string();
        let list = format!("{a},nonsense,{b}");
        let cri = Announced::from_labels(&labels(&[
            (SNAPSHOT_REF, "sha256:chain"),
            (IMAGE_REF[0], "registry/x:1"),
            (LAYER_DIGEST[0], &a),
            (LAYERS[0], &list),
            (MANIFEST_DIGEST, &b),
        ]))
        .unwrap();
        assert_eq!(cri.layers, [Digest::of(b"a"), Digest::of(b"b")]);
        assert_eq!(cri.manifest, Some(Digest::of(b"b")));
        assert_eq!(cri.toc, None);
        let own = Announced::from_labels(&labels(&[
            (SNAPSHOT_REF, "sha256:chain"),
            (IMAGE_REF[1], "registry/x:1"),
            (LAYER_DIGEST[1], &a),
            (TOC_DIGEST, &b),
        ]))
        .unwrap();
        assert_eq!(own.layers, [Digest::of(b"a")]);
        assert_eq!(own.toc, Some(Digest::of(b"b")));
        assert_eq!(own.manifest, None);
    }

    #[test]
    fn says_what_is_missing_or_wrong() {
        let a = Digest::of(b"a").to_string();
        assert!(matches!(
            Announced::from_labels(&labels(&[(SNAPSHOT_REF, "c")])),
            Err(NotLazy::NoAnnotations)
        ));
        for wrong in [LAYER_DIGEST[0], TOC_DIGEST, MANIFEST_DIGEST] {
            let mut all = labels(&[
                (SNAPSHOT_REF, "c"),
                (IMAGE_REF[0], "r/x"),
                (LAYER_DIGEST[0], &a),
            ]);
            all.insert(wrong.to_owned(), "sha512:00".to_owned());
            assert!(matches!(
                Announced::from_labels(&all),
                Err(NotLazy::BadLabel { .. })
            ));
        }
    }

    #[test]
    fn a_list_holds_whole_digests_and_fits() {
        let digests: Vec<Digest> = (0..80_u8).map(|n| Digest::of(&[n])).collect();
        let list = list_within(&digests, LABEL_LIMIT - LAYERS[0].len());
        assert!(list.len() + LAYERS[0].len() <= LABEL_LIMIT);
        let read: Vec<Digest> = list.split(',').map(|one| one.parse().unwrap()).collect();
        assert_eq!(read, digests[..read.len()]);
        assert!(read.len() > 50, "{}", read.len());
        assert_eq!(list_within(&digests[..1], 10), "");
    }
}
