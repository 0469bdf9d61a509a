//! eStargz images of files that a benchmark makes up, pushed past the link into a lab registry.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter, Read, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use formats::{
    digest::Digest,
    limits::Limits,
    oci::{Descriptor, ImageConfig, Manifest, media_type},
    stargz::{self, WriterOptions},
};
use harness::workdir::Workdir;
use lab::Handle;

/// A layer in the registry.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) descriptor: Descriptor,
    pub(crate) diff_id: Digest,
}

/// A layer being written.
pub(crate) struct LayerTar {
    tar: PathBuf,
    blob: PathBuf,
    builder: tar::Builder<BufWriter<File>>,
}

impl LayerTar {
    /// An empty one; its files are in `work` until it is pushed.
    pub(crate) fn new(work: &Workdir) -> Result<Self> {
        let tar = work.path().join("layer.tar");
        Ok(Self {
            builder: tar::Builder::new(BufWriter::new(File::create(&tar)?)),
            blob: work.path().join("layer.blob"),
            tar,
        })
    }

    pub(crate) fn directory(&mut self, path: &Path) -> Result<()> {
        let mut header = header(0o755, 0);
        header.set_entry_type(tar::EntryType::Directory);
        Ok(self
            .builder
            .append_data(&mut header, path, std::io::empty())?)
    }

    /// A regular file of `len` bytes.
    pub(crate) fn file(&mut self, path: &Path, len: u64, content: impl Read) -> Result<()> {
        let mut header = header(0o644, len);
        Ok(self.builder.append_data(&mut header, path, content)?)
    }

    /// Packs it, in chunks of `chunk_bytes` where given, and pushes it to `repository`.
    pub(crate) fn push(
        self,
        lab: &Handle,
        repository: &str,
        chunk_bytes: Option<u32>,
    ) -> Result<Layer> {
        self.builder.into_inner()?.flush()?;
        let mut options = WriterOptions {
            level: 1,
            ..WriterOptions::default()
        };
        if let Some(bytes) = chunk_bytes {
            options.chunk_size = bytes;
        }
        let built = stargz::build(
            BufReader::new(File::open(&self.tar)?),
            BufWriter::new(File::create(&self.blob)?),
            &options,
            &Limits::default(),
        )
        .context("packing a layer")?;
        let (digest, len) = lab.push_blob_from(repository, File::open(&self.blob)?)?;
        let mut descriptor = Descriptor::new(media_type::OCI_LAYER_GZIP, digest, len);
        descriptor.annotations.extend(built.annotations());
        fs::remove_file(&self.tar)?;
        fs::remove_file(&self.blob)?;
        Ok(Layer {
            descriptor,
            diff_id: built.diff_id,
        })
    }
}

/// Pushes an image of these layers; its reference.
pub(crate) fn push_image<'a>(
    lab: &Handle,
    repository: &str,
    tag: &str,
    layers: impl Iterator<Item = &'a Layer> + Clone,
) -> Result<String> {
    let mut config = ImageConfig {
        architecture: architecture().into(),
        os: "linux".into(),
        ..ImageConfig::default()
    };
    config.rootfs.diff_ids = layers.clone().map(|layer| layer.diff_id).collect();
    let config = config.to_json();
    lab.push_blob(repository, &config)?;
    let manifest = Manifest::new(
        Descriptor::of(media_type::OCI_CONFIG, &config),
        layers.map(|layer| layer.descriptor.clone()).collect(),
    );
    lab.push_manifest(
        repository,
        tag,
        media_type::OCI_MANIFEST,
        &manifest.to_json(),
    )?;
    Ok(format!("{}/{repository}:{tag}", lab.host()))
}

/// This machine's architecture as images name it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header(mode: u32, len: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(len);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header
}
