//! One stalled source stops nothing else.

use serde_json::json;

use crate::world::{World, eventually};

const MIB: u64 = 1 << 20;
const STALLED: u64 = 5_000;

#[test]
fn five_thousand_stalled_reads_leave_other_nodes_alone() {
    let huge = (STALLED + 1) * MIB;
    let Some(world) = World::new(&json!([
        { "node": 1, "size": huge, "regions": [{ "start": 0, "end": huge, "mode": "stall" }] },
        { "node": 2, "size": 64 * MIB },
        { "node": 3, "size": 2 * MIB, "regions": [
            { "start": 0, "end": 2 * MIB, "mode": { "slow": 2 } },
        ] },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let huge_image = world.image("huge", huge, &[("file", 0, STALLED * MIB)]);
    let image = world.image("image", 64 * MIB, &[("file", 0, 63 * MIB)]);
    if !world.mount_erofs(&huge_image, 1, "stalled") || !world.mount_erofs(&image, 2, "local") {
        return;
    }
    let (threads, stride) = (STALLED.to_string(), MIB.to_string());
    let args = [
        "--threads",
        &threads,
        "--stride",
        &stride,
        "--block",
        "4096",
    ];
    let stalled = world.reader(&world.path("stalled").join("file"), &args);
    eventually("all of them wait", || daemon.stats("waiting") >= STALLED);

    let len = (63 * MIB).to_string();
    let args = [
        "--node", "2", "--len", &len, "--block", "4096", "--random", "5000",
    ];
    let report = world
        .reader(&world.path("local").join("file"), &args)
        .report();
    assert_eq!(report.is_right().number("reads"), 5000);
    let report = world.reader(&world.node(2), &["--node", "2"]).report();
    assert_eq!(report.is_right().number("bytes"), 64 * MIB);
    // A remote read of a third node comes through too.
    let report = world.reader(&world.node(3), &["--node", "3"]).report();
    assert_eq!(report.is_right().number("bytes"), 2 * MIB);
    eprintln!(
        "beside {} stalled reads: {report:?}",
        daemon.stats("waiting")
    );
    // They survive the daemon, and die when they are told to.
    daemon.kill();
    let mut daemon = world.daemon();
    assert!(daemon.ready["replayed"].as_u64().unwrap() >= STALLED);
    eventually("all of them wait again", || {
        daemon.stats("waiting") >= STALLED
    });
    let report = world.reader(&world.node(2), &["--node", "2"]).report();
    assert_eq!(report.is_right().number("bytes"), 64 * MIB);
    stalled.dies();
}
