//! What this kernel can present, tried with a real tiny mount; a good answer holds for the boot.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use formats::{
    erofs,
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Regular},
    units::DecodedOffset,
};
use fuse::{
    mounts::Helper,
    probe::{self, Finding, ProbeImage, ProbeOptions, ProbeReport},
};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::dir::write_whole;

/// Bound for each step of the probe; generous, because a busy machine is no incapable one.
const STEP: Duration = Duration::from_secs(10);
const DEVICE_LEN: u32 = 128 << 10;
const READY: (u64, u64) = (0, 10_000);
const STALLED: (u64, u64) = (64 << 10, 20_000);

/// What was found out, as it is shown and remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    tried: Tried,
    /// By name: `works`, or what does not.
    pub findings: BTreeMap<String, String>,
}

/// What was tried, by whom: findings hold as long as all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tried {
    release: String,
    boot: String,
    version: String,
    /// Where the cache was: direct I/O depends on its file system.
    root: PathBuf,
    device: u64,
}

impl Tried {
    fn now(root: &Path) -> Self {
        Self {
            release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            // Unknown, the release has to do.
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: root.to_owned(),
            device: fs::metadata(root).map_or(0, |metadata| metadata.dev()),
        }
    }
}

impl Findings {
    /// What an earlier start has written to `file`, if it was about the same.
    fn remembered(file: &Path, tried: &Tried) -> Option<Self> {
        let known: Self = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        (known.tried == *tried).then_some(known)
    }

    /// Whether EROFS may read complete layers past the page cache of their files.
    pub fn direct_io(&self) -> bool {
        let works = Finding::Works.to_string();
        self.findings.get("direct_io") == Some(&works)
    }
}

/// Whether layers can be presented lazily here, and the reason if not. `state` remembers a good
/// answer for this boot, daemon version and file system of the cache, which is below `root`.
pub async fn examine(state: &Path, root: &Path, helper: &Helper) -> (Findings, Result<(), String>) {
    let tried = Tried::now(root);
    let remembered = state.join("kernel-probed");
    if let Some(known) = Findings::remembered(&remembered, &tried) {
        return (known, Ok(()));
    }
    let release = tried.release.clone();
    let mut found = Findings {
        tried,
        findings: BTreeMap::new(),
    };
    let image = match image() {
        Ok(image) => image,
        Err(error) => return (found, Err(format!("probe image: {error}"))),
    };
    let unsound = unsound_direct_io(&release);
    let options = ProbeOptions {
        dir: state.join("probe"),
        image_dir: root.join("probe"),
        direct_io: unsound.is_none(),
        helper: helper.clone(),
        runtime: tokio::runtime::Handle::current(),
        step: STEP,
    };
    let mut report = probe::run(&options, image.clone()).await;
    if !report.lazy_works() {
        // Once more: what failed for want of time may work now.
        report = probe::run(&options, image).await;
    }
    if let Some(why) = unsound {
        report.direct_io = Finding::Untried(why);
    }
    let findings = report.findings().into_iter();
    found.findings = findings
        .map(|(name, finding)| (name.to_owned(), finding.to_string()))
        .collect();
    info!(findings = ?found.findings, release, "kernel probed");
    if !report.lazy_works() {
        let why = format!("Linux {release}: {}", failures(&report));
        return (found, Err(why));
    }
    let written = serde_json::to_vec(&found)
        .map_err(io::Error::other)
        .and_then(|text| write_whole(&remembered, &text));
    if let Err(error) = written {
        warn!(%error, "the kernel is probed again at the next start");
    }
    (found, Ok(()))
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

/// Direct I/O that works can still be one that writes to freed memory, which no probe sees: that was
/// so in all kernels that have it until early 2026. Those that have the fix for certain are tried,
/// all others are not.
fn unsound_direct_io(release: &str) -> Option<String> {
    const FIXED: [(u32, u32, u32); 3] = [(6, 12, 85), (6, 18, 20), (6, 19, 10)];
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (major, minor, patch) = (next(), next(), next());
    let sound = major >= 7
        || FIXED
            .iter()
            .any(|fixed| (major, minor) == (fixed.0, fixed.1) && patch >= fixed.2);
    (!sound).then(|| {
        "this kernel may lack the fix of a use-after-free there (in 6.12.85, 6.18.20, 6.19.10, 7.0)"
            .to_owned()
    })
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
    fn direct_io_is_not_tried_where_it_may_be_unsound() {
        for (release, sound) in [
            ("6.12.84-amd64", false),
            ("6.12.85+deb13-amd64", true),
            ("6.17.99", false),
            ("6.18.44-fc-v595", true),
            ("7.0.0-rc1", true),
            ("garbage", false),
        ] {
            assert_eq!(unsound_direct_io(release).is_none(), sound, "{release}");
        }
    }

    #[test]
    fn findings_hold_for_the_same_boot_version_and_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kernel-probed");
        let tried = Tried::now(dir.path());
        assert!(!tried.boot.is_empty() && tried.device != 0, "{tried:?}");
        assert_eq!(Findings::remembered(&file, &tried), None);
        let found = Findings {
            tried: tried.clone(),
            findings: [("fuse".to_owned(), "works".to_owned())].into(),
        };
        write_whole(&file, &serde_json::to_vec(&found).unwrap()).unwrap();
        assert_eq!(Findings::remembered(&file, &tried), Some(found));
        for other in [
            Tried {
                boot: "another".into(),
                ..tried.clone()
            },
            Tried {
                version: "0".into(),
                ..tried.clone()
            },
            Tried {
                device: tried.device + 1,
                ..tried.clone()
            },
        ] {
            assert_eq!(Findings::remembered(&file, &other), None, "{other:?}");
        }
    }

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
