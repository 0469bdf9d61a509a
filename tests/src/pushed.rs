//! Tiny images for tests, pushed past the network into a lab registry.

use std::collections::BTreeMap;

use formats::{
    digest::Digest,
    oci::{
        ANNOTATION_TOC_DIGEST, Descriptor, ImageConfig, Manifest, chain_ids,
        media_type::{OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST},
    },
    stargz::{self, WriterOptions},
};
use lab::Handle;

/// One layer: the tar and the blob made of it.
#[derive(Clone, Debug)]
pub struct PushedLayer {
    /// The uncompressed tar.
    pub tar: Vec<u8>,
    /// The blob.
    pub blob: Vec<u8>,
    /// Its descriptor.
    pub descriptor: Descriptor,
    /// SHA-256 of the tar.
    pub diff_id: Digest,
}

impl PushedLayer {
    /// An eStargz layer.
    ///
    /// # Panics
    /// When the writer refuses the tar.
    pub fn estargz(tar: &[u8]) -> Self {
        Self::estargz_with(tar, &WriterOptions::default())
    }

    /// An eStargz layer with options.
    ///
    /// # Panics
    /// As [`Self::estargz`].
    pub fn estargz_with(tar: &[u8], options: &WriterOptions) -> Self {
        let mut blob = Vec::new();
        let built = stargz::build(
            std::io::Cursor::new(tar),
            &mut blob,
            options,
            &formats::limits::Limits::default(),
        )
        .expect("a tar the writer takes");
        let mut descriptor = Descriptor::new(OCI_LAYER_GZIP, built.blob_digest, built.blob_len);
        descriptor.annotations.insert(
            ANNOTATION_TOC_DIGEST.to_owned(),
            built.toc_digest.to_string(),
        );
        // The writer adds the TOC's entry to the tar: what the layer is made of is in the blob.
        let tar = inflate(&blob);
        assert_eq!(Digest::of(&tar), built.diff_id, "the writer's DiffID");
        Self {
            tar,
            blob,
            descriptor,
            diff_id: built.diff_id,
        }
    }

    /// An ordinary gzip layer.
    ///
    /// # Panics
    /// Never: writing to memory does not fail.
    pub fn gzip(tar: &[u8]) -> Self {
        let blob = gzip(tar);
        Self {
            tar: tar.to_vec(),
            descriptor: Descriptor::new(OCI_LAYER_GZIP, Digest::of(&blob), blob.len() as u64),
            diff_id: Digest::of(tar),
            blob,
        }
    }

    /// Digest of the blob.
    pub fn digest(&self) -> Digest {
        self.descriptor.digest
    }

    /// The TOC digest annotation.
    pub fn toc(&self) -> Option<String> {
        self.descriptor
            .annotations
            .get(ANNOTATION_TOC_DIGEST)
            .cloned()
    }
}

/// A pushed image.
#[derive(Clone, Debug)]
pub struct PushedImage {
    /// `host:port/repository:tag`.
    pub reference: String,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Its layers, bottom first.
    pub layers: Vec<PushedLayer>,
    /// Chain IDs, bottom first.
    pub chains: Vec<Digest>,
}

impl PushedImage {
    /// Pushes an image of `layers` to `repository:tag`.
    ///
    /// # Panics
    /// When the registry's store fails.
    pub fn push(lab: &Handle, repository: &str, tag: &str, layers: &[PushedLayer]) -> Self {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
        Self::push_claiming(lab, repository, tag, layers, &diff_ids)
    }

    /// As [`Self::push`], with a config that claims other DiffIDs.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_claiming(
        lab: &Handle,
        repository: &str,
        tag: &str,
        layers: &[PushedLayer],
        diff_ids: &[Digest],
    ) -> Self {
        let config = config(diff_ids);
        let config_digest = lab.push_blob(repository, &config).expect("config");
        for layer in layers {
            lab.push_blob(repository, &layer.blob).expect("layer");
        }
        let manifest = Manifest::new(
            Descriptor::new(OCI_CONFIG, config_digest, config.len() as u64),
            layers
                .iter()
                .map(|layer| layer.descriptor.clone())
                .collect(),
        );
        let digest = lab
            .push_manifest(repository, tag, OCI_MANIFEST, &manifest.to_json())
            .expect("manifest");
        Self {
            reference: format!("{}/{repository}:{tag}", lab.host()),
            manifest: digest,
            layers: layers.to_vec(),
            chains: chain_ids(diff_ids),
        }
    }
}

fn config(diff_ids: &[Digest]) -> Vec<u8> {
    let ids: Vec<String> = diff_ids.iter().map(ToString::to_string).collect();
    let text = serde_json::json!({
        "architecture": std::env::consts::ARCH,
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": ids },
    })
    .to_string();
    let parsed = ImageConfig::parse(text.as_bytes()).expect("our own config");
    parsed.to_json()
}

/// One gzip member.
fn gzip(data: &[u8]) -> Vec<u8> {
    use std::{
        io::{Read as _, Write as _},
        process::{Command, Stdio},
    };
    let mut child = Command::new("gzip")
        .args(["-n", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("gzip(1)");
    let mut stdin = child.stdin.take().expect("piped");
    let data = data.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&data));
    let mut blob = Vec::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_end(&mut blob)
        .expect("gzip's output");
    writer.join().expect("no panic").expect("gzip takes it all");
    assert!(child.wait().expect("gzip ends").success());
    blob
}

/// All members of a gzip stream.
fn inflate(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    let mut inflater = formats::gzip::Inflater::new(1 << 32);
    inflater
        .push(blob, &mut |bytes| tar.extend_from_slice(bytes))
        .expect("our own gzip");
    inflater.finish().expect("our own gzip");
    tar
}

/// Labels as containerd's annotation wrapper makes them for layer `index`.
pub fn cri_labels(image: &PushedImage, index: usize) -> BTreeMap<String, String> {
    let mut labels = snapshot_labels(image, index);
    let rest: Vec<String> = image.layers[index..]
        .iter()
        .map(|layer| layer.digest().to_string())
        .collect();
    let prefix = "containerd.io/snapshot/cri.";
    for (name, value) in [
        ("image-ref", image.reference.clone()),
        ("manifest-digest", image.manifest.to_string()),
        ("layer-digest", image.layers[index].digest().to_string()),
        ("image-layers", rest.join(",")),
    ] {
        labels.insert(format!("{prefix}{name}"), value);
    }
    labels
}

/// Labels as `ctr-remote images rpull` sends them.
pub fn rpull_labels(image: &PushedImage, index: usize) -> BTreeMap<String, String> {
    let mut labels = snapshot_labels(image, index);
    let rest: Vec<String> = image.layers[index..]
        .iter()
        .map(|layer| layer.digest().to_string())
        .collect();
    let prefix = "containerd.io/snapshot/remote/stargz.";
    for (name, value) in [
        ("reference", image.reference.clone()),
        ("digest", image.layers[index].digest().to_string()),
        ("layers", rest.join(",")),
    ] {
        labels.insert(format!("{prefix}{name}"), value);
    }
    labels
}

/// What the unpacker itself sends, and the annotations of the descriptor.
fn snapshot_labels(image: &PushedImage, index: usize) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([(
        "containerd.io/snapshot.ref".to_owned(),
        image.chains[index].to_string(),
    )]);
    for (name, value) in &image.layers[index].descriptor.annotations {
        if name.starts_with("containerd.io/snapshot/") {
            labels.insert(name.clone(), value.clone());
        }
    }
    labels
}
