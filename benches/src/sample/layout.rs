//! Writes sample layers as an OCI image layout.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Result;
use flate2::{Compression, write::GzEncoder};
use formats::digest::Digest;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::LayerFiles;
use crate::packed::architecture;

/// An OCI image layout on disk that holds one image.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The directory with `index.json`.
    pub dir: PathBuf,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Compressed bytes of all layers.
    pub compressed_bytes: u64,
    /// Entries of all layers (implied parents not counted).
    pub entries: usize,
}

struct Hashing<W> {
    inner: W,
    hasher: Sha256,
    written: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            written: 0,
        }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Compresses `layers` (gzip level 6, as `docker build` does) into an image layout below `dir`.
pub fn write_layout(
    dir: &Path,
    layers: &[LayerFiles],
    entrypoint: &[&str],
    progress: &mut dyn FnMut(&str),
) -> Result<Layout> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    let mut compressed_bytes = 0;
    for (index, layer) in layers.iter().enumerate() {
        progress(&format!(
            "compressing layer {} of {} ({} entries)",
            index + 1,
            layers.len(),
            layer.len()
        ));
        let temporary = blobs.join("layer.tmp");
        let file = Hashing::new(BufWriter::new(File::create(&temporary)?));
        let mut tar = Hashing::new(GzEncoder::new(file, Compression::new(6)));
        layer.write_tar(&mut tar)?;
        diff_ids.push(Digest::finish(tar.hasher).to_string());
        let mut file = tar.inner.finish()?;
        file.flush()?;
        let (digest, size) = (Digest::finish(file.hasher), file.written);
        fs::rename(&temporary, blobs.join(digest.hex()))?;
        compressed_bytes += size;
        descriptors.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": size,
        }));
    }
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"],
            "Entrypoint": entrypoint,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (config, config_size) = put(&blobs, &config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size},
        "layers": descriptors,
    });
    let (manifest, manifest_size) = put(&blobs, &manifest)?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_size,
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
        }],
    });
    fs::write(dir.join("index.json"), serde_json::to_vec_pretty(&index)?)?;
    fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let entries = layers.iter().map(LayerFiles::len).sum();
    Ok(Layout {
        dir: dir.to_owned(),
        manifest,
        compressed_bytes,
        entries,
    })
}

fn put(blobs: &Path, value: &serde_json::Value) -> Result<(Digest, u64)> {
    let bytes = serde_json::to_vec(value)?;
    let digest = Digest::of(&bytes);
    fs::write(blobs.join(digest.hex()), &bytes)?;
    Ok((digest, bytes.len() as u64))
}
