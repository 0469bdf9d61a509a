//! Reads give the source's bytes or the source's error, nothing else.

use serde_json::json;

use crate::world::{World, eventually};

const MIB: u64 = 1 << 20;

#[test]
fn every_region_reads_as_its_source_says() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": 5 * MIB + 3 },
        { "node": 20, "size": 300_001, "open_ms": 30, "regions": [
            { "start": 0, "end": 300_001, "mode": { "slow": 5 } },
        ] },
        { "node": 3, "size": MIB, "regions": [
            { "start": 524_288, "end": 600_000, "mode": { "fail": 61 } },
        ] },
        { "node": 4, "size": 0 },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(false));
    for (node, size) in [("1", 5 * MIB + 3), ("20", 300_001), ("4", 0)] {
        let path = world.path("mnt").join(node);
        for block in ["131072", "1000", "4096"] {
            let args = ["--node", node, "--block", block];
            let report = world.reader(&path, &args).report();
            assert_eq!(report.is_right().number("bytes"), size);
        }
    }
    let failing = ["--node", "3", "--offset", "524288"];
    let report = world.reader(&world.node(3), &failing).report();
    assert!(
        report.0["errors"][0]
            .as_str()
            .unwrap()
            .contains("os error 61")
    );
    let around = ["--node", "3", "--len", "524288"];
    let report = world.reader(&world.node(3), &around).report();
    assert_eq!(report.is_right().number("bytes"), 524_288);
    let absent = world.reader(&world.node(7), &[]).report();
    assert!(
        absent.0["errors"][0]
            .as_str()
            .unwrap()
            .contains("os error 2")
    );
    let odd = world.reader(&world.path("mnt").join("01"), &[]).report();
    assert!(odd.0["errors"][0].as_str().unwrap().contains("os error 2"));
    // Every node that was opened is closed again, and unmounting leaves nothing behind.
    eventually("nodes close", || {
        daemon.stats("opened") == daemon.stats("closed")
    });
    daemon.ask("unmount", "stopped");
    assert!(daemon.exit().0.success());
    assert!(world.mounts().is_empty());
    eventually("the holder ends", || world.holder().is_none());
}

#[test]
fn large_reads_are_negotiated_and_whole() {
    let Some(world) = World::new(&json!([{ "node": 1, "size": 9 * MIB + 17 }])) else {
        return;
    };
    let mut daemon = world.spawn_daemon(&["--max-read", "1048576", "--readers", "1"]);
    daemon.answer("ready");
    let before = daemon.stats("reads");
    let args = ["--node", "1", "--block", "4194304"];
    let report = world.reader(&world.node(1), &args).report();
    assert_eq!(report.is_right().number("bytes"), 9 * MIB + 17);
    // Reads of 128 KiB would be 73; the buffer's alignment decides how near 10 it comes.
    assert!(daemon.stats("reads") - before <= 18);
    // A successor with a smaller limit still answers the negotiated size in one piece.
    daemon.kill();
    let _daemon = world.daemon();
    let report = world.reader(&world.node(1), &args).report();
    assert_eq!(report.is_right().number("bytes"), 9 * MIB + 17);
}

#[test]
fn erofs_reads_its_device_from_blobfs() {
    let Some(world) = World::new(&json!([
        { "node": 5, "size": 8 * MIB, "regions": [
            { "start": 4 * MIB, "end": 8 * MIB, "mode": { "slow": 3 } },
        ] },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let image = world.image(
        "image",
        8 * MIB,
        &[
            ("small", 4096, 100),
            ("big", 8192, 3 * MIB),
            ("slow", 4 * MIB, 3 * MIB + 5),
        ],
    );
    if !world.mount_erofs(&image, 5, "root") {
        return;
    }
    let root = world.path("root");
    for mapped in ["0", "1"] {
        for (file, base, size) in [
            ("small", "4096", 100),
            ("big", "8192", 3 * MIB),
            ("slow", "4194304", 3 * MIB + 5),
        ] {
            let args = ["--node", "5", "--base", base, "--mmap", mapped];
            let report = world.reader(&root.join(file), &args).report();
            assert_eq!(report.is_right().number("bytes"), size);
        }
    }
    // A lookup of the kernel's own, after which the superblock alone keeps the node open.
    assert_eq!(daemon.stats("closed") + 1, daemon.stats("opened"));
    world.helper(&json!({ "op": "umount", "target": root, "lazy": false }));
    eventually("the device closes", || {
        daemon.stats("opened") == daemon.stats("closed")
    });
}

#[test]
fn a_read_past_its_deadline_fails_and_the_next_one_may_succeed() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": MIB, "regions": [{ "start": 0, "end": 4096, "mode": "stall" }] },
    ])) else {
        return;
    };
    let mut daemon = world.spawn_daemon(&["--deadline-ms", "300"]);
    daemon.answer("ready");
    let report = world.reader(&world.node(1), &["--node", "1"]).report();
    assert!(
        report.0["errors"][0]
            .as_str()
            .unwrap()
            .contains("os error 110")
    );
    world.release();
    let report = world.reader(&world.node(1), &["--node", "1"]).report();
    assert_eq!(report.is_right().number("bytes"), MIB);
}
