//! Upstream's `ctr-remote` makes images that we serve, and accepts those that we make.

use formats::oci::{ANNOTATION_TOC_DIGEST, chain_ids};
use lab::{Lab, LabOptions};
use suite::{
    containerd::{Containerd, Line, PLUGIN},
    daemon::Daemon,
    images, listing,
    machine::deb_program,
    node::{Node, plain},
    pushed::{PushedImage, PushedLayer},
    skip,
    workdir::Workdir,
};

use crate::{
    made::{convert, stored},
    world::ready,
};

/// Whether containerd 1.6 and ctr-remote, which make the images and run some for it, are here.
fn makers() -> bool {
    let missing = Line::V1_6.cannot_run().or_else(|| {
        let program = deb_program("ctr-remote", "usr/bin/ctr-remote");
        program
            .is_none()
            .then(|| "no ctr-remote (tests/peers/debs unpacks it)".to_owned())
    });
    if let Some(why) = missing {
        skip(&why);
        return false;
    }
    true
}

/// containerd 1.6 as Debian has it, which upstream's tool works on.
fn maker(work: &Workdir) -> Containerd {
    Containerd::start(&work.sub("maker"), plain(Line::V1_6, work))
}

fn remote(containerd: &Containerd, args: &[&str]) -> Result<String, String> {
    let output = containerd.ctr_remote(args).expect("asked makers() first");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "ctr-remote {args:?}: {}\n{text}\n{error}",
        output.status
    ))
}

#[test]
fn images_made_by_ctr_remote_are_served_lazily() {
    let newer = [Line::V2_4, Line::V2_3];
    let Some(line) = newer.into_iter().find(|line| line.missing().is_none()) else {
        skip("no containerd 2.4.2 or 2.3.7 (tests/peers/build builds them; needs Go)");
        return;
    };
    if !makers() || !ready() {
        return;
    }
    let node = Node::start(line, "lazy.hydration = \"off\"\n");
    let layers = images::oddities();
    let layers: Vec<_> = layers.iter().map(|tar| PushedLayer::gzip(tar)).collect();
    let plain = PushedImage::push(&node.lab, "up/odd", "plain", &layers);

    let maker = maker(&node.work);
    maker.ctr(["images", "pull", "--plain-http", &plain.reference]);
    let record = node.work.path().join("record.json");
    let lines: Vec<String> = [
        ("etc/passwd", 0),
        ("big", 0),
        ("names/with space", 0),
        ("last", 5),
    ]
    .iter()
    .map(|(path, layer)| {
        let digest = plain.manifest;
        format!("{{\"path\":\"{path}\",\"manifestDigest\":\"{digest}\",\"layerIndex\":{layer}}}\n")
    })
    .collect();
    std::fs::write(&record, lines.concat()).expect("a record");
    let record = record.display().to_string();
    let convert = ["images", "convert", "--oci", "--estargz"];
    let variants: [(&str, Vec<&str>); 5] = [
        ("usual", convert.to_vec()),
        (
            "chunk64k",
            [&convert[..], &["--estargz-chunk-size", "65536"]].concat(),
        ),
        (
            "chunk5000",
            [&convert[..], &["--estargz-chunk-size", "5000"]].concat(),
        ),
        (
            "recorded",
            [&convert[..], &["--estargz-record-in", &record]].concat(),
        ),
        (
            "optimize",
            vec!["images", "optimize", "--oci", "--no-optimize"],
        ),
    ];
    let mut made = Vec::new();
    for (tag, args) in variants {
        let target = format!("{}/up/odd:{tag}", node.lab.host());
        let args = [&args[..], &[&plain.reference, &target]].concat();
        remote(&maker, &args).expect("an image made by upstream");
        maker.ctr(["images", "push", "--plain-http", &target, &target]);
        made.push((tag, target));
    }
    drop(maker);

    // What the lazy layers cost; overlayfs pulls the same blobs in between.
    let (mut sent, mut sizes) = (0, std::collections::BTreeMap::new());
    for (tag, reference) in &made {
        let before = node.lab.log().mark();
        let (_, config) = stored(&node.lab, "up/odd", tag);
        let chains = chain_ids(&config.rootfs.diff_ids);
        let top = chains.last().expect("layers").to_string();
        let pulled = |snapshotter: &str| {
            node.containerd.pull(reference, snapshotter);
            let target = node.work.sub(&format!("{snapshotter}-{tag}"));
            node.containerd.list(&top, snapshotter, &target)
        };
        let lazy = pulled(PLUGIN);
        let layers = benches::client::lazy_layers(&node.daemon.admin());
        for layer in layers.unwrap_or_else(|why| panic!("{tag}: {why}")) {
            let bytes = layer["blob_bytes"].as_u64().expect("its size");
            sizes.insert(layer["digest"].to_string(), bytes);
        }
        assert!(lazy.len() > 300, "{tag}: {}", lazy.len());
        let served = node.lab.log().totals_since(&before);
        let oracle = pulled("overlayfs");
        let found = listing::differences(&oracle, &lazy, &images::allowed());
        assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
        // None for the image whose layers are those of another one.
        sent += served.blob_bytes;
    }
    let before = node.lab.log().mark();
    let verdicts = hydrated(&node.daemon);
    sent += node.lab.log().totals_since(&before).blob_bytes;
    let all: u64 = sizes.values().sum();
    assert!(sent > 0);
    assert!(sent * 100 <= all * 101, "{sent} bytes sent of {all}");
    // The empty layer and small ones are the same in several of them.
    assert!(verdicts.len() >= 10, "{verdicts:?}");
    for verdict in &verdicts {
        assert_eq!(verdict["verdict"], "proven", "{verdict}");
    }
}

/// Hydrates all layers and returns the verdicts.
fn hydrated(daemon: &Daemon) -> Vec<serde_json::Value> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let body = serde_json::json!({});
    let admin = daemon.admin();
    let answer = runtime.block_on(core_runtime::admin::post(&admin, "/v1/hydrate", &body));
    let answer = answer.expect("the admin socket");
    answer["layers"].as_array().expect("a list").clone()
}

#[test]
fn upstream_finds_the_toc_digests_of_our_images() {
    if !makers() || !ready() {
        return;
    }
    let work = Workdir::new();
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
    let layers = images::oddities();
    let layers: Vec<_> = layers.iter().map(|tar| PushedLayer::gzip(tar)).collect();
    let plain = PushedImage::push(&lab, "ours/odd", "plain", &layers);
    let maker = maker(&work);
    for (tag, chunk_size) in [("usual", "4194304"), ("small", "65536")] {
        let target = format!("{}/ours/odd:{tag}", lab.host());
        convert(&["--chunk-size", chunk_size, &plain.reference, &target]);
        // Unpacked by containerd 1.6, DiffIDs checked.
        maker.ctr(["images", "pull", "--plain-http", &target]);
        let (manifest, config) = stored(&lab, "ours/odd", tag);
        assert_eq!(manifest.layers.len(), config.rootfs.diff_ids.len());
        for layer in &manifest.layers {
            let digest = layer.digest.to_string();
            let found = remote(&maker, &["images", "get-toc-digest", &digest]);
            let found = found.expect("upstream reads the layer");
            assert_eq!(found.trim(), layer.annotations[ANNOTATION_TOC_DIGEST]);
        }
    }
}
