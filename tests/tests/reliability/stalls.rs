//! A registry that does not answer holds its own images' readers, nobody else's.

use std::{
    thread,
    time::{Duration, Instant},
};

use lab::{Lab, LabOptions, RuleId};
use rustix::process::{Pid, Signal, kill_process};
use suite::{host::Mounted, process::wait_for, pushed::PushedImage};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    worker::{Job, Sums, Worker},
    world::{push, push_remote, ready, sizes},
};

const LONG: Duration = Duration::from_secs(120);
/// Less than a read may wait for its registry.
const SOON: Duration = Duration::from_secs(50);

fn fixture() -> Fixture {
    Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"))
}

fn container(fixture: &Fixture, image: &PushedImage, name: &str) -> Mounted {
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, image).await;
        fixture.container(&host, &parent, name).await.1
    })
}

fn stall(fixture: &Fixture, image: &PushedImage) -> Vec<RuleId> {
    let layers = image.layers.iter();
    layers.map(|l| fixture.lab.stall(l.digest())).collect()
}

/// Image B, half of it local, is read whole while `readers` readers of image A are blocked.
fn isolated(readers: usize, then: impl FnOnce(&Fixture, Worker, &[RuleId])) {
    if !ready(300) {
        return;
    }
    let fixture = fixture();
    let other = Lab::start_blocking(LabOptions::new(fixture.work.sub("registry-b")))
        .expect("a second lab registry");
    let (a, a_sums) = push_remote(
        &fixture.lab,
        "a/stalled",
        11,
        &[vec![5000; readers / 2], vec![9000; readers - readers / 2]],
    );
    let (b, b_sums) = push(
        &other,
        "b/fine",
        12,
        &[sizes(40, &[3 << 20, 500_000]), sizes(40, &[1 << 20])],
    );
    let a_root = container(&fixture, &a, "a");
    let b_root = container(&fixture, &b, "b");
    let scratch = fixture.work.sub("w");
    let once = || Job::Passes {
        stop: "/".into(),
        hold: false,
    };
    let local: Sums = b_sums
        .iter()
        .filter(|(path, _)| path.starts_with("0"))
        .map(|(path, sum)| (path.clone(), *sum))
        .collect();
    Worker::start(&scratch, "b-before", once(), b_root.path(), &local).finish(LONG);
    let rules = stall(&fixture, &a);
    let mut blocked = Worker::start(&scratch, "a", Job::Threads, a_root.path(), &a_sums);
    wait_for("all readers of A to be blocked", SOON, || {
        blocked.assert_running("before it was blocked");
        blocked.blocked() >= readers
    });
    let began = Instant::now();
    let mark = other.log().mark();
    let near = Worker::start(&scratch, "b-local", once(), b_root.path(), &local).finish(LONG);
    let asked = other.log().entries_since(&mark);
    assert!(
        asked.is_empty(),
        "what was local is read locally: {asked:?}"
    );
    let whole = Worker::start(&scratch, "b-whole", once(), b_root.path(), &b_sums).finish(LONG);
    let asked = other.log().entries_since(&mark);
    assert!(!asked.is_empty(), "nothing of B was remote");
    blocked.assert_running("while its registry is stalled");
    eprintln!(
        "{} readers of A blocked (of {readers}) for {:?}; B local: longest read {} ms; B with \
         remote: longest {} ms",
        blocked.blocked(),
        began.elapsed(),
        near.longest_ms,
        whole.longest_ms
    );
    then(&fixture, blocked, &rules);
}

#[test]
fn a_thousand_blocked_readers_do_no_harm_and_die_when_killed() {
    isolated(1100, |_, mut blocked, _| {
        assert!(blocked.blocked() > 0);
        let began = Instant::now();
        blocked.send_kill();
        // The stall goes on: nothing but the signal can have ended them.
        blocked.ended(Duration::from_secs(30));
        eprintln!("dead after {:?}", began.elapsed());
    });
}

#[test]
fn blocked_readers_go_on_when_the_registry_does() {
    isolated(60, |fixture, mut blocked, rules| {
        for rule in rules {
            fixture.lab.release(*rule);
        }
        let report = blocked.finish(LONG);
        assert_eq!(report.passes, 60);
        eprintln!("longest read of A: {} ms", report.longest_ms);
    });
}

/// Through EROFS and overlay as containers have them, not only BlobFs.
#[test]
fn signals_do_no_harm_to_a_blocked_reader() {
    if !ready(200) {
        return;
    }
    let fixture = fixture();
    let (image, sums) = push_remote(
        &fixture.lab,
        "a/b",
        13,
        &[sizes(0, &[600_000, 70_000, 5000])],
    );
    let root = container(&fixture, &image, "c");
    let rules = stall(&fixture, &image);
    let scratch = fixture.work.sub("w");
    let mut blocked = Worker::start(&scratch, "a", Job::Threads, root.path(), &sums);
    wait_for("the readers to be blocked", SOON, || {
        blocked.assert_running("before it was blocked");
        blocked.blocked() >= 3
    });
    let pid = i32::try_from(blocked.pid())
        .ok()
        .and_then(Pid::from_raw)
        .expect("a pid");
    let tasks: Vec<Pid> = std::fs::read_dir(format!("/proc/{}/task", blocked.pid()))
        .expect("its threads")
        .filter_map(|task| Pid::from_raw(task.ok()?.file_name().to_str()?.parse().ok()?))
        .collect();
    for _ in 0..1500 {
        for signal in [Signal::ALARM, Signal::URG] {
            // To every thread: one that is sent to the process goes to a thread that sleeps lightly.
            for task in &tasks {
                tgkill(pid, *task, signal);
            }
            kill_process(pid, signal).expect("a reader");
        }
        thread::sleep(Duration::from_millis(1));
    }
    blocked.assert_running("while signals came");
    assert_eq!(blocked.blocked(), 3);
    for rule in &rules {
        fixture.lab.release(*rule);
    }
    let report = blocked.finish(LONG);
    assert_eq!(report.passes, 3);
    assert!(report.signals > 0, "no signal was handled: {report:?}");
    eprintln!("{report:?}");
}

/// Nobody is there who could answer or abandon the read: the signal alone ends it.
#[test]
fn a_blocked_reader_dies_when_killed_with_no_daemon_alive() {
    if !ready(200) {
        return;
    }
    let mut fixture = fixture();
    let (image, sums) = push_remote(&fixture.lab, "a/b", 14, &[sizes(0, &[600_000, 70_000])]);
    let root = container(&fixture, &image, "c");
    let rules = stall(&fixture, &image);
    let scratch = fixture.work.sub("w");
    let mut blocked = Worker::start(&scratch, "a", Job::Threads, root.path(), &sums);
    wait_for("the readers to be blocked", SOON, || {
        blocked.assert_running("before it was blocked");
        blocked.blocked() >= 2
    });
    fixture.daemon.kill();
    // And one that comes while nobody serves.
    let mut late = Worker::start(&scratch, "late", Job::Threads, root.path(), &sums);
    wait_for("the late readers to be blocked", SOON, || {
        late.blocked() >= 2
    });
    for reader in [&mut blocked, &mut late] {
        reader.assert_running("with no daemon alive");
        let began = Instant::now();
        reader.send_kill();
        reader.ended(Duration::from_secs(30));
        eprintln!("dead after {:?}", began.elapsed());
    }
    // What the dead left is no obstacle.
    for rule in rules {
        fixture.lab.release(rule);
    }
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), serde_json::json!([]));
    let report = Worker::start(&scratch, "b", Job::Threads, root.path(), &sums).finish(LONG);
    assert_eq!(report.passes, 2);
}

fn tgkill(pid: Pid, task: Pid, signal: Signal) {
    // SAFETY: sends a signal to a thread of a child of ours that has not been waited for.
    let done = unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            pid.as_raw_nonzero().get(),
            task.as_raw_nonzero().get(),
            signal.as_raw(),
        )
    };
    assert_eq!(done, 0, "tgkill");
}
