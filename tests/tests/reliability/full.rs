//! A disk that is full when a container starts to read, and has space again later.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::Command,
    time::Duration,
};

use lab::{Lab, LabOptions};
use suite::{daemon::Daemon, process::wait_for, skip, workdir::Workdir};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    worker::{Job, Worker},
    world::{push_remote, ready, sizes},
};

const LONG: Duration = Duration::from_secs(120);

/// A small file system of the mount namespace of this process, gone with it. (EROFS reads its
/// metadata from a file, which has to be on a disk: tmpfs will not do.)
fn mount_small(image: &Path, at: &Path) -> bool {
    fs::create_dir_all(at).expect("a directory");
    let file = File::create(image).expect("an image");
    file.set_len(160 << 20).expect("a sparse file");
    let made = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let command = command.args(args).arg(image);
        let output = if args.contains(&"loop") {
            command.arg(at).output()
        } else {
            command.output()
        };
        output.is_ok_and(|output| output.status.success())
    };
    made("mkfs.ext4", &["-q", "-F", "-m", "0"]) && made("mount", &["-o", "loop"])
}

/// Writes until nothing more fits.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("a file");
    let mut step = 1 << 20;
    while step > 0 {
        match file.write(&vec![7; step]) {
            Ok(n) if n > 0 => {}
            _ => step /= 2,
        }
    }
}

#[test]
fn a_container_reads_on_while_the_disk_is_full() {
    if !ready(200) {
        return;
    }
    let work = Workdir::new();
    let root = work.sub("d").join("root");
    if !mount_small(&work.path().join("image"), &root) {
        skip("a small file system needs mkfs.ext4 and loop devices");
        return;
    }
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
    let daemon = Daemon::start(
        &work.sub("d"),
        &format!("{CONFIG}lazy.hydration = \"off\"\n"),
    );
    let fixture = Fixture { daemon, lab, work };
    let (image, sums) = push_remote(
        &fixture.lab,
        "full/disk",
        31,
        &[
            sizes(60, &[9 << 20, 700_000, 12 << 20]),
            sizes(30, &[20 << 20]),
        ],
    );
    let mounted = runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        fixture.container(&host, &parent, "reader").await.1
    });
    let filler = root.join("filler");
    fill(&filler);
    let once = Job::Passes {
        stop: "/".into(),
        hold: false,
    };
    let scratch = fixture.work.sub("w");
    Worker::start(&scratch, "reader", once, mounted.path(), &sums).finish(LONG);
    let log = fixture.daemon.log();
    let told = log
        .matches("the disk takes no more bytes of layers")
        .count();
    assert_eq!(told, 1, "one warning\n{log}");

    fs::remove_file(&filler).expect("the filler");
    wait_for("the disk to be used again", LONG, || {
        fixture.daemon.log().contains("caches are written again")
    });
    let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
    assert_eq!(status, 200, "{verdicts}");
    for layer in verdicts["layers"].as_array().expect("a list") {
        assert_eq!(layer["verdict"], "proven", "{verdicts}");
        assert_eq!(layer["complete"], true, "{verdicts}");
    }
}
