//! Driver overlayfs under real containerd: images that containerd unpacks into it look as in
//! containerd's own overlayfs, and its garbage collector leaves nothing behind.

use std::{fs, path::Path, time::Duration};

use lab::{Lab, LabOptions};
use suite::{
    containerd::{Containerd, Line, PLUGIN, Setup},
    daemon::Daemon,
    images::{self, TestLayer},
    isolate,
    listing::{self, Allowed, Listing},
    process::wait_for,
    skip,
    snapshotter::Snapshotter,
    workdir::Workdir,
};

fn mounted(containerd: &Containerd, work: &Workdir, args: &[&str], reference: &str) -> Listing {
    // ctr keeps leases and snapshots under the target's path.
    let target = work.sub(&args.concat());
    let path = target.display().to_string();
    containerd.ctr([&["images", "mount"], args, &[reference, &path]].concat());
    if args.contains(&"--rw") {
        fs::write(target.join("written"), "here").expect("a writable mount");
    }
    let mut rows = listing::list(&target).expect("a readable tree");
    for row in rows.values_mut() {
        // Directories that no entry describes carry the time of the unpack.
        if row.digest.is_none() && row.target.is_none() {
            row.mtime = 0;
        }
    }
    containerd.ctr([&["images", "unmount", "--rm"], &args[..2], &[&path]].concat());
    rows
}

fn unpacked_images_are_the_same(line: Line) {
    if let Some(why) = line.missing() {
        return skip(&why);
    }
    if !isolate::enter(240) {
        return;
    }
    let work = Workdir::new();
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
    let daemon = Daemon::start(&work.sub("d"), "default_driver = \"overlayfs\"\n");
    let setup = Setup {
        line,
        snapshotter: Some((daemon.socket(), daemon.root())),
        cri_snapshotter: PLUGIN.into(),
        sandbox_image: format!("{}/pause:1", lab.host()),
        hosts_dir: work.sub("hosts"),
        tuned: false,
    };
    let containerd = Containerd::start(&work.sub("c"), setup);
    let layers: Vec<_> = images::oddities()
        .into_iter()
        .map(TestLayer::plain)
        .collect();
    let image = images::push(&lab, "odd", "plain", &layers, &["/none"]);
    let reference = image.reference.as_str();
    let pull = |snapshotter: &str| {
        let args = [
            "images",
            "pull",
            "--plain-http",
            "--snapshotter",
            snapshotter,
        ];
        containerd.ctr([&args[..], &[reference]].concat());
    };
    pull("overlayfs");
    pull(PLUGIN);
    let view = |snapshotter| {
        mounted(
            &containerd,
            &work,
            &["--snapshotter", snapshotter],
            reference,
        )
    };
    let (expected, found) = (view("overlayfs"), view(PLUGIN));
    assert!(expected.len() > 300, "{}", expected.len());
    let differences = listing::differences(&expected, &found, &Allowed::default());
    assert!(differences.is_empty(), "{}", differences.join("\n"));

    let rw = mounted(
        &containerd,
        &work,
        &["--snapshotter", PLUGIN, "--rw"],
        reference,
    );
    assert!(rw.contains_key(Path::new("written")));

    let sn = Snapshotter::connect(&daemon.socket(), PLUGIN);
    let listed = sn.list(&["kind==committed"]).expect("list");
    assert!(listed.len() >= layers.len(), "{listed:?}");
    containerd.ctr(["images", "rm", "--sync", reference]);
    let directories = daemon.root().join("snapshots");
    wait_for("garbage collection", Duration::from_secs(60), || {
        sn.list(&[]).expect("list").is_empty()
            && fs::read_dir(&directories)
                .expect("the directory of snapshots")
                .count()
                == 0
    });
}

#[test]
fn unpacked_images_are_the_same_on_2_4() {
    unpacked_images_are_the_same(Line::V2_4);
}

#[test]
fn unpacked_images_are_the_same_on_2_3() {
    unpacked_images_are_the_same(Line::V2_3);
}

#[test]
fn unpacked_images_are_the_same_on_1_6() {
    unpacked_images_are_the_same(Line::V1_6);
}
