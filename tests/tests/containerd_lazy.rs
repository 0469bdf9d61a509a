//! eStargz images of ours in real containerd: lazily served trees equal ordinary pulls.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use formats::stargz::WriterOptions;
use suite::{
    containerd::{Line, PLUGIN},
    cri::{self, Cri},
    images, isolate,
    listing::{self, Listing},
    node::Node,
    pushed::{self, PushedImage, PushedLayer, SAMPLE_COMMAND},
    skip,
};

const CONFIG: &str = "lazy.hydration = \"off\"\n";

fn list(node: &Node, image: &PushedImage, snapshotter: &str) -> Listing {
    let name = format!("view-{snapshotter}-{}", image.manifest.hex());
    let target = node.work.sub(&name);
    node.containerd.list(&image.top(), snapshotter, &target)
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
    node.containerd.pull(&plain.reference, "overlayfs");
    let oracle = list(&node, &plain, "overlayfs");
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
    let found = listing::differences(&oracle, &list(&node, &lazy, PLUGIN), &images::allowed());
    assert!(found.is_empty(), "lazy:\n{}", found.join("\n"));

    let mixed = layers(|index| index % 2 == 1);
    let other = layers(|index| index % 2 == 0);
    for (tag, layers) in [("mixed", mixed), ("other", other)] {
        let image = PushedImage::push(&node.lab, "odd", tag, &layers);
        node.containerd.pull_lazily(&image.reference, PLUGIN);
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

fn runs(line: Line) {
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
    benches::client::lazy_layers(&node.daemon.admin()).unwrap();
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
