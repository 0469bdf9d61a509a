//! The holder: generations, its own death, the death of both, and a table that is no good.

use std::{fs, io::Write};

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::world::{FIXTURE, World, eventually};

const MIB: u64 = 1 << 20;

#[test]
fn both_dead_is_an_error_and_never_zeros() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": 4 * MIB, "regions": [
            { "start": 0, "end": MIB, "mode": "stall" },
        ] },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let image = world.image("image", 4 * MIB, &[("file", 0, 4 * MIB)]);
    if !world.mount_erofs(&image, 1, "root") {
        return;
    }
    let file = world.path("root").join("file");
    let waiting = [
        world.reader(&file, &["--node", "1"]),
        world.reader(&world.node(1), &["--node", "1"]),
    ];
    eventually("they wait", || daemon.stats("waiting") >= 2);
    // The holder first, and the daemon before it can start another.
    let holder = world.holder().unwrap();
    daemon.kill();
    kill_process(holder, Signal::KILL).unwrap();
    for reader in waiting {
        let report = reader.report();
        assert_eq!(report.number("bytes"), 0);
        assert_eq!(
            report.0["errors"].as_array().unwrap().len(),
            1,
            "{report:?}"
        );
    }
    let after = world
        .reader(&file, &["--node", "1", "--offset", "2097152"])
        .report();
    assert_eq!(
        (after.number("bytes"), after.0["wrong"].clone()),
        (0, json!([]))
    );
    assert!(
        after.0["errors"][0]
            .as_str()
            .unwrap()
            .contains("os error 5")
    );
    let after = world.reader(&world.node(1), &[]).report();
    assert!(
        after.0["errors"][0]
            .as_str()
            .unwrap()
            .contains("os error 107")
    );
    // The next daemon clears the dead session away and says that it is a new one.
    world.release();
    let daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(false));
    let fuse = world.mounts().into_iter().filter(|m| m.fs_type == "fuse");
    assert_eq!(fuse.count(), 1);
    let report = world.reader(&world.node(1), &["--node", "1"]).report();
    assert_eq!(report.is_right().number("bytes"), 4 * MIB);
}

#[test]
fn a_dead_holder_is_replaced_and_the_session_goes_on() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": MIB, "regions": [{ "start": 0, "end": MIB, "mode": "stall" }] },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let waiting = world.reader(&world.node(1), &["--node", "1"]);
    eventually("it waits", || daemon.stats("waiting") > 0);
    let first = world.holder().unwrap();
    world.kill_holder();
    eventually("another holder lives", || {
        world.holder().is_some_and(|pid| pid != first)
    });
    // It says nothing when it has everything, so ask it: adoption works only then.
    eventually("it has the session", || {
        daemon.ask("holds", "holds")["sessions"] == json!(1)
    });
    daemon.kill();
    let daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(true));
    assert!(daemon.ready["replayed"].as_u64().unwrap() > 0);
    world.release();
    assert_eq!(waiting.report().is_right().number("bytes"), MIB);
}

#[test]
fn a_second_daemon_waits_for_the_first_ones_readers() {
    let Some(world) = World::new(&json!([{ "node": 1, "size": MIB }])) else {
        return;
    };
    let first = world.daemon();
    let second = world.spawn_daemon(&["--fence-ms", "300"]);
    let (status, stderr) = second.exit();
    assert!(!status.success());
    assert!(stderr.contains("did not answer adopt within"), "{stderr}");
    // The first one still serves.
    let report = world.reader(&world.node(1), &["--node", "1"]).report();
    assert_eq!(report.is_right().number("bytes"), MIB);
    // A patient one takes over as soon as the first is gone.
    let mut third = world.spawn_daemon(&[]);
    std::thread::sleep(std::time::Duration::from_millis(200));
    first.kill();
    assert_eq!(third.answer("ready")["adopted"], json!(true));
    let report = world.reader(&world.node(1), &["--node", "1"]).report();
    assert_eq!(report.is_right().number("bytes"), MIB);
}

#[test]
fn a_broken_table_is_replaced_and_the_kernel_resends() {
    let Some(world) = World::new(&json!([
        { "node": 1, "size": MIB, "regions": [{ "start": 0, "end": MIB, "mode": "stall" }] },
        { "node": 2, "size": MIB },
    ])) else {
        return;
    };
    let mut daemon = world.daemon();
    let args = ["--node", "1", "--threads", "20", "--block", "4096"];
    let waiting = world.reader(&world.node(1), &args);
    eventually("they wait", || daemon.stats("waiting") >= 20);
    daemon.kill();
    let late = world.reader(&world.node(2), &["--node", "2"]);
    let pid = world.holder().unwrap().as_raw_nonzero();
    let tables = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let table = tables
        .map(|entry| entry.path())
        .find(|path| {
            let target = fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().contains("snapshotterd-requests")
        })
        .unwrap();
    let mut table = fs::OpenOptions::new().write(true).open(table).unwrap();
    table.write_all(b"no table").unwrap();
    let mut daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(true));
    assert_eq!(daemon.ready["resent"], json!(true));
    assert_eq!(daemon.ready["replayed"], json!(0));
    eventually("they wait again", || daemon.stats("waiting") >= 20);
    world.release();
    assert_eq!(waiting.report().is_right().number("bytes"), 20 * MIB);
    assert_eq!(late.report().is_right().number("bytes"), MIB);
    // And the new table carries over the next kill.
    daemon.kill();
    let mut daemon = world.daemon();
    assert_eq!(daemon.ready["resent"], json!(false));
    let report = world.reader(&world.node(2), &["--node", "2"]).report();
    assert_eq!(report.is_right().number("bytes"), MIB);
    daemon.ask("unmount", "stopped");
}

#[test]
fn there_is_one_holder_and_it_stays_while_it_holds() {
    let Some(world) = World::new(&json!([{ "node": 1, "size": MIB }])) else {
        return;
    };
    let daemon = world.daemon();
    let socket = world.path("state").join("holder.sock");
    let second = std::process::Command::new(FIXTURE)
        .arg("holder")
        .arg("--socket")
        .arg(&socket)
        .status()
        .unwrap();
    assert_eq!(second.code(), Some(3));
    let holder = world.holder().unwrap();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        kill_process(holder, signal).unwrap();
    }
    daemon.kill();
    let mut daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(true));
    assert_eq!(world.holder(), Some(holder));
    // A stale socket is no obstacle.
    daemon.ask("unmount", "stopped");
    eventually("the holder ends", || world.holder().is_none());
    drop(daemon);
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let daemon = world.daemon();
    assert_eq!(daemon.ready["adopted"], json!(false));
}
