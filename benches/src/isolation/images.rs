//! The two images: one whose registry will stall, one whose registry goes on.

use anyhow::{Context as _, Result};
use formats::digest::Digest;
use harness::workdir::Workdir;
use lab::Handle;

use super::content;
use crate::packed::{Layer, LayerTar, push_image};

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
    let mut tar = LayerTar::new(work)?;
    tar.directory(directory.as_ref())?;
    let ends = ["first", "last"].map(|end| (format!("{directory}/{end}"), END_BYTES));
    let [first, last] = ends;
    for (path, len) in std::iter::once(first).chain(files).chain([last]) {
        tar.file(path.as_ref(), len, content::file(&path, len))?;
    }
    tar.push(lab, &repository(image), Some(CHUNK_BYTES))
        .with_context(|| format!("layer {directory}"))
}

fn push(lab: &Handle, image: &str, layers: &[Layer]) -> Result<Pushed> {
    Ok(Pushed {
        reference: push_image(lab, &repository(image), "1", layers.iter())?,
        layers: layers.iter().map(|layer| layer.descriptor.digest).collect(),
    })
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
