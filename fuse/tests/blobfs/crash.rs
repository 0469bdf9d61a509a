//! kill -9 of the daemon, at any moment, is a pause.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use skip::skip;

use crate::world::{World, eventually};

const MIB: u64 = 1 << 20;
const KILLS: u32 = 100;

#[test]
fn a_hundred_kills_at_random_moments_fail_no_read() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": 32 * MIB },
        { "node": 2, "size": 64 * MIB, "open_ms": 3, "regions": [
            { "start": 0, "end": 64 * MIB, "mode": { "slow": 1 } },
        ] },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let image = world.image("image", 64 * MIB, &[("file", 0, 64 * MIB)]);
    if !world.mount_erofs(&image, 2, "root") {
        return;
    }
    let until_done = world.path("done").display().to_string();
    let (size, small) = (
        (32 * MIB).to_string(),
        ["--block", "4096", "--random", "500"],
    );
    let common = ["--node", "1", "--until", &until_done, "--len", &size];
    let readers = [
        world.reader(&world.node(1), &[&common[..], &small].concat()),
        world.reader(
            &world.path("root").join("file"),
            &["--node", "2", "--until", &until_done, "--threads", "2"],
        ),
        // Opens and closes all the time.
        world.reader(
            &world.node(2),
            &["--node", "2", "--until", &until_done, "--len", "8192"],
        ),
    ];
    let mut random = 12_345_u64;
    let (mut replayed, mut starts) = (0, Vec::new());
    for _ in 0..KILLS {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        thread::sleep(Duration::from_micros((random >> 40) % 60_000));
        daemon.kill();
        let started = Instant::now();
        daemon = world.daemon();
        starts.push(started.elapsed());
        assert_eq!(daemon.ready["adopted"], json!(true));
        replayed += daemon.ready["replayed"].as_u64().unwrap();
    }
    std::fs::write(world.path("done"), b"").unwrap();
    for reader in readers {
        let report = reader.report();
        report.is_right();
        eprintln!(
            "{KILLS} kills: {} reads, longest {} us, median {} us",
            report.number("reads"),
            report.number("longest_us"),
            report.number("median_us")
        );
    }
    starts.sort();
    eprintln!(
        "{replayed} requests replayed; kill to ready: median {:?}, longest {:?}",
        starts[starts.len() / 2],
        starts[starts.len() - 1]
    );
    assert!(replayed > 0, "no kill met a request: this tested nothing");
    // The books are right after all that: closing what is open leaves nothing open.
    assert!(world.mounts().iter().any(|m| m.fs_type == "erofs"));
    world.helper(&json!({ "op": "umount", "target": world.path("root"), "lazy": false }));
    eventually("nothing is open", || {
        daemon.ask("stats", "stats")["used"] == json!(0)
    });
    daemon.ask("unmount", "stopped");
    assert!(world.mounts().is_empty());
}

#[test]
fn a_mount_in_flight_neither_holds_the_successor_nor_is_lost() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": MIB, "open_ms": 1_000 },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let image = world.image("image", MIB, &[("file", 0, MIB)]);
    let target = world.path("root");
    std::fs::create_dir(&target).unwrap();
    for _ in 0..5 {
        daemon.tell(&format!("mount {} 1 {}", image.display(), target.display()));
        eventually("the open waits", || daemon.stats("waiting") > 0);
        daemon.kill();
        // It becomes ready although the mount needs it.
        daemon = world.daemon();
        assert_eq!(daemon.ready["adopted"], json!(true));
        let settled = daemon.ask("settle", "settled");
        assert_eq!(settled["stuck"], json!(0));
        if !world.mounts().iter().any(|m| m.fs_type == "erofs") {
            skip("no EROFS on FUSE here");
            return;
        }
        let file = target.join("file");
        let report = world.reader(&file, &["--node", "1"]).report();
        assert_eq!(report.is_right().number("bytes"), MIB);
        world.helper(&json!({ "op": "umount", "target": target, "lazy": false }));
    }
}

#[test]
fn a_clean_stop_keeps_mounts_and_waiting_readers() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": MIB, "regions": [{ "start": 0, "end": MIB, "mode": "stall" }] },
        { "node": 2, "size": MIB },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let waiting = world.reader(&world.node(1), &["--node", "1"]);
    eventually("it waits", || daemon.stats("waiting") > 0);
    daemon.ask("stop", "stopped");
    assert!(daemon.exit().0.success());
    let late = world.reader(&world.node(2), &["--node", "2"]);
    world.release();
    let mut daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(true));
    assert_eq!(waiting.report().is_right().number("bytes"), MIB);
    assert_eq!(late.report().is_right().number("bytes"), MIB);
    daemon.ask("unmount", "stopped");
}
