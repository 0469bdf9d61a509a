//! eStargz images of ours in real containerd: lazily served trees equal ordinary pulls.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use formats::stargz::WriterOptions;
use suite::{
    containerd::{Containerd, Line, PLUGIN},
    cri::{self, Cri},
    images, isolate,
    listing::{self, Allowed, Listing},
    node::{self, Node},
    pushed::{self, PushedImage, PushedLayer, SAMPLE_COMMAND},
    skip,
    tarball::Tarball,
};

const CONFIG: &str = "lazy.hydration = \"off\"\n";

fn list(node: &Node, image: &PushedImage, snapshotter: &str) -> Listing {
    let name = format!("view-{snapshotter}-{}", image.manifest.hex());
    let target = node.work.sub(&name);
    node.containerd.list(&image.top(), snapshotter, &target)
}

/// An ordinary serial pull by containerd 2.4.2, which every line is compared with; by this line's
/// own containerd where that one is missing.
fn oracle(node: &Node, image: &PushedImage) -> Listing {
    if Line::V2_4.missing().is_some() {
        node.containerd.pull(&image.reference, "overlayfs");
        return list(node, image, "overlayfs");
    }
    let newest = (node.containerd.line() != Line::V2_4).then(|| {
        let setup = node::plain(Line::V2_4, &node.work);
        Containerd::start(&node.work.sub("oracle"), setup)
    });
    let newest = newest.as_ref().unwrap_or(&node.containerd);
    newest.pull(&image.reference, "overlayfs");
    // Not by mount(8), which has no room for the options of 120 layers.
    let path = node.work.sub("oracle-view").display().to_string();
    let with = ["--snapshotter", "overlayfs"];
    newest.ctr(["images", "mount", with[0], with[1], &image.reference, &path]);
    let listing = listing::list(path.as_ref()).unwrap();
    newest.ctr(["images", "unmount", "--rm", with[0], with[1], &path]);
    listing
}

/// Reasons of the layers that are not lazy.
fn reasons(node: &Node) -> Vec<String> {
    let answer = benches::client::get(&node.daemon.admin(), "/v1/layers").unwrap();
    let ordinary = answer["not_lazy"].as_array().unwrap().iter();
    ordinary
        .map(|entry| entry["why_not"].as_str().unwrap_or_default().to_owned())
        .collect()
}

fn lazy_layers(node: &Node) -> usize {
    let layers = benches::client::lazy_layers(&node.daemon.admin());
    layers.unwrap().len()
}

fn ready(line: Line) -> bool {
    if let Some(why) = line.missing() {
        skip(&why);
        return false;
    }
    if line == Line::V1_6
        && suite::machine::deb_program("ctr-remote", "usr/bin/ctr-remote").is_none()
    {
        skip("no ctr-remote (tests/peers/debs unpacks it)");
        return false;
    }
    isolate::enter(400)
}

fn equal(line: Line) {
    if !ready(line) {
        return;
    }
    let node = Node::start(line, CONFIG);
    let tars = images::oddities();
    // Which layers are lazy: all, those above ordinary ones, those below them.
    let layers = |is_lazy: fn(usize) -> bool| -> Vec<PushedLayer> {
        let layer = |(index, tar): (usize, &Vec<u8>)| {
            if is_lazy(index) {
                PushedLayer::estargz(tar)
            } else {
                PushedLayer::gzip(tar)
            }
        };
        tars.iter().enumerate().map(layer).collect()
    };
    let plain = PushedImage::push(&node.lab, "odd", "plain", &layers(|_| false));
    let oracle = oracle(&node, &plain);
    assert!(oracle.len() > 300, "{}", oracle.len());

    let lazy = PushedImage::push(&node.lab, "odd", "lazy", &layers(|_| true));
    let before = node.lab.log().mark();
    node.containerd.pull_lazily(&lazy.reference, PLUGIN);
    let served = node.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < lazy.layer_bytes() / 2,
        "{} of {} layer bytes were downloaded by the pull:\n{}",
        served.blob_bytes,
        lazy.layer_bytes(),
        suite::daemon::tail(&node.daemon.log_path()),
    );
    lazy_layers(&node);
    let found = listing::differences(&oracle, &list(&node, &lazy, PLUGIN), &images::allowed());
    assert!(found.is_empty(), "lazy:\n{}", found.join("\n"));

    let mixed = layers(|index| index % 2 == 1);
    let other = layers(|index| index % 2 == 0);
    for (tag, layers, ordinary) in [("mixed", mixed, 4), ("other", other, 8)] {
        let image = PushedImage::push(&node.lab, "odd", tag, &layers);
        node.containerd.pull_lazily(&image.reference, PLUGIN);
        // Those that are packed as ordinary layers, and no other.
        let reasons = reasons(&node);
        assert_eq!(reasons.len(), ordinary, "{tag}: {reasons:?}");
        for why in &reasons {
            assert!(why.contains("no TOC digest"), "{tag}: {why}");
        }
        let found = list(&node, &image, PLUGIN);
        let found = listing::differences(&oracle, &found, &images::allowed());
        assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
    }
}

#[test]
fn trees_equal_an_ordinary_pull_on_2_4() {
    equal(Line::V2_4);
}

#[test]
fn trees_equal_an_ordinary_pull_on_2_3() {
    equal(Line::V2_3);
}

#[test]
fn trees_equal_an_ordinary_pull_on_1_6() {
    equal(Line::V1_6);
}

fn sample(node: &Node) -> Vec<PushedLayer> {
    let layers = pushed::sample(&node.work.sub("sample"));
    PushedLayer::all_estargz(&layers, &WriterOptions::default())
}

/// 120 layers, each of which adds, changes and removes something.
fn deep(line: Line) {
    if !ready(line) {
        return;
    }
    let node = Node::start(line, CONFIG);
    let tars: Vec<Vec<u8>> = (0..120_u64)
        .map(|index| {
            let mut tar = Tarball::new();
            tar.mtime(i64::try_from(index).unwrap() - 60, 0).dir("d");
            tar.file(&format!("d/{index:03}"), &images::noise(index + 1, 300));
            tar.file("changed", format!("by {index}").as_bytes());
            tar.file(&format!("short-lived-{index:03}"), b"gone above");
            if let Some(below) = index.checked_sub(1) {
                tar.whiteout(&format!("short-lived-{below:03}"));
            }
            tar.finish()
        })
        .collect();
    let plain: Vec<_> = tars.iter().map(|tar| PushedLayer::gzip(tar)).collect();
    let plain = PushedImage::push(&node.lab, "deep", "plain", &plain);
    let oracle = oracle(&node, &plain);
    assert_eq!(oracle.len(), 124);
    let lazy: Vec<_> = tars.iter().map(|tar| PushedLayer::estargz(tar)).collect();
    let lazy = PushedImage::push(&node.lab, "deep", "lazy", &lazy);
    let before = node.lab.log().mark();
    node.containerd.pull_lazily(&lazy.reference, PLUGIN);
    let served = node.lab.log().totals_since(&before);
    for layer in &lazy.layers {
        let blob = served.blobs.get(&layer.digest());
        let requests = blob.map_or(0, |blob| blob.requests);
        assert!(
            (1..=2).contains(&requests),
            "{requests} requests for a layer"
        );
    }
    assert_eq!(lazy_layers(&node), 120);
    let found = list(&node, &lazy, PLUGIN);
    let found = listing::differences(&oracle, &found, &Allowed::default());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn images_of_120_layers_equal_an_ordinary_pull_on_2_4() {
    deep(Line::V2_4);
}

#[test]
fn images_of_120_layers_equal_an_ordinary_pull_on_2_3() {
    deep(Line::V2_3);
}

#[test]
fn images_of_120_layers_equal_an_ordinary_pull_on_1_6() {
    deep(Line::V1_6);
}

/// A footer that lies costs laziness only; a layer that the registry does not have, or has half of,
/// fails the pull with a message that names it, and the daemon stays.
fn wrong(line: Line) {
    if !ready(line) {
        return;
    }
    let node = Node::start(line, CONFIG);
    let pid = node.daemon.pid();
    let layer = |seed: u64| {
        let mut tar = Tarball::new();
        tar.file("file", b"content");
        tar.file("padding", &images::noise(seed, 3 << 20));
        PushedLayer::estargz(&tar.finish())
    };
    let mut lie = layer(1);
    let at = lie.blob.windows(6).rposition(|w| w == b"STARGZ").unwrap();
    lie.blob[at - 16..at].copy_from_slice(b"7fffffffffffffff");
    lie.descriptor.digest = formats::digest::Digest::of(&lie.blob);
    let image = PushedImage::push(&node.lab, "footer", "1", &[lie]);
    node.containerd.pull_lazily(&image.reference, PLUGIN);
    let reasons = reasons(&node);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].contains("index of layer"), "{reasons:?}");
    let listing = list(&node, &image, PLUGIN);
    assert!(listing.contains_key(std::path::Path::new("file")));

    for (index, (tag, keep)) in [("missing", None), ("short", Some(1 << 20))]
        .into_iter()
        .enumerate()
    {
        let image = PushedImage::push(&node.lab, tag, "1", &[layer(10 + index as u64)]);
        let digest = image.layers[0].digest();
        let path = node.lab.store().blob_path(&digest);
        match keep {
            None => std::fs::remove_file(&path).unwrap(),
            Some(len) => {
                let file = std::fs::File::options().write(true).open(&path).unwrap();
                file.set_len(len).unwrap();
            }
        }
        let with = ["--plain-http", "--snapshotter", PLUGIN, &image.reference];
        let output = if line == Line::V1_6 {
            let args = [&["images", "rpull"], &with[..]].concat();
            node.containerd.ctr_remote(args).unwrap()
        } else {
            let args = [&["images", "pull"], &with[..]].concat();
            node.containerd.ctr_within(60, args)
        };
        let said = String::from_utf8_lossy(&output.stderr);
        eprintln!("{tag}: {said}");
        assert!(!output.status.success(), "{tag}: pulled without its bytes");
        assert!(said.contains(digest.hex().as_str()), "{tag}: {said}");
    }
    assert_eq!(node.daemon.pid(), pid);
    // It still answers.
    benches::client::get(&node.daemon.admin(), "/v1/status").unwrap();
}

#[test]
fn wrong_layers_are_unpacked_or_named_on_2_4() {
    wrong(Line::V2_4);
}

#[test]
fn wrong_layers_are_unpacked_or_named_on_1_6() {
    wrong(Line::V1_6);
}

fn runs(line: Line) {
    if let Some(why) = line.cannot_run() {
        return skip(&why);
    }
    if !ready(line) {
        return;
    }
    let node = Node::start(line, CONFIG);
    let layers = sample(&node);
    let image = PushedImage::push_running(&node.lab, "shell", "lazy", &layers, &SAMPLE_COMMAND);
    let before = node.lab.log().mark();
    node.containerd.pull_lazily(&image.reference, PLUGIN);
    let output = node.containerd.run(&image.reference, PLUGIN);
    assert!(output.contains("ready"), "{output}");
    let served = node.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < image.layer_bytes(),
        "{} of {} bytes",
        served.blob_bytes,
        image.layer_bytes()
    );
    assert!(lazy_layers(&node) > 0);
}

#[test]
fn a_container_starts_lazily_on_2_4() {
    runs(Line::V2_4);
}

#[test]
fn a_container_starts_lazily_on_2_3() {
    runs(Line::V2_3);
}

#[test]
fn a_container_starts_lazily_on_1_6() {
    runs(Line::V1_6);
}

fn kubernetes(line: Line) {
    if let Some(why) = line.cannot_run() {
        return skip(&why);
    }
    if !ready(line) {
        return;
    }
    let node = Node::start(line, CONFIG);
    let layers = sample(&node);
    let image = PushedImage::push_running(&node.lab, "shell", "cri", &layers, &SAMPLE_COMMAND);
    // The pause container: anything that sleeps.
    let sleep = ["/usr/bin/sleep", "1000"];
    PushedImage::push_running(&node.lab, "pause", "1", &layers, &sleep);

    let before = node.lab.log().mark();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let logs = node.work.sub("logs");
    runtime.block_on(async {
        let cri = Cri::connect(&node.containerd.socket()).await.unwrap();
        let pod = cri::pod("pod", &logs);
        cri.pull_image(&image.reference, Some(pod.clone()))
            .await
            .unwrap();
        let sandbox = cri.run_sandbox(&pod).await.unwrap();
        let container = cri
            .start_container(&sandbox, &pod, "main", &image.reference, &SAMPLE_COMMAND)
            .await
            .unwrap();
        let status = cri.wait(&container, Duration::from_secs(60)).await.unwrap();
        assert_eq!(status.exit_code, 0, "{status:?}");
        cri.remove_sandbox(&sandbox).await.unwrap();
    });
    assert!(lazy_layers(&node) > 0);
    let log = std::fs::read_to_string(logs.join("main.log")).unwrap();
    assert!(log.contains("ready"), "{log}");
    let served = node.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < image.layer_bytes(),
        "{} of {} bytes",
        served.blob_bytes,
        image.layer_bytes()
    );
}

#[test]
fn a_pod_starts_lazily_on_2_4() {
    kubernetes(Line::V2_4);
}

#[test]
fn a_pod_starts_lazily_on_2_3() {
    kubernetes(Line::V2_3);
}

#[test]
fn a_pod_starts_lazily_on_1_6() {
    kubernetes(Line::V1_6);
}
