//! What an image is made of, and which of its layers can start before they are downloaded.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use formats::{
    digest::Digest,
    limits::Limits,
    oci::{Compression, Descriptor},
    stargz::{StartList, parse_toc},
    tree::Kind,
};
use serde::Serialize;
use storage::cache::{Scheduler, SchedulerOptions, Wire, WireOptions};

use crate::image::{Image, Store};

/// An image.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The place it was read from.
    pub image: String,
    /// Digest of its manifest.
    pub digest: Digest,
    /// `os/architecture`.
    pub platform: String,
    /// What a container of it starts.
    pub command: Vec<String>,
    /// Its layers, bottom first.
    pub layers: Vec<LayerReport>,
}

/// A layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// `estargz`, `gzip`, `zstd`, `tar`, or `unknown`.
    pub format: &'static str,
    /// Compressed bytes.
    pub bytes: u64,
    /// Whether a daemon serves it lazily.
    pub lazy: bool,
    /// Why not, if not.
    pub reason: Option<String>,
    /// Digest of the TOC the manifest names.
    pub toc_digest: Option<Digest>,
    /// Bytes of the TOC, uncompressed.
    pub toc_bytes: Option<u64>,
    /// Entries, without implied directories.
    pub entries: Option<usize>,
    /// Bytes of regular files.
    pub payload_bytes: Option<u64>,
    /// Chunks.
    pub chunks: Option<usize>,
    /// Compressed bytes that are fetched ahead of a start; `None` where the layer has no landmark.
    pub start_list_bytes: Option<u64>,
}

/// Inspects every layer: fetches footers and TOCs, nothing else.
pub async fn inspect(store: &Store, image: &Image) -> Result<Report> {
    let options = SchedulerOptions::default();
    let scheduler = Scheduler::new(tokio::runtime::Handle::current(), options);
    let mut layers = Vec::new();
    for descriptor in &image.manifest.layers {
        layers.push(layer(store, descriptor, &scheduler).await?);
    }
    let config = &image.config.config;
    let mut command = config.entrypoint.clone().unwrap_or_default();
    command.extend(config.cmd.clone().unwrap_or_default());
    Ok(Report {
        image: store.place(),
        digest: image.digest,
        platform: image.config.platform().to_string(),
        command,
        layers,
    })
}

async fn layer(
    store: &Store,
    descriptor: &Descriptor,
    scheduler: &Arc<Scheduler>,
) -> Result<LayerReport> {
    let mut report = LayerReport {
        digest: descriptor.digest,
        media_type: descriptor.media_type.clone(),
        format: match descriptor.layer_type().map(|kind| kind.compression) {
            Ok(Compression::Gzip) => "gzip",
            Ok(Compression::Zstd) => "zstd",
            Ok(Compression::None) => "tar",
            Err(_) => "unknown",
        },
        bytes: descriptor.size,
        lazy: false,
        reason: None,
        toc_digest: None,
        toc_bytes: None,
        entries: None,
        payload_bytes: None,
        chunks: None,
        start_list_bytes: None,
    };
    let expected = match descriptor.toc_digest() {
        None => {
            report.reason =
                Some("the manifest binds no TOC digest; convert it: snapctl image convert".into());
            return Ok(report);
        }
        Some(Err(error)) => {
            report.reason = Some(format!("its TOC digest annotation: {error}"));
            return Ok(report);
        }
        Some(Ok(digest)) => digest,
    };
    report.toc_digest = Some(expected);
    report.format = "estargz";
    match estargz(store, descriptor, expected, scheduler, &mut report).await {
        Ok(()) => report.lazy = true,
        Err(error) => report.reason = Some(format!("{error:#}")),
    }
    Ok(report)
}

async fn estargz(
    store: &Store,
    descriptor: &Descriptor,
    expected: Digest,
    scheduler: &Arc<Scheduler>,
    report: &mut LayerReport,
) -> Result<()> {
    let limits = Limits::default();
    let scratch = tempfile::tempdir().context("a scratch directory")?;
    let options = WireOptions {
        dir: scratch.path().to_owned(),
        identity: descriptor.digest,
        name: format!("{} of {}", descriptor.digest, store.place()),
    };
    let wire = Wire::open(options, store.range_source(descriptor)?, scheduler.clone())?;
    let raw = wire.fetch_index(&limits).await?;
    report.toc_bytes = Some(raw.json.len() as u64);
    let found = Digest::of(&raw.json);
    anyhow::ensure!(
        found == expected,
        "the TOC has digest {found}, the manifest says {expected}"
    );
    let layer = parse_toc(&raw.json, raw.toc_offset, &limits)?;
    let described = |kind: &Kind| !matches!(kind, Kind::Directory(directory) if directory.implied);
    report.entries = Some(
        layer
            .tree
            .inodes()
            .iter()
            .filter(|inode| described(&inode.kind))
            .count(),
    );
    report.payload_bytes = Some(
        layer
            .map
            .chunks()
            .iter()
            .map(|chunk| u64::from(chunk.len))
            .sum(),
    );
    report.chunks = Some(layer.map.chunks().len());
    report.start_list_bytes = match layer.start_list {
        StartList::None => None,
        StartList::Nothing => Some(0),
        StartList::Until(offset) => Some(offset.0),
    };
    Ok(())
}
