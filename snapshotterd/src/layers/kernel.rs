//! What this kernel can present, tried once per boot with a real tiny mount.

use std::{fs, path::Path, time::Duration};

use formats::{
    erofs,
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Regular},
    units::DecodedOffset,
};
use fuse::{
    mounts::Helper,
    probe::{self, Finding, ProbeImage, ProbeOptions, ProbeReport},
};
use tracing::{info, warn};

/// Bound for each step of the probe; generous, because a busy machine is no incapable one.
const STEP: Duration = Duration::from_secs(10);
const DEVICE_LEN: u32 = 128 << 10;
const READY: (u64, u64) = (0, 10_000);
const STALLED: (u64, u64) = (64 << 10, 20_000);

/// Whether layers can be presented lazily here; the reason if not. `state` remembers a good answer
/// until the next boot.
pub async fn presents_lazily(state: &Path, helper: &Helper) -> Result<(), String> {
    let release = release();
    let remembered = state.join("kernel-probed");
    if fs::read_to_string(&remembered).is_ok_and(|text| text == release) {
        return Ok(());
    }
    let image = image().map_err(|error| format!("probe image: {error}"))?;
    let options = ProbeOptions {
        dir: state.join("probe"),
        helper: helper.clone(),
        runtime: tokio::runtime::Handle::current(),
        step: STEP,
    };
    let mut report = probe::run(&options, image.clone()).await;
    if !report.lazy_works() {
        // Once more: what failed for want of time may work now.
        report = probe::run(&options, image).await;
    }
    info!(
        fuse = ?report.fuse,
        erofs_on_fuse = ?report.erofs_on_fuse,
        two_overlays = ?report.two_overlays,
        signalled_reader = ?report.signalled_reader,
        killed_reader = ?report.killed_reader,
        release,
        "kernel probed"
    );
    if !report.lazy_works() {
        return Err(format!("Linux {release}: {}", failures(&report)));
    }
    if let Err(error) = fs::write(&remembered, release) {
        warn!(%error, "the kernel is probed again at the next start");
    }
    Ok(())
}

fn failures(report: &ProbeReport) -> String {
    let findings = [
        ("FUSE", &report.fuse),
        (
            "EROFS with its device on FUSE (Linux 6.12)",
            &report.erofs_on_fuse,
        ),
        ("a signalled reader", &report.signalled_reader),
        ("a killed reader", &report.killed_reader),
    ];
    let failed: Vec<String> = findings
        .into_iter()
        .filter_map(|(what, finding)| match finding {
            Finding::Fails(why) => Some(format!("{what}: {why}")),
            _ => None,
        })
        .collect();
    if failed.is_empty() {
        return "the probe could not be run".to_owned();
    }
    failed.join("; ")
}

/// Whether EROFS may read plain files past their page cache. The path had a use-after-free until
/// early 2026; of the kernels that were maintained then, these have the fix for certain.
pub fn reads_directly() -> bool {
    const FIXED: [(u32, u32, u32); 3] = [(6, 12, 85), (6, 18, 20), (6, 19, 10)];
    let release = release();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (major, minor, patch) = (next(), next(), next());
    major >= 7
        || FIXED
            .iter()
            .any(|fixed| (major, minor) == (fixed.0, fixed.1) && patch >= fixed.2)
}

fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

fn image() -> Result<ProbeImage, erofs::WriteError> {
    let file = |(offset, len): (u64, u64)| Inode {
        attrs: Attrs {
            mode: 0o444,
            ..Attrs::default()
        },
        kind: Kind::Regular(Regular {
            size: len,
            extents: vec![Extent {
                file_offset: 0,
                len,
                decoded: DecodedOffset(offset),
            }],
        }),
        nlink: 1,
    };
    let root = Directory {
        entries: [
            (b"ready".to_vec(), InodeId(1)),
            (b"stalled".to_vec(), InodeId(2)),
        ]
        .into(),
        ..Directory::default()
    };
    let inodes = vec![
        Inode {
            attrs: Attrs::implied_directory(),
            kind: Kind::Directory(root),
            nlink: 2,
        },
        file(READY),
        file(STALLED),
    ];
    // Inode 0 is a directory and all ids are in range.
    let tree = LayerTree::from_inodes(inodes).unwrap_or_else(|_| LayerTree::empty());
    Ok(ProbeImage {
        metadata: erofs::write(&tree, DEVICE_LEN.into())?,
        device: (0..DEVICE_LEN)
            .map(|at| u8::try_from(at % 251).unwrap_or(0))
            .collect(),
        ready: "ready".into(),
        ready_range: READY.0..READY.0 + READY.1,
        stalled: "stalled".into(),
        stalled_range: STALLED.0..STALLED.0 + STALLED.1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_image_holds_its_two_files() {
        let image = image().unwrap();
        let read = erofs::Image::open(&image.metadata).unwrap();
        let tree = read.tree(&formats::limits::Limits::default()).unwrap();
        for name in ["ready", "stalled"] {
            assert!(tree.lookup(name.as_bytes()).is_some(), "{name}");
        }
        assert_eq!(read.device_len(), Some(DEVICE_LEN.into()));
    }
}
