//! Images made by other projects' tools, kept outside the repository. Tests that use them say so
//! and return where they are absent.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use skip::skip;

/// An OCI image layout.
pub(crate) struct ImageLayout {
    root: PathBuf,
}

/// One layer of an image.
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: formats::digest::Digest,
    pub(crate) toc_digest: Option<formats::digest::Digest>,
}

/// The fixture directory: `SNAPSHOTTERD_FIXTURES`, or `shared/fixtures` beside the repository.
pub(crate) fn root() -> Option<PathBuf> {
    let root = std::env::var_os("SNAPSHOTTERD_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"),
        PathBuf::from,
    );
    if root.join("tree/tree.tsv").is_file() {
        return Some(root);
    }
    skip(&format!(
        "no fixtures at {} (set SNAPSHOTTERD_FIXTURES)",
        root.display()
    ));
    None
}

impl ImageLayout {
    pub(crate) fn open(root: &Path, name: &str) -> Self {
        Self {
            root: root.join(name),
        }
    }

    /// Every tag in the index.
    pub(crate) fn tags(&self) -> Vec<String> {
        self.manifests()
            .iter()
            .filter_map(|manifest| tag(manifest).map(str::to_owned))
            .collect()
    }

    /// The layers of a tag, lowest first.
    pub(crate) fn layers(&self, wanted: &str) -> Vec<Layer> {
        let manifests = self.manifests();
        let found = manifests
            .iter()
            .find(|manifest| tag(manifest) == Some(wanted));
        let descriptor = found.unwrap_or_else(|| panic!("no tag {wanted}"));
        let manifest = self.json(descriptor);
        let config = self.json(&manifest["config"]);
        let layers = manifest["layers"].as_array().expect("layers");
        let diff_ids = config["rootfs"]["diff_ids"].as_array().expect("diff_ids");
        assert_eq!(layers.len(), diff_ids.len());
        layers
            .iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| Layer {
                blob: self.blob(layer),
                diff_id: digest(diff_id).expect("a DiffID"),
                toc_digest: digest(
                    &layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"],
                ),
            })
            .collect()
    }

    fn manifests(&self) -> Vec<Value> {
        let text = fs::read(self.root.join("index.json")).expect("index.json");
        let index: Value = serde_json::from_slice(&text).expect("JSON");
        index["manifests"].as_array().expect("manifests").clone()
    }

    fn json(&self, descriptor: &Value) -> Value {
        serde_json::from_slice(&self.blob(descriptor)).expect("JSON")
    }

    fn blob(&self, descriptor: &Value) -> Vec<u8> {
        let digest = digest(&descriptor["digest"]).expect("a digest");
        fs::read(self.root.join("blobs/sha256").join(digest.hex())).expect("a blob")
    }
}

fn tag(manifest: &Value) -> Option<&str> {
    manifest["annotations"]["org.opencontainers.image.ref.name"].as_str()
}

fn digest(value: &Value) -> Option<formats::digest::Digest> {
    value.as_str().map(|text| text.parse().expect("a digest"))
}
