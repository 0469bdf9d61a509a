//! One image, pulled, run and looked at.

use std::collections::BTreeMap;

use suite::{
    host::Came,
    images::noise,
    pushed::{PushedImage, PushedLayer, cri_labels, rpull_labels},
    tarball::Tarball,
};

use crate::fixture::{CONFIG, Fixture, ready, runtime};

pub(crate) fn base() -> PushedLayer {
    let mut tar = Tarball::new();
    tar.dir("etc")
        .mode(0o4755)
        .file("etc/suid", b"#!/bin/sh\n")
        .owner(12, 34)
        .xattr("user.note", b"hello")
        .file("etc/note", &noise(3, 300_000))
        .mtime(0, 0)
        .file("epoch", b"x")
        .file("gone", b"deleted above")
        .dir("dir")
        .file("dir/a", b"a")
        .hardlink("dir/b", "dir/a")
        .symlink("link", "dir/a")
        .fifo("pipe")
        .char_device("null", 1, 3)
        .mode(0o2770)
        .owner(5, 6)
        .dir("implied")
        .file("implied/below", b"below");
    PushedLayer::estargz(&tar.finish())
}

pub(crate) fn top() -> PushedLayer {
    let mut tar = Tarball::new();
    tar.whiteout("gone")
        .dir("dir")
        .opaque("dir")
        .file("dir/new", b"new")
        .file("implied/deep/file", b"implied parents");
    PushedLayer::estargz(&tar.finish())
}

/// Directories of [`base`] and [`top`] that some layer implies.
pub(crate) const IMPLIED: [&str; 2] = ["implied", "implied/deep"];

fn pull_and_compare(labels: fn(&PushedImage, usize) -> BTreeMap<String, String>) {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[base(), top()]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let (parent, came) = host.pull(&image, labels).await;
        assert_eq!(
            came,
            [Came::Lazily, Came::Lazily],
            "{}",
            fixture.daemon.log()
        );
        let (key, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &IMPLIED);
        std::fs::write(container.path().join("etc/new"), b"written").expect("a writable root");
        let mounts = host.mounts(&key).await.expect("Mounts");
        assert_eq!(host.mounts(&key).await.expect("Mounts again"), mounts);
        let view = host.key("view");
        let mounts = host.view(&view, &parent).await.expect("a view");
        let viewed = host.mount("v", &mounts);
        assert!(std::fs::write(viewed.path().join("etc/new"), b"no").is_err());
        assert!(viewed.path().join("etc/note").exists());
        assert!(!viewed.path().join("gone").exists());
    });
}

#[test]
fn an_image_announced_by_cri_labels_is_served_lazily() {
    pull_and_compare(cri_labels);
}

#[test]
fn an_image_announced_by_rpull_is_served_lazily() {
    pull_and_compare(rpull_labels);
}

#[test]
fn a_commit_on_a_lazy_chain_and_mid_chain_parents_work() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[base(), top()]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (key, container) = fixture.container(&host, &parent, "c").await;
        std::fs::write(container.path().join("made"), b"here").expect("a writable root");
        std::fs::remove_file(container.path().join("etc/note")).expect("a lower file");
        drop(container);
        let committed = host.key("committed");
        host.commit(&committed, &key, BTreeMap::new())
            .await
            .expect("a commit");
        let (_, child) = fixture.container(&host, &committed, "child").await;
        assert_eq!(
            std::fs::read(child.path().join("made")).expect("kept"),
            b"here"
        );
        assert!(!child.path().join("etc/note").exists());
        assert!(child.path().join("dir/new").exists());
        // On the lower of the two layers alone.
        let middle = host.stat(&parent).await.expect("the top").parent;
        let (_, lower) = fixture.container(&host, &middle, "lower").await;
        assert!(lower.path().join("gone").exists());
        assert!(!lower.path().join("dir/new").exists());
        // The parent of others cannot go, and says so.
        let refused = host.remove(&middle).await.expect_err("it has children");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("remove"), "{refused}");
    });
}
