//! Driver overlayfs under real containerd: images that containerd unpacks into it look as in
//! containerd's own overlayfs, and its garbage collector leaves nothing behind.

use std::{fs, path::Path, time::Duration};

use suite::{
    containerd::{Line, PLUGIN},
    images, isolate,
    listing::{self, Allowed, Listing},
    node::Node,
    process::wait_for,
    pushed::{PushedImage, PushedLayer},
    skip,
    snapshotter::Snapshotter,
};

fn listed(node: &Node, image: &PushedImage, snapshotter: &str) -> Listing {
    let target = node.work.sub(snapshotter);
    let mut rows = node.containerd.list(&image.top(), snapshotter, &target);
    for row in rows.values_mut() {
        // Directories that no entry describes carry the time of the unpack.
        if row.digest.is_none() && row.target.is_none() {
            row.mtime = 0;
        }
    }
    rows
}

fn unpacked_images_are_the_same(line: Line) {
    if let Some(why) = line.missing() {
        return skip(&why);
    }
    if !isolate::enter(240) {
        return;
    }
    let node = Node::start(line, "default_driver = \"overlayfs\"\n");
    let layers: Vec<_> = images::oddities()
        .iter()
        .map(|tar| PushedLayer::gzip(tar))
        .collect();
    let image = PushedImage::push(&node.lab, "odd", "plain", &layers);
    let reference = image.reference.as_str();
    node.containerd.pull(reference, "overlayfs");
    node.containerd.pull(reference, PLUGIN);
    let expected = listed(&node, &image, "overlayfs");
    let found = listed(&node, &image, PLUGIN);
    assert!(expected.len() > 300, "{}", expected.len());
    let differences = listing::differences(&expected, &found, &Allowed::default());
    assert!(differences.is_empty(), "{}", differences.join("\n"));

    let target = node.work.sub("writable");
    let write = |root: &Path| fs::write(root.join("written"), "here");
    node.containerd
        .look("prepare", &image.top(), PLUGIN, &target, write)
        .expect("a writable mount");

    let sn = Snapshotter::connect(&node.daemon.socket(), PLUGIN);
    let listed = sn.list(&["kind==committed"]).expect("list");
    assert!(listed.len() >= layers.len(), "{listed:?}");
    node.containerd.ctr(["images", "rm", "--sync", reference]);
    let directories = node.daemon.root().join("snapshots");
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
