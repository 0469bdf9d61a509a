//! Test images: the tree with every oddity that a lazily served image must show right.

use std::io::{Cursor, Write as _};

use flate2::write::GzEncoder;
use formats::{
    digest::Digest,
    limits::Limits,
    oci::{Compression, Descriptor, ImageConfig, Manifest, media_type},
    stargz::{self, WriterOptions},
};
use harness::tarball::Tarball;
use lab::Lab;

/// One layer of a test image.
#[derive(Clone, Debug)]
pub struct TestLayer {
    /// Its uncompressed tar.
    pub tar: Vec<u8>,
    /// How it is packed.
    pub packing: Packing,
}

/// How a test layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// As an ordinary layer.
    Plain(Compression),
    /// As eStargz with chunks of this many bytes.
    Estargz(u32),
}

impl TestLayer {
    /// An eStargz layer with the usual chunk size.
    pub fn lazy(tar: Vec<u8>) -> Self {
        Self {
            tar,
            packing: Packing::Estargz(4 << 20),
        }
    }

    /// An ordinary gzip layer.
    pub fn plain(tar: Vec<u8>) -> Self {
        Self {
            tar,
            packing: Packing::Plain(Compression::Gzip),
        }
    }
}

/// A pushed test image.
#[derive(Clone, Debug)]
pub struct Pushed {
    /// `HOST/REPOSITORY:TAG`.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// The config.
    pub config: ImageConfig,
}

impl Pushed {
    /// Compressed bytes of all layers.
    pub fn layer_bytes(&self) -> u64 {
        self.manifest.layers.iter().map(|layer| layer.size).sum()
    }
}

/// Packs the layers and puts the image into the registry's store. `command` is what a container
/// starts.
///
/// # Panics
/// When a layer cannot be packed or the store refuses it.
pub fn push(
    lab: &Lab,
    repository: &str,
    tag: &str,
    layers: &[TestLayer],
    command: &[&str],
) -> Pushed {
    let mut descriptors = Vec::new();
    let mut config = ImageConfig {
        architecture: if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "amd64"
        }
        .into(),
        os: "linux".into(),
        ..ImageConfig::default()
    };
    config.config.entrypoint = Some(command.iter().map(|&word| word.to_owned()).collect());
    config.config.env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()];
    for layer in layers {
        let (bytes, diff_id, descriptor) = pack(layer);
        lab.push_blob(repository, &bytes)
            .expect("the registry takes the layer");
        config.rootfs.diff_ids.push(diff_id);
        descriptors.push(descriptor);
    }
    let json = config.to_json();
    lab.push_blob(repository, &json)
        .expect("the registry takes the config");
    let manifest = Manifest::new(Descriptor::of(media_type::OCI_CONFIG, &json), descriptors);
    let digest = push_manifest(lab, repository, tag, &manifest);
    Pushed {
        reference: format!("{}/{repository}:{tag}", lab.host()),
        digest,
        manifest,
        config,
    }
}

/// Puts a manifest under a tag.
///
/// # Panics
/// When the store refuses it.
pub fn push_manifest(lab: &Lab, repository: &str, tag: &str, manifest: &Manifest) -> Digest {
    let json = manifest.to_json();
    lab.push_manifest(repository, tag, media_type::OCI_MANIFEST, &json)
        .expect("the registry takes the manifest")
}

/// A layer's blob, DiffID and descriptor.
///
/// # Panics
/// When it cannot be packed.
pub fn pack(layer: &TestLayer) -> (Vec<u8>, Digest, Descriptor) {
    match layer.packing {
        Packing::Plain(Compression::Gzip) => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(&layer.tar).expect("memory takes bytes");
            let bytes = encoder.finish().expect("memory takes bytes");
            let descriptor = Descriptor::of(media_type::OCI_LAYER_GZIP, &bytes);
            (bytes, Digest::of(&layer.tar), descriptor)
        }
        Packing::Plain(Compression::None) => {
            let descriptor = Descriptor::of(media_type::OCI_LAYER, &layer.tar);
            (layer.tar.clone(), Digest::of(&layer.tar), descriptor)
        }
        Packing::Plain(Compression::Zstd) => panic!("zstd layers are not made here"),
        Packing::Estargz(chunk_size) => {
            let mut bytes = Vec::new();
            let options = WriterOptions {
                chunk_size,
                level: 6,
                ..WriterOptions::default()
            };
            let built = stargz::build(
                Cursor::new(&layer.tar),
                &mut bytes,
                &options,
                &Limits::default(),
            )
            .expect("the tar is a valid layer");
            let mut descriptor = Descriptor::of(media_type::OCI_LAYER_GZIP, &bytes);
            descriptor.annotations.extend(built.annotations());
            (bytes, built.diff_id, descriptor)
        }
    }
}

/// Bytes that look random but are the same on every run.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The tars of the oddities, bottom first: times, modes, devices, names, hard links, holes,
/// whiteouts, opaque and implied directories, an empty layer three times, a real one twice.
pub fn oddities() -> Vec<Vec<u8>> {
    let long = "n".repeat(255);
    let mut holes = noise(1, 12_000);
    holes.extend(std::iter::repeat_n(0, 3 << 20));
    holes.extend(noise(2, 5_000));
    let mut base = Tarball::new();
    base.dir("etc")
        .file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n");
    base.mode(0o1777).dir("tmp");
    base.mode(0o700)
        .owner(1000, 1001)
        .mtime(1_600_000_000, 0)
        .dir("private");
    base.file("private/inside", b"inside");
    base.mtime(0, 0).file("epoch", b"zero");
    base.mtime(-86_400, 0).file("before", b"1969");
    base.mode(0o4755).file("suid", b"#!suid");
    base.mode(0o2755).file("sgid", b"#!sgid");
    base.mode(0o1644)
        .owner(4_000_000, 4_000_001)
        .file("sticky", b"owner beyond 16 bits");
    base.char_device("null", 1, 3)
        .block_device("disk", 259, 300)
        .fifo("pipe");
    base.symlink("link", "etc/passwd")
        .symlink("dangling", "/no/such/target");
    base.symlink("far", &"t/".repeat(200));
    base.file("group/a", b"one inode")
        .hardlink("group/b", "group/a")
        .hardlink("c", "group/a");
    base.file(&format!("names/{long}"), b"255 bytes")
        .dir(&format!("names/d{}", "m".repeat(254)));
    base.file("names/\u{fc}\u{4e2d}", b"utf-8")
        .file("names/with space", b"");
    base.xattr("user.comment", b"binary \x00\xff value")
        .xattr("user.empty", b"")
        .file("attributes", b"x");
    base.xattr(
        "security.capability",
        &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    base.file("capable", b"cap");
    // An ordinary unpack does not restore it, nor may a lazy layer show it.
    base.xattr("trusted.admin", b"no").file("admin", b"x");
    base.file("empty", b"")
        .file("holes", &holes)
        .file("big", &noise(3, 9_500_000));
    base.file("one", b"1")
        .file("page", &noise(4, 4096))
        .file("page1", &noise(5, 4097));
    base.dir("replaced")
        .file("replaced/old", b"old")
        .dir("gone")
        .file("gone/file", b"gone");
    base.dir("opaque")
        .file("opaque/hidden", b"hidden")
        .file("opaque/kept", b"below");
    base.file("deep/1/2/3/4/5/6/7/8/9/file", b"implied parents");
    for index in 0..300 {
        base.file(
            &format!("many/{index:04}"),
            format!("file {index}\n").as_bytes(),
        );
    }

    let mut second = Tarball::new();
    second
        .whiteout("gone")
        .whiteout("replaced")
        .file("replaced", b"now a file");
    second.opaque("opaque").file("opaque/kept", b"above");
    // Directories below are implied here: their attributes come from the layer below.
    second
        .file("private/added", b"added")
        .file("tmp/added", b"tmp");
    second.whiteout("many/0007").file("many/0008", b"changed");
    second.hardlink("no-such", "private/added");

    let empty = Tarball::new().finish();
    let mut repeated = Tarball::new();
    repeated
        .mode(0o750)
        .dir("twice")
        .file("twice/file", &noise(6, 70_000));
    let repeated = repeated.finish();
    let mut last = Tarball::new();
    last.whiteout("twice/file").file("last", b"last");

    vec![
        base.finish(),
        empty.clone(),
        repeated.clone(),
        second.finish(),
        empty.clone(),
        last.finish(),
        repeated,
        empty,
    ]
}
