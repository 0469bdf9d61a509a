//! Images with known content, containers on them, what a runtime asks for.

use std::{collections::BTreeMap, path::Path};

use formats::{digest::Digest, stargz::WriterOptions};
use lab::Handle;
use snapshotterd::api::types::Mount;
use suite::{
    host::Host,
    images::noise,
    isolate, machine,
    pushed::{PushedImage, PushedLayer, cri_labels},
    skip,
    tarball::Tarball,
};
use tonic::{Code, Status};

use crate::worker::Sums;

/// Whether the test may go on: as root, in a process and a mount namespace of its own.
pub(crate) fn ready(seconds: u32) -> bool {
    if !machine::is_root() {
        skip("mounting needs root");
        return false;
    }
    isolate::enter(seconds)
}

/// Sizes of the files of one layer.
pub(crate) fn sizes(small: usize, large: &[usize]) -> Vec<usize> {
    let mut sizes: Vec<usize> = (0..small).map(|n| 1 + (n * 977) % 9000).collect();
    sizes.extend_from_slice(large);
    sizes
}

/// Pushes an image whose layer `n` has files `n/0`, `n/1`, ... of the given sizes. Content depends
/// on `seed`, so that two images share nothing.
pub(crate) fn push(
    lab: &Handle,
    repository: &str,
    seed: u64,
    layers: &[Vec<usize>],
) -> (PushedImage, Sums) {
    let mut sums = Sums::new();
    let mut pushed = Vec::new();
    for (layer, sizes) in layers.iter().enumerate() {
        let mut tar = Tarball::new();
        tar.dir(&layer.to_string());
        for (number, size) in sizes.iter().enumerate() {
            let path = format!("{layer}/{number}");
            let content = noise(seed * 1_000_003 + (layer * 10_007 + number) as u64, *size);
            tar.file(&path, &content);
            sums.insert(path.into(), Digest::of(&content));
        }
        let options = WriterOptions {
            chunk_size: 256 << 10,
            level: 1,
            ..WriterOptions::default()
        };
        pushed.push(PushedLayer::estargz_with(&tar.finish(), &options));
    }
    (PushedImage::push(lab, repository, "1", &pushed), sums)
}

/// First and last file of a layer nobody has read: more than what comes along with its index.
const END_BYTES: usize = 2 << 20;

/// As [`push`], with a file before and one after each layer's own, which are not in the sums: the
/// registry has to be asked for all that are.
pub(crate) fn push_remote(
    lab: &Handle,
    repository: &str,
    seed: u64,
    layers: &[Vec<usize>],
) -> (PushedImage, Sums) {
    let around = |sizes: &Vec<usize>| {
        let mut all = vec![END_BYTES];
        all.extend_from_slice(sizes);
        all.push(END_BYTES);
        all
    };
    let padded: Vec<Vec<usize>> = layers.iter().map(around).collect();
    let (image, mut sums) = push(lab, repository, seed, &padded);
    for (layer, sizes) in padded.iter().enumerate() {
        for end in [0, sizes.len() - 1] {
            sums.remove(Path::new(&format!("{layer}/{end}")));
        }
    }
    (image, sums)
}

/// Pulls; every layer has to be served lazily. An error is what a runtime would have got.
pub(crate) async fn pull(host: &Host, image: &PushedImage) -> Result<String, Status> {
    let mut parent = String::new();
    for (index, chain) in image.chains.iter().enumerate() {
        let chain = chain.to_string();
        if let Some(info) = host.find(&chain, &parent).await? {
            parent = info.name;
            continue;
        }
        let key = host.key(&format!("extract-{index}-test {chain}"));
        match host.prepare(&key, &parent, cri_labels(image, index)).await {
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(status),
            Ok(_) => {
                let _ = host.remove(&key).await;
                return Err(Status::internal(format!("layer {index} is not lazy")));
            }
        }
        let info = host.find(&chain, &parent).await?;
        parent = info
            .ok_or_else(|| Status::internal("AlreadyExists, but List does not find it"))?
            .name;
    }
    Ok(parent)
}

/// A new container's mounts.
pub(crate) async fn container(host: &Host, parent: &str) -> Result<(String, Vec<Mount>), Status> {
    let key = host.key("container");
    let mounts = host.prepare(&key, parent, BTreeMap::new()).await?;
    Ok((key, mounts))
}

/// The holder that serves `state`: a program of this build, started by our daemon.
pub(crate) fn holder_of(state: &Path) -> Option<rustix::process::Pid> {
    let state = state.to_str().expect("a plain path");
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            (line.contains(" holder ") && line.contains(state)).then_some(())?;
            rustix::process::Pid::from_raw(pid)
        })
}
