//! Lazy layers through the daemon's socket, as containerd's unpacker drives it.

use std::{collections::BTreeMap, path::Path};

use suite::{
    daemon::Daemon,
    host::{Came, Host, oracle},
    isolate,
    listing::{Allowed, differences, list},
    machine,
    pushed::{PushedImage, PushedLayer, cri_labels, rpull_labels},
    skip,
    tarball::Tarball,
    workdir::Workdir,
};

fn ready() -> bool {
    if !machine::is_root() {
        skip("mounting needs root");
        return false;
    }
    isolate::enter(120)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn lab(work: &Workdir) -> lab::Lab {
    lab::Lab::start_blocking(lab::LabOptions::new(work.sub("registry"))).expect("the lab registry")
}

const CONFIG: &str = "containerd.address = \"\"\n";

fn base() -> PushedLayer {
    let mut tar = Tarball::new();
    tar.dir("etc")
        .mode(0o4755)
        .file("etc/suid", b"#!/bin/sh\n")
        .owner(12, 34)
        .xattr("user.note", b"hello")
        .file("etc/note", &vec![7; 100_000])
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

fn top() -> PushedLayer {
    let mut tar = Tarball::new();
    tar.whiteout("gone")
        .dir("dir")
        .opaque("dir")
        .file("dir/new", b"new")
        .file("implied/deep/file", b"implied parents");
    PushedLayer::estargz(&tar.finish())
}

fn same_tree(image: &PushedImage, root: &Path, work: &Workdir, implied: &[&str]) {
    let expected = work.sub("oracle");
    oracle(image, &expected);
    let allowed = Allowed {
        implied: implied.iter().map(Into::into).collect(),
    };
    let found = differences(
        &list(&expected).expect("the oracle"),
        &list(root).expect("the lazy tree"),
        &allowed,
    );
    assert!(found.is_empty(), "{}", found.join("\n"));
}

fn pull_and_compare(labels: fn(&PushedImage, usize) -> BTreeMap<String, String>) {
    if !ready() {
        return;
    }
    let work = Workdir::new();
    let lab = lab(&work);
    let image = PushedImage::push(&lab, "a/b", "1", &[base(), top()]);
    let daemon = Daemon::start(&work.sub("d"), CONFIG);
    runtime().block_on(async {
        let host = Host::connect(&daemon.socket(), "default", &work.sub("m")).await;
        let (parent, came) = host.pull(&image, labels).await;
        assert_eq!(came, [Came::Lazily, Came::Lazily], "{}", daemon.log());
        let key = host.key("container");
        let mounts = host
            .prepare(&key, &parent, BTreeMap::new())
            .await
            .expect("a container on lazy layers");
        assert_eq!(host.mounts(&key).await.expect("Mounts"), mounts);
        let mounted = host.mount("c", &mounts);
        same_tree(&image, mounted.path(), &work, &["implied", "implied/deep"]);
        std::fs::write(mounted.path().join("etc/new"), b"written").expect("a writable root");
        let view = host.key("view");
        let mounts = host.view(&view, &parent).await.expect("a view");
        let viewed = host.mount("v", &mounts);
        assert!(std::fs::write(viewed.path().join("etc/new"), b"no").is_err());
        assert!(viewed.path().join("etc/note").exists());
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
