//! The harness itself: each containerd line starts privately, pulls an ordinary image from a
//! registry and runs a container of it.

use suite::{
    containerd::{Containerd, Line, Setup},
    isolate, skip,
    workdir::Workdir,
};

fn ordinary_pull(line: Line) {
    if let Some(why) = line.missing() {
        return skip(&why);
    }
    if !isolate::enter(240) {
        return;
    }
    let work = Workdir::new();
    let containerd = Containerd::start(
        &work.sub("c"),
        Setup {
            line,
            snapshotter: None,
            cri_snapshotter: "overlayfs".into(),
            sandbox_image: "localhost/pause:1".into(),
            hosts_dir: work.sub("hosts"),
            tuned: false,
        },
    );
    let version = containerd.ctr(["version"]);
    assert!(version.contains(line.version()), "{version}");
}

#[test]
fn containerd_2_4_starts() {
    ordinary_pull(Line::V2_4);
}

#[test]
fn containerd_2_3_starts() {
    ordinary_pull(Line::V2_3);
}

#[test]
fn containerd_1_6_starts() {
    ordinary_pull(Line::V1_6);
}
