//! What is read: the same files as ordinary directories and as eStargz layers in the registry.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use harness::workdir::Workdir;
use lab::Lab;

use super::SteadyOptions;
use crate::packed::{self, LayerTar, push_image};

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

/// A layer, both ways.
struct Layer {
    dir: PathBuf,
    packed: packed::Layer,
}

struct Packer<'a> {
    work: &'a Workdir,
    lab: &'a Lab,
}

impl Packer<'_> {
    /// A layer of files with a path and a length each.
    fn layer(&self, name: &str, files: &[(String, usize)]) -> Result<Layer> {
        let dir = self.work.sub("plain").join(name);
        let mut tar = LayerTar::new(self.work)?;
        let mut made = PathBuf::new();
        for (path, length) in files {
            let parent = Path::new(path).parent().context("a file in a directory")?;
            if parent != made {
                fs::create_dir_all(dir.join(parent))?;
                for directory in missing(&made, parent) {
                    tar.directory(directory)?;
                }
                parent.clone_into(&mut made);
            }
            let bytes = noise(name, path, *length);
            fs::write(dir.join(path), &bytes)?;
            tar.file(path.as_ref(), *length as u64, bytes.as_slice())?;
        }
        let packed = tar
            .push(self.lab, REPOSITORY, None)
            .with_context(|| format!("layer {name}"))?;
        Ok(Layer { dir, packed })
    }

    fn image(&self, tag: &str, layers: &[&Layer]) -> Result<Both> {
        let packed = layers.iter().map(|layer| &layer.packed);
        Ok(Both {
            reference: push_image(self.lab, REPOSITORY, tag, packed)?,
            lowers: layers.iter().map(|layer| layer.dir.clone()).collect(),
        })
    }
}

/// The directories on the way to `parent` that were not there for `last` yet.
fn missing<'a>(last: &Path, parent: &'a Path) -> Vec<&'a Path> {
    let mut missing: Vec<_> = parent
        .ancestors()
        .filter(|path| !path.as_os_str().is_empty() && !last.starts_with(path))
        .collect();
    missing.reverse();
    missing
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
