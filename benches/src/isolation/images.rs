//! The two images: one whose registry will stall, one whose registry goes on.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Write as _},
    path::Path,
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

use super::content;

/// Read again and again once it is local.
pub(super) const LOCAL_FILE: &str = "local";
/// Each read of it has to ask the registry.
pub(super) const REMOTE_FILE: &str = "remote";
/// More than what a request takes along.
pub(super) const REMOTE_STEP: u64 = 576 << 10;
/// Readers of one layer of the stalled image.
const READERS_PER_LAYER: u64 = 1250;
/// First and last file of a layer nobody reads: more than what comes along with its index.
const END_BYTES: u64 = 2 << 20;
const CHUNK_BYTES: u32 = 64 << 10;

/// An image in a registry.
#[derive(Debug)]
pub(super) struct Pushed {
    pub(super) reference: String,
    pub(super) layers: Vec<Digest>,
}

/// A file that one reader of the stalled image waits for: one chunk.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Waited {
    pub(super) path: String,
    pub(super) len: u64,
}

/// The files of one round, and which layers of the image they are in.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) files: Vec<Waited>,
    pub(super) layers: std::ops::Range<usize>,
}

/// What the stalled image consists of: layers for each round, because what was read once is local.
pub(super) fn rounds(rounds: usize, readers: u64) -> Vec<Round> {
    let layers = usize::try_from(readers.div_ceil(READERS_PER_LAYER)).unwrap_or(1);
    let of_round = |round: usize| Round {
        files: (0..readers)
            .map(|reader| {
                let layer = round as u64 * layers as u64 + reader / READERS_PER_LAYER;
                Waited {
                    path: format!("{layer}/{reader}"),
                    // 4 to 8 KB, in no order.
                    len: 4097 + reader * 977 % 4000,
                }
            })
            .collect(),
        layers: round * layers..(round + 1) * layers,
    };
    (0..rounds).map(of_round).collect()
}

/// Pushes the image for these rounds.
pub(super) fn push_stalling(work: &Workdir, lab: &Handle, rounds: &[Round]) -> Result<Pushed> {
    let mut layers = Vec::new();
    for round in rounds {
        for number in round.layers.clone() {
            let directory = format!("{number}/");
            let own = round.files.iter();
            let own = own.filter(|file| file.path.starts_with(&directory));
            let own = own.map(|file| (file.path.clone(), file.len));
            layers.push(layer(work, lab, "a", &number.to_string(), own)?);
        }
    }
    push(lab, "a", &layers)
}

/// Pushes the image of the readers that are measured.
pub(super) fn push_measured(
    work: &Workdir,
    lab: &Handle,
    local: u64,
    remote: u64,
) -> Result<Pushed> {
    let layers = [(LOCAL_FILE, local), (REMOTE_FILE, remote)].map(|(name, len)| {
        let own = std::iter::once((name.to_owned(), len));
        layer(work, lab, "b", &format!("ends-of-{name}"), own)
    });
    push(lab, "b", &layers.into_iter().collect::<Result<Vec<_>>>()?)
}

struct Layer {
    descriptor: Descriptor,
    diff_id: Digest,
}

fn repository(image: &str) -> String {
    format!("bench/isolation-{image}")
}

/// A layer of `files` and, in `directory`, one file before and one after them.
fn layer(
    work: &Workdir,
    lab: &Handle,
    image: &str,
    directory: &str,
    files: impl Iterator<Item = (String, u64)>,
) -> Result<Layer> {
    let path = |name: &str| work.path().join(name);
    let (tar, blob) = (path("layer.tar"), path("layer.blob"));
    let mut builder = tar::Builder::new(BufWriter::new(File::create(&tar)?));
    let mut folder = header(0o755, 0);
    folder.set_entry_type(tar::EntryType::Directory);
    builder.append_data(&mut folder, format!("{directory}/"), std::io::empty())?;
    let ends = ["first", "last"].map(|end| (format!("{directory}/{end}"), END_BYTES));
    let [first, last] = ends;
    for (path, len) in std::iter::once(first).chain(files).chain([last]) {
        let mut header = header(0o644, len);
        builder.append_data(&mut header, &path, content::file(&path, len))?;
    }
    builder.into_inner()?.flush()?;
    let built = pack(&tar, &blob).with_context(|| format!("packing layer {directory}"))?;
    let (digest, len) = lab.push_blob_from(&repository(image), File::open(&blob)?)?;
    std::fs::remove_file(&tar)?;
    std::fs::remove_file(&blob)?;
    let mut descriptor = Descriptor::new(media_type::OCI_LAYER_GZIP, digest, len);
    descriptor.annotations.extend(built.annotations());
    Ok(Layer {
        descriptor,
        diff_id: built.diff_id,
    })
}

fn pack(tar: &Path, blob: &Path) -> Result<stargz::Built> {
    let options = WriterOptions {
        chunk_size: CHUNK_BYTES,
        level: 1,
        ..WriterOptions::default()
    };
    Ok(stargz::build(
        BufReader::new(File::open(tar)?),
        BufWriter::new(File::create(blob)?),
        &options,
        &Limits::default(),
    )?)
}

fn push(lab: &Handle, image: &str, layers: &[Layer]) -> Result<Pushed> {
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
    let repository = repository(image);
    lab.push_blob(&repository, &config)?;
    let manifest = Manifest::new(
        Descriptor::of(media_type::OCI_CONFIG, &config),
        layers
            .iter()
            .map(|layer| layer.descriptor.clone())
            .collect(),
    );
    lab.push_manifest(
        &repository,
        "1",
        media_type::OCI_MANIFEST,
        &manifest.to_json(),
    )?;
    Ok(Pushed {
        reference: format!("{}/{repository}:1", lab.host()),
        layers: layers.iter().map(|layer| layer.descriptor.digest).collect(),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_readers_and_no_two_rounds_share_a_file() {
        let rounds = rounds(3, 2600);
        let paths: std::collections::BTreeSet<_> = rounds
            .iter()
            .flat_map(|round| round.files.iter().map(|file| &file.path))
            .collect();
        assert_eq!(paths.len(), 3 * 2600);
        assert_eq!(rounds[1].layers, 3..6);
        assert!(rounds[1].files[0].path.starts_with("3/"));
        assert!(rounds[1].files[2599].path.starts_with("5/"));
    }
}
