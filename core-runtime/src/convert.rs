//! Converts images to eStargz.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use formats::{
    digest::Digest,
    gzip,
    limits::Limits,
    oci::{
        ANNOTATION_TOC_DIGEST, ANNOTATION_UNCOMPRESSED_SIZE, Compression, Descriptor, Manifest,
        media_type,
    },
    stargz::{self, WriterOptions},
};
use sha2::{Digest as _, Sha256};

use crate::{
    image::{Image, Store},
    record::Record,
};

/// How to convert.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Files larger than this are split into chunks of this many bytes.
    pub chunk_size_bytes: u32,
    /// Compression level, 1 to 12.
    pub level: u8,
    /// What to place first, from `snapctl image record`.
    pub record: Option<Record>,
    /// Layers converted at the same time.
    pub jobs: usize,
    /// A directory for temporary files: the uncompressed and the converted layers.
    pub scratch: PathBuf,
}

/// One converted layer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ConvertedLayer {
    /// Digest before.
    pub source: Digest,
    /// Size before.
    pub source_bytes: u64,
    /// Digest after.
    pub digest: Digest,
    /// Size after.
    pub bytes: u64,
    /// Digest of its TOC.
    pub toc_digest: Digest,
    /// How many files were placed first.
    pub prioritized: usize,
    /// Why a daemon will not serve it lazily, if so.
    pub not_lazy: Option<String>,
}

/// A converted image.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Converted {
    /// Digest of the new manifest.
    pub digest: Digest,
    /// Layer by layer, bottom first.
    pub layers: Vec<ConvertedLayer>,
}

/// Steps that take long, for progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Bytes of source layers read.
    Read,
    /// Bytes of converted layers stored.
    Stored,
}

/// Called as the conversion moves on.
pub type Progress = Arc<dyn Fn(Step, u64) + Send + Sync>;

/// Converts `image` of `source` and stores the result at `target`. The result is a pure function
/// of the image, the record and the options.
pub async fn to_estargz(
    source: &Arc<Store>,
    image: &Image,
    target: &Arc<Store>,
    options: &ConvertOptions,
    progress: Progress,
) -> Result<Converted> {
    let gate = Arc::new(tokio::sync::Semaphore::new(options.jobs.max(1)));
    let count = image.manifest.layers.len();
    let mut jobs: Vec<Job> = Vec::new();
    let mut job_of_layer = Vec::new();
    for (index, descriptor) in image.manifest.layers.iter().enumerate() {
        let job = Job {
            descriptor: descriptor.clone(),
            diff_id: image.config.rootfs.diff_ids[index],
            prioritized: options
                .record
                .as_ref()
                .map(|record| record.of_layer(index))
                .unwrap_or_default(),
        };
        // A layer that occurs twice is converted once, unless its start lists differ.
        let at = jobs
            .iter()
            .position(|other| *other == job)
            .unwrap_or_else(|| {
                jobs.push(job);
                jobs.len() - 1
            });
        job_of_layer.push(at);
    }
    let mut running = tokio::task::JoinSet::new();
    for (at, job) in jobs.into_iter().enumerate() {
        let (source, target, options) = (source.clone(), target.clone(), options.clone());
        let (gate, progress) = (gate.clone(), progress.clone());
        running.spawn(async move {
            let _permit = gate.acquire().await?;
            let name = format!("layer {} of {}", job.descriptor.digest, source.place());
            let result = layer(&source, job, &target, &options, &progress)
                .await
                .context(name)?;
            Ok::<_, anyhow::Error>((at, result))
        });
    }
    let mut done = BTreeMap::new();
    while let Some(result) = running.join_next().await {
        let (at, result) = result??;
        done.insert(at, result);
    }

    let mut config = image.config.clone();
    let mut descriptors = Vec::with_capacity(count);
    let mut layers = Vec::with_capacity(count);
    for (index, at) in job_of_layer.iter().enumerate() {
        let ConvertedJob {
            descriptor,
            diff_id,
            report,
        } = &done[at];
        descriptors.push(descriptor.clone());
        config.rootfs.diff_ids[index] = *diff_id;
        layers.push(report.clone());
    }
    let config = config.to_json();
    let config_descriptor = Descriptor::of(media_type::OCI_CONFIG, &config);
    target.put_bytes(&config_descriptor, &config).await?;
    let mut manifest = Manifest::new(config_descriptor, descriptors);
    manifest.annotations.clone_from(&image.manifest.annotations);
    let bytes = manifest.to_json();
    let descriptor = Descriptor::of(media_type::OCI_MANIFEST, &bytes);
    target.put_manifest(&descriptor, &bytes).await?;
    Ok(Converted {
        digest: descriptor.digest,
        layers,
    })
}

/// Copies an image as it is.
pub async fn copy(
    source: &Store,
    image: &Image,
    target: &Store,
    scratch: &Path,
    progress: &Progress,
) -> Result<Digest> {
    let work = tempfile::tempdir_in(scratch).context("a scratch directory")?;
    for descriptor in &image.manifest.layers {
        let file = source
            .file(descriptor, work.path(), &|bytes| {
                progress(Step::Read, bytes);
            })
            .await?;
        target
            .put_file(descriptor, &file, &|bytes| progress(Step::Stored, bytes))
            .await?;
    }
    let config = source.bytes(&image.manifest.config).await?;
    target.put_bytes(&image.manifest.config, &config).await?;
    let descriptor = Descriptor::of(image.media_type.clone(), &image.bytes);
    target.put_manifest(&descriptor, &image.bytes).await?;
    Ok(descriptor.digest)
}

#[derive(PartialEq)]
struct Job {
    descriptor: Descriptor,
    diff_id: Digest,
    prioritized: Vec<Vec<u8>>,
}

struct ConvertedJob {
    descriptor: Descriptor,
    diff_id: Digest,
    report: ConvertedLayer,
}

async fn layer(
    source: &Store,
    job: Job,
    target: &Store,
    options: &ConvertOptions,
    progress: &Progress,
) -> Result<ConvertedJob> {
    let kind = job.descriptor.layer_type()?;
    if kind.nondistributable {
        bail!(
            "a layer of type {} must not be copied to another place",
            job.descriptor.media_type
        );
    }
    let work = tempfile::tempdir_in(&options.scratch).context("a scratch directory")?;
    let compressed = source
        .file(&job.descriptor, work.path(), &|bytes| {
            progress(Step::Read, bytes);
        })
        .await?;
    let (tar, out) = (
        work.path().join("layer.tar"),
        work.path().join("layer.esgz"),
    );
    let listed = job.prioritized.len();
    let settings = WriterOptions {
        chunk_size: options.chunk_size_bytes,
        level: options.level,
        prioritized: job.prioritized,
    };
    let (tar_path, out_path) = (tar.clone(), out.clone());
    let expected = job.diff_id;
    let built = tokio::task::spawn_blocking(move || {
        decompress(&compressed, kind.compression, &tar_path, expected)?;
        let mut from = File::open(&tar_path).with_context(|| tar_path.display().to_string())?;
        let mut to = BufWriter::with_capacity(1 << 20, File::create(&out_path)?);
        let built = stargz::build(&mut from, &mut to, &settings, &Limits::default())?;
        to.flush()?;
        Ok::<_, anyhow::Error>(built)
    })
    .await??;
    let mut descriptor = Descriptor::new(
        media_type::OCI_LAYER_GZIP,
        built.blob_digest,
        built.blob_len,
    );
    descriptor
        .annotations
        .clone_from(&job.descriptor.annotations);
    descriptor
        .annotations
        .insert(ANNOTATION_TOC_DIGEST.into(), built.toc_digest.to_string());
    descriptor.annotations.insert(
        ANNOTATION_UNCOMPRESSED_SIZE.into(),
        built.uncompressed_len.to_string(),
    );
    target
        .put_file(&descriptor, &out, &|bytes| progress(Step::Stored, bytes))
        .await?;
    let report = ConvertedLayer {
        source: job.descriptor.digest,
        source_bytes: job.descriptor.size,
        digest: built.blob_digest,
        bytes: built.blob_len,
        toc_digest: built.toc_digest,
        prioritized: listed - built.missing.len(),
        not_lazy: built.not_lazy.as_ref().map(ToString::to_string),
    };
    Ok(ConvertedJob {
        descriptor,
        diff_id: built.diff_id,
        report,
    })
}

/// Writes the layer's tar and checks that it is the one the image's config names.
fn decompress(from: &Path, compression: Compression, to: &Path, expected: Digest) -> Result<()> {
    let mut input = File::open(from).with_context(|| from.display().to_string())?;
    let mut output = BufWriter::with_capacity(1 << 20, File::create(to)?);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut inflater = match compression {
        Compression::Gzip => Some(gzip::Inflater::new(Limits::default().max_decoded_bytes)),
        Compression::None => None,
        Compression::Zstd => bail!("zstd layers cannot be converted yet"),
    };
    loop {
        let length = input.read(&mut buffer).context("reading the layer")?;
        if length == 0 {
            break;
        }
        if let Some(inflater) = &mut inflater {
            let mut result = Ok(());
            inflater.push(&buffer[..length], &mut |bytes| {
                hasher.update(bytes);
                if result.is_ok() {
                    result = output.write_all(bytes);
                }
            })?;
            result.context("writing the layer's tar")?;
        } else {
            hasher.update(&buffer[..length]);
            output.write_all(&buffer[..length])?;
        }
    }
    if let Some(inflater) = inflater {
        inflater.finish()?;
    }
    output.flush()?;
    let found = Digest::finish(hasher);
    if found != expected {
        bail!("its tar has digest {found}, the image's config says {expected}");
    }
    Ok(())
}
