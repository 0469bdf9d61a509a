//! The probe finds what this machine can do, and leaves nothing behind.

use std::{fs::File, os::fd::AsFd as _, path::PathBuf, time::Duration};

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

#[test]
fn what_a_killed_probe_has_left_is_cleared_away() {
    let Some(world) = World::new(&json!([])) else {
        return;
    };
    // A session nobody holds any more, twice, and an image that was mounted beside it.
    let place = world.path("probe").join("b");
    std::fs::create_dir_all(&place).unwrap();
    let helper = Helper::new(CommandLine::new(FIXTURE, ["mount-helper"]));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bound = Duration::from_secs(20);
    for _ in 0..2 {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let mounted = helper.mount_fuse("probe", &place, device.as_fd(), 128 << 10, bound);
        runtime.block_on(mounted).unwrap();
    }
    let image_file = world.image("left", DEVICE, &[]);
    let device = world.path("left-device");
    File::create(&device).unwrap().set_len(DEVICE).unwrap();
    let target = world.path("probe").join("e1");
    std::fs::create_dir_all(&target).unwrap();
    let answer = world.helper(&json!({
        "op": "mount_erofs", "metadata": image_file, "devices": [device],
        "target": target, "direct_io": false,
    }));
    let left = world.mounts().len();
    assert_eq!(left, 2 + usize::from(answer["result"] == json!("done")));
    let report = probe(&world, image(&world));
    assert_eq!(report.fuse, Finding::Works);
}
