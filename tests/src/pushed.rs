//! Images for tests, pushed past the network into a lab registry.

use std::{collections::BTreeMap, io::Write as _, path::Path};

use flate2::write::GzEncoder;
use formats::{
    digest::Digest,
    oci::{
        ANNOTATION_TOC_DIGEST, Descriptor, ImageConfig, Manifest, blob_path, chain_ids,
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
        descriptor.annotations.extend(built.annotations());
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

    /// Each layer as eStargz.
    ///
    /// # Panics
    /// As [`Self::estargz`].
    pub fn all_estargz(layers: &[Self], options: &WriterOptions) -> Vec<Self> {
        let layers = layers.iter();
        layers
            .map(|layer| Self::estargz_with(&layer.tar, options))
            .collect()
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
        Self::push_running(lab, repository, tag, layers, &[])
    }

    /// As [`Self::push`], with what a container of it starts.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_running(
        lab: &Handle,
        repository: &str,
        tag: &str,
        layers: &[PushedLayer],
        command: &[&str],
    ) -> Self {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
        let chains = chain_ids(&diff_ids);
        let config = config(diff_ids, command);
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
            chains,
        }
    }

    /// Compressed bytes of all layers.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.descriptor.size).sum()
    }

    /// Chain ID of the whole image, which its top snapshot is found by.
    ///
    /// # Panics
    /// When it has no layers.
    pub fn top(&self) -> String {
        self.chains
            .last()
            .expect("an image with layers")
            .to_string()
    }
}

fn config(diff_ids: Vec<Digest>, command: &[&str]) -> Vec<u8> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut config = ImageConfig {
        architecture: architecture.into(),
        os: "linux".into(),
        ..ImageConfig::default()
    };
    if !command.is_empty() {
        config.config.entrypoint = Some(command.iter().map(|&word| word.to_owned()).collect());
        config.config.env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()];
    }
    config.rootfs.diff_ids = diff_ids;
    config.to_json()
}

/// One gzip member.
///
/// # Panics
/// Never: writing to memory does not fail.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(data).expect("memory takes bytes");
    encoder.finish().expect("memory takes bytes")
}

/// What a container of [`sample`]'s layers runs; it prints `ready`.
pub const SAMPLE_COMMAND: [&str; 2] = ["/usr/bin/python3", "/app/ready.py"];

/// The layers of a small image that runs, as ordinary ones: this machine's python3 and what it
/// needs.
///
/// # Panics
/// When it cannot be built.
pub fn sample(dir: &Path) -> Vec<PushedLayer> {
    let size = benches::sample::SampleOptions {
        payload_bytes: 60 << 20,
        entries: 1500,
    };
    let layout = benches::sample::build(dir, size, &mut |_| {}).expect("a sample image");
    let json = std::fs::read(dir.join(blob_path(&layout.manifest))).expect("its manifest");
    let manifest = Manifest::parse(&json, None).expect("a manifest");
    layout_layers(dir, &manifest)
}

/// The layers of an OCI layout as they stand, whoever made them.
///
/// # Panics
/// When one cannot be read.
pub fn layout_layers(layout: &Path, manifest: &Manifest) -> Vec<PushedLayer> {
    let layers = manifest.layers.iter();
    layers
        .map(|descriptor| {
            let path = layout.join(blob_path(&descriptor.digest));
            let blob =
                std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let tar = inflate(&blob);
            PushedLayer {
                diff_id: Digest::of(&tar),
                tar,
                blob,
                descriptor: descriptor.clone(),
            }
        })
        .collect()
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
