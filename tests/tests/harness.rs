//! The harness itself: each containerd line starts privately and is the version it should be.

use suite::{
    containerd::{Containerd, Line},
    isolate,
    node::plain,
    skip,
    workdir::Workdir,
};

fn starts(line: Line) {
    if let Some(why) = line.missing() {
        return skip(&why);
    }
    if !isolate::enter(240) {
        return;
    }
    let work = Workdir::new();
    let containerd = Containerd::start(&work.sub("c"), plain(line, &work));
    let version = containerd.ctr(["version"]);
    assert!(version.contains(line.version()), "{version}");
}

#[test]
fn containerd_2_4_starts() {
    starts(Line::V2_4);
}

#[test]
fn containerd_2_3_starts() {
    starts(Line::V2_3);
}

#[test]
fn containerd_1_6_starts() {
    starts(Line::V1_6);
}
