//! Upstream's `ctr-remote` makes images that we serve, and accepts those that we make.

use std::process::Command;

use formats::oci::{ANNOTATION_TOC_DIGEST, ImageConfig, Manifest};
use lab::{Lab, LabOptions, Reference};
use suite::{
    containerd::{Containerd, Line, PLUGIN, Setup},
    daemon::Daemon,
    images::{self, TestLayer},
    listing::{self, Allowed, Listing},
    machine::{binary, deb_program},
    skip,
    workdir::Workdir,
};

use crate::world::ready;

/// Whether containerd 1.6 and ctr-remote, which make the images, are here.
fn makers() -> bool {
    let missing = Line::V1_6.missing().or_else(|| {
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
    let setup = Setup {
        line: Line::V1_6,
        snapshotter: None,
        cri_snapshotter: "overlayfs".into(),
        sandbox_image: "localhost/none:1".into(),
        hosts_dir: work.sub("maker-hosts"),
        tuned: false,
    };
    Containerd::start(&work.sub("maker"), setup)
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

/// Manifest and config of an image in the registry's store.
fn stored(lab: &Lab, repository: &str, tag: &str) -> (Manifest, ImageConfig) {
    let name = repository.parse().expect("a repository");
    let reference = Reference::Tag(tag.parse().expect("a tag"));
    let found = lab.store().manifest(&name, &reference).expect("the store");
    let found = found.unwrap_or_else(|| panic!("{repository}:{tag} was not pushed"));
    let manifest = Manifest::parse(&found.bytes, Some(&found.media_type)).expect("a manifest");
    let config = std::fs::read(lab.store().blob_path(&manifest.config.digest));
    let config = ImageConfig::parse(&config.expect("a config")).expect("a config");
    (manifest, config)
}

/// Pulls an image by `snapshotter`, mounts it and lists it.
fn pulled(containerd: &Containerd, work: &Workdir, reference: &str, snapshotter: &str) -> Listing {
    let with = ["--snapshotter", snapshotter];
    let pull = [
        "images",
        "pull",
        "--plain-http",
        with[0],
        with[1],
        reference,
    ];
    containerd.ctr(pull);
    let name = format!("{snapshotter}-{}", reference.replace(['/', ':'], "_"));
    let target = work.sub(&name);
    let path = target.display().to_string();
    containerd.ctr(["images", "mount", with[0], with[1], reference, &path]);
    let listing = listing::list(&target).expect("a tree");
    containerd.ctr(["images", "unmount", "--rm", with[0], with[1], &path]);
    listing
}

/// Directories of the oddities that an entry is missing for, in some layer: their times are free.
fn allowed() -> Allowed {
    let mut implied: Vec<std::path::PathBuf> =
        ["group", "names", "deep", "many", "private", "tmp", "opaque"]
            .map(Into::into)
            .into();
    let mut deep = std::path::PathBuf::from("deep");
    for part in 1..=9 {
        deep.push(part.to_string());
        implied.push(deep.clone());
    }
    Allowed { implied }
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
    let work = Workdir::new();
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
    let tars = images::oddities();
    let plain: Vec<_> = tars.iter().cloned().map(TestLayer::plain).collect();
    let plain = images::push(&lab, "up/odd", "plain", &plain, &["/none"]);

    let maker = maker(&work);
    maker.ctr(["images", "pull", "--plain-http", &plain.reference]);
    let record = work.path().join("record.json");
    let lines: Vec<String> = [
        ("etc/passwd", 0),
        ("big", 0),
        ("names/with space", 0),
        ("last", 5),
    ]
    .iter()
    .map(|(path, layer)| {
        let digest = plain.digest;
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
        let target = format!("{}/up/odd:{tag}", lab.host());
        let args = [&args[..], &[&plain.reference, &target]].concat();
        remote(&maker, &args).expect("an image made by upstream");
        maker.ctr(["images", "push", "--plain-http", &target, &target]);
        made.push((tag, target));
    }
    drop(maker);

    let config = "[lazy]\nhydration = \"off\"\n[containerd]\naddress = ";
    let socket = work.path().join("c/c.sock").display().to_string();
    let config = format!("{config}{socket:?}\n[registry]\nconfig_path = \"\"\n");
    let daemon = Daemon::start(&work.sub("d"), &config);
    let setup = Setup {
        line,
        snapshotter: Some((daemon.socket(), daemon.root())),
        cri_snapshotter: PLUGIN.into(),
        sandbox_image: "localhost/none:1".into(),
        hosts_dir: work.sub("hosts"),
        tuned: false,
    };
    let containerd = Containerd::start(&work.sub("c"), setup);
    let before = lab.log().mark();
    for (tag, reference) in &made {
        let lazy = pulled(&containerd, &work, reference, PLUGIN);
        benches::client::lazy_layers(&daemon.admin()).unwrap_or_else(|why| panic!("{tag}: {why}"));
        assert!(lazy.len() > 300, "{tag}: {}", lazy.len());
        let served = lab.log().totals_since(&before);
        let oracle = pulled(&containerd, &work, reference, "overlayfs");
        let found = listing::differences(&oracle, &lazy, &allowed());
        assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
        assert!(served.blob_requests > 0);
    }
    let verdicts = hydrated(&daemon);
    // The empty layer and small ones are the same in several of them.
    assert!(verdicts.len() >= 10, "{verdicts:?}");
    for verdict in &verdicts {
        assert_eq!(verdict["verdict"], "proven", "{verdict}");
    }
    drop((containerd, daemon));
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
    let tars = images::oddities();
    let plain: Vec<_> = tars.into_iter().map(TestLayer::plain).collect();
    let plain = images::push(&lab, "ours/odd", "plain", &plain, &["/none"]);
    let maker = maker(&work);
    for (tag, chunk_size) in [("usual", "4194304"), ("small", "65536")] {
        let target = format!("{}/ours/odd:{tag}", lab.host());
        let converted = Command::new("timeout")
            .args(["-k", "5", "120"])
            .arg(binary("snapctl"))
            .args(["image", "convert", "--chunk-size", chunk_size])
            .args([&plain.reference, &target])
            .output()
            .expect("snapctl starts");
        let error = String::from_utf8_lossy(&converted.stderr);
        assert!(converted.status.success(), "snapctl: {error}");
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
