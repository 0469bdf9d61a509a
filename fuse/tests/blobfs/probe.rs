//! The probe finds what this machine can do, and leaves nothing behind.

use std::{path::PathBuf, time::Duration};

use fuse::{
    CommandLine,
    mounts::Helper,
    probe::{self, Finding, ProbeImage, ProbeOptions, ProbeReport},
};
use serde_json::json;
use skip::skip;

use crate::world::{FIXTURE, World};

const DEVICE: u64 = 1 << 20;

fn image(world: &World) -> ProbeImage {
    let files = [("ready", 0, 10_000), ("stalled", 65_536, 20_000)];
    let metadata = world.image("probe-image", DEVICE, &files);
    ProbeImage {
        metadata: std::fs::read(metadata).unwrap(),
        device: (0..DEVICE)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect(),
        ready: PathBuf::from("ready"),
        ready_range: 0..10_000,
        stalled: PathBuf::from("stalled"),
        stalled_range: 65_536..85_536,
    }
}

fn probe(world: &World, image: ProbeImage) -> ProbeReport {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let options = ProbeOptions {
        dir: world.path("probe"),
        image_dir: world.path("images"),
        direct_io: true,
        helper: Helper::new(CommandLine::new(FIXTURE, ["mount-helper"])),
        runtime: runtime.handle().clone(),
        step: Duration::from_secs(20),
    };
    let report = runtime.block_on(probe::run(&options, image));
    assert!(world.mounts().is_empty(), "{:?}", world.mounts());
    assert!(!options.dir.exists());
    assert!(!world.path("images").exists());
    report
}

#[test]
fn what_works_is_found_to_work() {
    let Some(world) = World::new(&json!([])) else {
        return;
    };
    let report = probe(&world, image(&world));
    assert_eq!(report.fuse, Finding::Works);
    if !report.erofs_on_fuse.works() {
        skip(&format!("no EROFS on FUSE here: {}", report.erofs_on_fuse));
        return;
    }
    assert_eq!(report.signalled_reader, Finding::Works);
    assert_eq!(report.killed_reader, Finding::Works);
    eprintln!("two overlays: {}", report.two_overlays);
    // A file system without direct I/O, or a kernel without the option, is no failure of the probe.
    eprintln!("direct I/O: {}", report.direct_io);
    assert!(!matches!(report.direct_io, Finding::Untried(_)));
    assert!(report.lazy_works());
}

#[test]
fn what_does_not_work_is_said_with_its_reason() {
    let Some(world) = World::new(&json!([])) else {
        return;
    };
    let mut broken = image(&world);
    broken.metadata[1024] ^= 1; // the superblock's magic
    let report = probe(&world, broken);
    assert_eq!(report.fuse, Finding::Works);
    let Finding::Fails(why) = &report.erofs_on_fuse else {
        panic!("{report:?}");
    };
    assert!(why.contains("mount_erofs"), "{why}");
    let Finding::Fails(why) = &report.direct_io else {
        panic!("{report:?}");
    };
    assert!(why.contains("mount_erofs"), "{why}");
    assert!(!report.killed_reader.works());
    assert!(!report.lazy_works());
}
