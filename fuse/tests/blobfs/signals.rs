//! A reader that gets signals sees no error; one that is killed dies.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::world::{World, eventually};

const MIB: u64 = 1 << 20;

fn stalled() -> Option<World> {
    World::new(&json!([
        { "node": 1, "size": 4 * MIB, "regions": [
            { "start": 0, "end": 2 * MIB, "mode": "stall" },
        ] },
    ]))
}

#[test]
fn signals_do_no_harm_to_a_waiting_reader() {
    let Some(world) = stalled() else { return };
    let mut daemon = world.daemon();
    let image = world.image("image", 4 * MIB, &[("file", 0, 3 * MIB)]);
    if !world.mount_erofs(&image, 1, "root") {
        return;
    }
    for path in [world.path("root").join("file"), world.node(1)] {
        let len = (3 * MIB).to_string();
        let args = ["--node", "1", "--len", &len, "--signal-us", "300"];
        let mut storm = world.reader(&path, &args);
        // SIGALRM, handled without SA_RESTART.
        let alarmed = std::thread::spawn({
            let request = json!({
                "op": "read_file", "path": path, "offset": 0, "len": 3 * MIB, "alarm_ms": 3,
            });
            let helper = world.spawn_helper(&request);
            move || helper.answer()
        });
        eventually("both wait", || daemon.stats("waiting") >= 2);
        std::thread::sleep(Duration::from_millis(500));
        assert!(storm.runs(), "it ended before its bytes were there");
        world.release();
        assert_eq!(storm.report().is_right().number("bytes"), 3 * MIB);
        let alarmed = alarmed.join().unwrap();
        assert_eq!(alarmed["bytes"], json!(3 * MIB), "{alarmed}");
        std::fs::remove_file(world.path("release")).unwrap();
    }
}

#[test]
fn a_killed_reader_dies_while_its_range_is_stalled() {
    let Some(world) = stalled() else { return };
    let mut daemon = world.daemon();
    let image = world.image("image", 4 * MIB, &[("file", 0, 3 * MIB)]);
    if !world.mount_erofs(&image, 1, "root") {
        return;
    }
    for path in [world.path("root").join("file"), world.node(1)] {
        let before = daemon.stats("waiting");
        let mut reader = world.reader(&path, &["--node", "1"]);
        eventually("it waits", || daemon.stats("waiting") > before);
        // A harmless signal first: the kernel tells of only one.
        reader.signal(Signal::URG);
        std::thread::sleep(Duration::from_millis(50));
        reader.dies();
    }
    // What the killed reader of the EROFS file left would hold up the unmount for good.
    assert!(
        daemon.ask("abandon 1", "abandoned")["count"]
            .as_u64()
            .unwrap()
            > 0
    );
    let target = world.path("root");
    let done = world.helper(&json!({ "op": "umount", "target": target, "lazy": false }));
    assert_eq!(done["result"], json!("done"));
    eventually("the device closes", || daemon.stats("used") == 0);
}

#[test]
fn a_killed_reader_dies_with_no_daemon_alive() {
    let Some(world) = stalled() else { return };
    let mut daemon = world.daemon();
    let image = world.image("image", 4 * MIB, &[("file", 0, 3 * MIB)]);
    if !world.mount_erofs(&image, 1, "root") {
        return;
    }
    let file = world.path("root").join("file");
    let reader = world.reader(&file, &["--node", "1"]);
    eventually("it waits", || daemon.stats("waiting") > 0);
    daemon.kill();
    reader.dies();
    // And one that comes while nobody serves.
    let mut late = world.reader(&file, &["--node", "1", "--offset", "2097152"]);
    std::thread::sleep(Duration::from_millis(200));
    assert!(late.runs());
    late.dies();
    // What the dead left does not confuse the next daemon.
    world.release();
    let _daemon = world.daemon();
    let report = world.reader(&file, &["--node", "1"]).report();
    assert_eq!(report.is_right().number("bytes"), 3 * MIB);
}
