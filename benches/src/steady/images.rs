//! What is read: the same files as ordinary directories and as eStargz layers in the registry.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter, Write as _},
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
use lab::Lab;

use super::SteadyOptions;

/// The large file.
pub(super) const LARGE_FILE: &str = "data/large";
/// How many images share one base.
pub(super) const BASE_IMAGES: usize = 10;
const BASE_LAYERS: usize = 2;
const BASE_FILES: usize = 300;
const BASE_FILE_BYTES: usize = 160 << 10;
const REPOSITORY: &str = "bench/steady";

/// One image, both ways.
#[derive(Debug)]
pub(super) struct Both {
    /// In the registry.
    pub(super) reference: String,
    /// As directories, bottom first.
    pub(super) lowers: Vec<PathBuf>,
}

/// All images.
#[derive(Debug)]
pub(super) struct Corpus {
    /// The large file and the small ones.
    pub(super) large: Both,
    /// Paths of the small files.
    pub(super) small_files: Vec<String>,
    /// Ten images on one base.
    pub(super) shared: Vec<Both>,
    /// Paths of the base's files.
    pub(super) base_files: Vec<String>,
}

impl Corpus {
    pub(super) fn build(work: &Workdir, lab: &Lab, options: &SteadyOptions) -> Result<Self> {
        let packer = Packer { work, lab };
        let large_bytes = usize::try_from(options.megabytes << 20)?;
        let large = packer.layer("large", &[(LARGE_FILE.to_owned(), large_bytes)])?;
        let small: Vec<_> = (0..options.small_files)
            .map(|n| {
                // 2 to 16 KB, in no order, a hundred to a directory.
                let bytes = 2048 + n * 7919 % (14 << 10);
                (format!("small/{:03}/{n:05}", n / 100), bytes)
            })
            .collect();
        let small_layer = packer.layer("small", &small)?;
        let large = packer.image("large", &[&large, &small_layer])?;

        let mut base = Vec::new();
        let mut base_files = Vec::new();
        for layer in 0..BASE_LAYERS {
            let files: Vec<_> = (0..BASE_FILES)
                .map(|n| (format!("base/{layer}/{n:03}"), BASE_FILE_BYTES + n * 37))
                .collect();
            base.push(packer.layer(&format!("base-{layer}"), &files)?);
            base_files.extend(files.into_iter().map(|(path, _)| path));
        }
        let mut shared = Vec::new();
        for n in 0..BASE_IMAGES {
            let own = packer.layer(&format!("own-{n}"), &[(format!("own/{n}"), 65_536)])?;
            let layers: Vec<_> = base.iter().chain([&own]).collect();
            shared.push(packer.image(&format!("shared-{n}"), &layers)?);
        }
        Ok(Self {
            large,
            small_files: small.into_iter().map(|(path, _)| path).collect(),
            shared,
            base_files,
        })
    }
}

struct Layer {
    dir: PathBuf,
    descriptor: Descriptor,
    diff_id: Digest,
}

struct Packer<'a> {
    work: &'a Workdir,
    lab: &'a Lab,
}

impl Packer<'_> {
    /// A layer of files with a path and a length each.
    fn layer(&self, name: &str, files: &[(String, usize)]) -> Result<Layer> {
        let dir = self.work.sub("plain").join(name);
        let (tar, blob) = (
            self.work.path().join("layer.tar"),
            self.work.path().join("layer.blob"),
        );
        let mut builder = tar::Builder::new(BufWriter::new(File::create(&tar)?));
        let mut made = PathBuf::new();
        for (path, length) in files {
            let host = dir.join(path);
            let parent = Path::new(path).parent().context("a file in a directory")?;
            if parent != made {
                fs::create_dir_all(dir.join(parent))?;
                directories(&mut builder, &made, parent)?;
                parent.clone_into(&mut made);
            }
            let bytes = noise(name, path, *length);
            let mut file = File::create(&host)?;
            file.write_all(&bytes)?;
            let mut header = header(0o644, *length as u64);
            builder.append_data(&mut header, path, bytes.as_slice())?;
        }
        builder.into_inner()?.flush()?;

        let options = WriterOptions {
            level: 1,
            ..WriterOptions::default()
        };
        let built = stargz::build(
            BufReader::new(File::open(&tar)?),
            BufWriter::new(File::create(&blob)?),
            &options,
            &Limits::default(),
        )
        .with_context(|| format!("packing layer {name}"))?;
        let (digest, length) = self.lab.push_blob_from(REPOSITORY, File::open(&blob)?)?;
        let mut descriptor = Descriptor::new(media_type::OCI_LAYER_GZIP, digest, length);
        descriptor.annotations.extend(built.annotations());
        fs::remove_file(&tar)?;
        fs::remove_file(&blob)?;
        Ok(Layer {
            dir,
            descriptor,
            diff_id: built.diff_id,
        })
    }

    fn image(&self, tag: &str, layers: &[&Layer]) -> Result<Both> {
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
        config.rootfs.diff_ids = layers.iter().map(|layer| layer.diff_id).collect();
        let config = config.to_json();
        self.lab.push_blob(REPOSITORY, &config)?;
        let manifest = Manifest::new(
            Descriptor::of(media_type::OCI_CONFIG, &config),
            layers
                .iter()
                .map(|layer| layer.descriptor.clone())
                .collect(),
        );
        self.lab.push_manifest(
            REPOSITORY,
            tag,
            media_type::OCI_MANIFEST,
            &manifest.to_json(),
        )?;
        Ok(Both {
            reference: format!("{}/{REPOSITORY}:{tag}", self.lab.host()),
            lowers: layers.iter().map(|layer| layer.dir.clone()).collect(),
        })
    }
}

/// Entries of the directories on the way to `parent` that were not there for `last` yet.
fn directories<W: std::io::Write>(
    builder: &mut tar::Builder<W>,
    last: &Path,
    parent: &Path,
) -> Result<()> {
    let mut missing: Vec<_> = parent
        .ancestors()
        .filter(|path| !path.as_os_str().is_empty() && !last.starts_with(path))
        .collect();
    missing.reverse();
    for path in missing {
        let mut header = header(0o755, 0);
        header.set_entry_type(tar::EntryType::Directory);
        builder.append_data(&mut header, path, std::io::empty())?;
    }
    Ok(())
}

fn header(mode: u32, length: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(length);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Bytes that look random, the same on every run and different for every file.
fn noise(layer: &str, path: &str, length: usize) -> Vec<u8> {
    let seed = layer
        .bytes()
        .chain(path.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut state = seed | 1;
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
