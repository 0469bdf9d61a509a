//! Upstream's daemon, stargz-snapshotter, serves the images that we make, lazily.

use std::path::Path;

use formats::{
    digest::Digest,
    oci::{Manifest, chain_ids},
};
use lab::{Lab, LabOptions, Totals};
use serde_json::Value;
use suite::{
    containerd::{Containerd, Line},
    images,
    listing::{self, Listing, Row},
    machine::deb_program,
    node::plain,
    pushed::{PushedImage, PushedLayer, SAMPLE_COMMAND, sample},
    skip,
    stargz::{self, PLUGIN, StargzSnapshotter},
    workdir::Workdir,
};

use crate::{
    made::{convert, stored},
    world::ready,
};

/// Nothing but what a read needs, and the start list.
const CONFIG: &str = "no_background_fetch = true\nno_prometheus = true\n";

/// containerd 2.4 with upstream's snapshotter, and a registry. Dropped in this order.
struct Upstream {
    containerd: Containerd,
    stargz: StargzSnapshotter,
    lab: Lab,
    work: Workdir,
}

/// `None`, said loudly, where this machine lacks something.
fn upstream() -> Option<Upstream> {
    if let Some(why) = Line::V2_4.cannot_run().or_else(stargz::missing) {
        skip(&why);
        return None;
    }
    if !ready() {
        return None;
    }
    let work = Workdir::new();
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
    let stargz = StargzSnapshotter::start(&work.sub("s"), CONFIG);
    let setup = plain(Line::V2_4, &work);
    let containerd = Containerd::start_with(&work.sub("c"), setup, &[stargz.proxy()]);
    Some(Upstream {
        containerd,
        stargz,
        lab,
        work,
    })
}

/// A converted image in the registry.
struct Made {
    reference: String,
    manifest: Manifest,
    top: String,
}

impl Upstream {
    /// The oddities as an ordinary image, and what upstream shows of them.
    fn ordinary(&self) -> (PushedImage, Listing) {
        let layers = images::oddities();
        let layers: Vec<_> = layers.iter().map(|tar| PushedLayer::gzip(tar)).collect();
        let image = PushedImage::push(&self.lab, "ours/odd", "ordinary", &layers);
        self.containerd.pull(&image.reference, "overlayfs");
        let target = self.work.sub("oracle");
        let oracle = self.containerd.list(&image.top(), "overlayfs", &target);
        assert!(oracle.len() > 300, "{}", oracle.len());
        (image, as_upstream_shows(&oracle))
    }

    /// An image converted by `snapctl`.
    fn made(&self, repository: &str, tag: &str, source: &str, options: &[&str]) -> Made {
        let reference = format!("{}/{repository}:{tag}", self.lab.host());
        convert(&[options, &[source, &reference]].concat());
        self.stored(repository, tag)
    }

    fn stored(&self, repository: &str, tag: &str) -> Made {
        let reference = format!("{}/{repository}:{tag}", self.lab.host());
        let (manifest, config) = stored(&self.lab, repository, tag);
        let chains = chain_ids(&config.rootfs.diff_ids);
        Made {
            reference,
            manifest,
            top: chains.last().expect("layers").to_string(),
        }
    }

    /// A record of `files`, each with the layer it is in.
    fn record(&self, image: &PushedImage, files: &[(&str, usize)]) -> String {
        let path = self.work.path().join("record.json");
        let digest = image.manifest;
        let line = |(path, layer): &(&str, usize)| {
            let entry = serde_json::json!({
                "path": path, "manifestDigest": digest.to_string(), "layerIndex": layer,
            });
            format!("{entry}\n")
        };
        let lines: String = files.iter().map(line).collect();
        std::fs::write(&path, lines).expect("a record");
        path.display().to_string()
    }

    /// Pulls an image and asserts that upstream made every layer of it a remote one.
    fn pull(&self, made: &Made) -> Totals {
        let before = self.lab.log().mark();
        let earlier = self.stargz.log().len();
        self.containerd.pull(&made.reference, PLUGIN);
        let served = self.lab.log().totals_since(&before);
        let log = self.stargz.log();
        let prepared: Vec<Value> = log[earlier..]
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|line: &Value| line.get("remote-snapshot-prepared").is_some())
            .collect();
        assert!(
            prepared.len() == made.manifest.layers.len()
                && prepared
                    .iter()
                    .all(|line| line["remote-snapshot-prepared"] == "true"),
            "{}: {prepared:#?}",
            made.reference
        );
        served
    }

    /// Whether more than a probe was fetched from the start of a layer, where its start list is.
    fn start_was_fetched(&self, layer: &Digest) -> bool {
        self.lab.log().entries().iter().any(|entry| {
            let starts = |range: &String| range.starts_with("bytes=0-");
            entry.digest == Some(*layer)
                && entry.method == "GET"
                && entry.bytes > 4096
                && entry.range.as_ref().is_none_or(starts)
        })
    }
}

fn layer_bytes(manifest: &Manifest) -> u64 {
    manifest.layers.iter().map(|layer| layer.size).sum()
}

/// Makes of the ordinary pull what upstream shows instead, whoever made the image:
/// `upstream_serves_its_own_images_the_same` compares the same with an image that its tool made.
fn as_upstream_shows(oracle: &Listing) -> Listing {
    let mut shown = oracle.clone();
    let mut row = |path: &str, change: fn(&mut Row)| {
        change(shown.get_mut(Path::new(path)).expect("an oddity"));
    };
    // A TOC holds no time for the epoch; upstream then shows Go's zero time, the year 1.
    row("epoch", |row| row.mtime = -62_135_596_800);
    // containerd's unpack sets times before 1970 to the epoch; upstream shows them as they are.
    row("before", |row| row.mtime = -86_400);
    // containerd's unpack does not restore attributes of this name space; upstream shows them.
    row("admin", |row| {
        row.xattrs.insert(b"trusted.admin".to_vec(), b"no".to_vec());
    });
    // A directory that an upper layer does not describe hides the one below, as root's with 0755.
    for path in ["private", "tmp"] {
        row(path, |row| {
            row.mode = 0o40755;
            (row.uid, row.gid) = (0, 0);
        });
    }
    shown
}

#[test]
fn upstream_serves_our_images_lazily() {
    let Some(upstream) = upstream() else { return };
    let (ordinary, oracle) = upstream.ordinary();
    let files = [("etc/passwd", 0), ("page1", 0), ("holes", 0)];
    let record = upstream.record(&ordinary, &[&files[..], &[("last", 5)]].concat());
    let variants: [(&str, &[&str]); 3] = [
        ("usual", &[]),
        ("recorded", &["--record", &record]),
        ("small", &["--chunk-size", "65536"]),
    ];
    for (tag, options) in variants {
        let made = upstream.made("ours/odd", tag, &ordinary.reference, options);
        let all = layer_bytes(&made.manifest);
        let served = upstream.pull(&made);
        eprintln!(
            "{tag}: {} of {all} bytes served by the pull",
            served.blob_bytes
        );
        assert!(served.blob_bytes < all / 10, "{tag}: {served:#?}");
        let largest = made.manifest.layers.iter().max_by_key(|layer| layer.size);
        let largest = largest.expect("layers");
        let target = upstream.work.sub(tag);
        let lazy = upstream
            .containerd
            .look("view", &made.top, PLUGIN, &target, |root| {
                // A mount waits for the start list, and nothing else has been read yet.
                let fetched = upstream.start_was_fetched(&largest.digest);
                assert_eq!(fetched, tag == "recorded", "{tag}: the start list");
                listing::list(root).expect("a readable tree")
            });
        let found = listing::differences(&oracle, &lazy, &images::allowed());
        assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
        // What was compared came through upstream's file system.
        assert!(upstream.lab.log().blob_bytes(&largest.digest) > largest.size / 2);
    }
}

#[test]
fn upstream_serves_its_own_images_the_same() {
    if deb_program("ctr-remote", "usr/bin/ctr-remote").is_none() {
        return skip("no ctr-remote (tests/peers/debs unpacks it)");
    }
    let Some(upstream) = upstream() else { return };
    let (ordinary, oracle) = upstream.ordinary();
    let containerd = &upstream.containerd;
    let target = format!("{}/ours/odd:theirs", upstream.lab.host());
    let convert = ["images", "convert", "--oci", "--estargz"];
    let converted = containerd
        .ctr_remote([&convert[..], &[&ordinary.reference, &target]].concat())
        .expect("asked before");
    let error = String::from_utf8_lossy(&converted.stderr);
    assert!(converted.status.success(), "{error}");
    containerd.ctr(["images", "push", "--plain-http", &target, &target]);
    // Its content is here: what is unpacked of it would need no registry.
    containerd.ctr(["images", "rm", "--sync", &target]);
    let made = upstream.stored("ours/odd", "theirs");
    let served = upstream.pull(&made);
    let all = layer_bytes(&made.manifest);
    assert!(served.blob_bytes < all / 10, "{served:#?}");
    let lazy = containerd.list(&made.top, PLUGIN, &upstream.work.sub("theirs"));
    let found = listing::differences(&oracle, &lazy, &images::allowed());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn containers_of_our_images_start_under_upstream() {
    let Some(upstream) = upstream() else { return };
    let layers = sample(&upstream.work.sub("sample"));
    let ordinary = PushedImage::push_running(
        &upstream.lab,
        "ours/py",
        "ordinary",
        &layers,
        &SAMPLE_COMMAND,
    );
    for (tag, recorded) in [("usual", false), ("recorded", true)] {
        let record = upstream.record(&ordinary, &[("etc/passwd", 0), ("app/ready.py", 3)]);
        let options: &[&str] = if recorded {
            &["--record", &record]
        } else {
            &[]
        };
        let made = upstream.made("ours/py", tag, &ordinary.reference, options);
        let all = layer_bytes(&made.manifest);
        let pulled = upstream.pull(&made).blob_bytes;
        let before = upstream.lab.log().mark();
        let output = upstream.containerd.run(&made.reference, PLUGIN);
        assert!(output.contains("ready"), "{output}");
        let read = upstream.lab.log().totals_since(&before).blob_bytes;
        eprintln!("{tag}: {pulled} bytes served by the pull, {read} until it ended, of {all}");
        assert!(pulled + read < all, "{tag}");
    }
}
