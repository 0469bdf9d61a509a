//! Layers that are not lazy, and why.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use suite::{
    host::Came,
    pushed::{PushedImage, PushedLayer, cri_labels, rpull_labels},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, ready, runtime},
    simple::{base, top},
};

type Labels = BTreeMap<String, String>;

/// Pulls the image, expects its only layer to be unpacked, and returns the reason shown.
async fn reason(
    fixture: &Fixture,
    image: &PushedImage,
    labels: impl Fn(&PushedImage, usize) -> Labels,
) -> String {
    let host = fixture.host("default").await;
    let (parent, came) = host.pull(image, labels).await;
    assert_eq!(came, [Came::Unpacked], "{}", image.reference);
    let (_, container) = fixture.container(&host, &parent, "c").await;
    fixture.same_tree(image, container.path(), &[]);
    drop(container);
    assert!(
        fixture
            .daemon
            .log()
            .contains("remote-snapshot-prepared=\"false\"")
    );
    let shown = fixture.why_not(image, 0);
    eprintln!("{}: {shown}", image.reference);
    shown
}

/// One sentence: image and layer are named, the layer not again and again.
fn names_once(why: &str, image: &PushedImage) {
    eprintln!("{why}");
    assert!(why.contains(&image.reference), "{why}");
    let named = image.layers.iter().map(|layer| layer.digest().to_string());
    let named: usize = named.map(|digest| why.matches(&digest).count()).sum();
    assert_eq!(named, 1, "{why}");
}

fn one_file(content: &str) -> Vec<u8> {
    Tarball::new().file("file", content.as_bytes()).finish()
}

#[test]
fn each_reason_is_recorded_and_shown() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let lab = &fixture.lab;
    let push = |name: &str, layer: PushedLayer| PushedImage::push(lab, name, "1", &[layer]);
    runtime().block_on(async {
        let image = push("r/none", PushedLayer::estargz(&one_file("none")));
        let why = reason(&fixture, &image, |image, index| {
            let mut labels = cri_labels(image, index);
            labels.retain(|name, _| name == "containerd.io/snapshot.ref");
            labels
        })
        .await;
        assert!(why.contains("no image labels"), "{why}");

        let image = push("r/plain", PushedLayer::gzip(&one_file("plain")));
        let why = reason(&fixture, &image, cri_labels).await;
        assert!(why.contains("no TOC digest"), "{why}");
        let why_rpull = push("r/plain2", PushedLayer::gzip(&one_file("plain2")));
        let why = reason(&fixture, &why_rpull, rpull_labels).await;
        assert!(why.contains("no TOC digest"), "{why}");

        let mut layer = PushedLayer::estargz(&one_file("lied"));
        let lie = formats::digest::Digest::of(b"another TOC").to_string();
        layer
            .descriptor
            .annotations
            .insert(formats::oci::ANNOTATION_TOC_DIGEST.to_owned(), lie.clone());
        let image = push("r/lied", layer);
        let why = reason(&fixture, &image, cri_labels).await;
        assert!(why.contains(&lie) && why.contains("has digest"), "{why}");

        let mut layer = PushedLayer::gzip(&one_file("not estargz"));
        layer
            .descriptor
            .annotations
            .insert(formats::oci::ANNOTATION_TOC_DIGEST.to_owned(), lie.clone());
        let image = push("r/footer", layer);
        let why = reason(&fixture, &image, cri_labels).await;
        assert!(why.contains("index of layer"), "{why}");

        let mut layer = PushedLayer::estargz(&one_file("zstd"));
        layer.descriptor.media_type = formats::oci::media_type::OCI_LAYER_ZSTD.to_owned();
        let image = push("r/zstd", layer);
        let why = reason(&fixture, &image, cri_labels).await;
        assert!(why.contains("media type"), "{why}");

        let image = push("r/missing", PushedLayer::estargz(&one_file("missing")));
        let repository = "r/missing".parse().expect("a name");
        lab.store()
            .delete_blob(&repository, &image.layers[0].digest())
            .expect("deleted");
        let why = reason(&fixture, &image, cri_labels).await;
        assert!(why.contains("does not have it (404"), "{why}");
        names_once(&why, &image);

        let image = push("r/manifest", PushedLayer::estargz(&one_file("manifest")));
        let why = reason(&fixture, &image, |image, index| {
            let mut labels = cri_labels(image, index);
            labels.insert(
                "containerd.io/snapshot/cri.manifest-digest".to_owned(),
                lie.clone(),
            );
            labels
        })
        .await;
        assert!(why.contains("manifest of"), "{why}");

        let image = push("r/parallel", PushedLayer::estargz(&one_file("parallel")));
        let why = reason(&fixture, &image, |image, index| {
            let mut labels = cri_labels(image, index);
            labels.insert(
                "containerd.io/snapshot/parent-chain-id".to_owned(),
                lie.clone(),
            );
            labels
        })
        .await;
        assert!(why.contains("parallel"), "{why}");
    });
}

/// Layers that no TOC can describe so that the tree comes out as an unpack makes it, although
/// their TOC digest is in the manifest.
#[test]
fn layers_that_a_toc_cannot_represent_are_unpacked() {
    if !ready() {
        return;
    }
    let tar = |build: &dyn Fn(&mut Tarball)| {
        let mut tar = Tarball::new();
        tar.file("before", b"1");
        build(&mut tar);
        tar.file("after", b"2").finish()
    };
    let cases = [
        (
            "replacement",
            tar(&|tar| {
                tar.file("na\u{fffd}me", b"x");
            }),
            "U+FFFD",
        ),
        (
            "overlay",
            tar(&|tar| {
                tar.xattr("trusted.overlay.redirect", b"/x").dir("d");
            }),
            "overlay",
        ),
    ];
    let fixture = Fixture::new(CONFIG);
    runtime().block_on(async {
        for (name, tar, part) in cases {
            let layer = PushedLayer::estargz(&tar);
            assert!(layer.toc().is_some(), "{name}");
            let digest = layer.digest().to_string();
            let image = PushedImage::push(&fixture.lab, &format!("u/{name}"), "1", &[layer]);
            let host = fixture.host(name).await;
            let (_, came) = host.pull(&image, cri_labels).await;
            assert_eq!(came, [Came::Unpacked], "{name}");
            let (_, layers) = fixture.admin("GET", &format!("/v1/images?ref={}", image.reference));
            let why = layers["not_lazy"][0]["why_not"].as_str().expect("a reason");
            assert!(why.contains(part) && why.contains(&digest), "{name}: {why}");
        }
    });
}

#[test]
fn a_registry_that_stalls_costs_the_deadline_once() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"5s\"\n"));
    let image = PushedImage::push(&fixture.lab, "a/stalled", "1", &[base(), top()]);
    for layer in &image.layers {
        fixture.lab.stall(layer.digest());
    }
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let begun = Instant::now();
        let (_, came) = host.pull(&image, cri_labels).await;
        assert_eq!(came, [Came::Unpacked, Came::Unpacked]);
        // One deadline for both layers; one each would be ten seconds at least.
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}");
        let (_, layers) = fixture.admin("GET", "/v1/layers");
        let why = layers["not_lazy"][1]["why_not"].as_str().expect("a reason");
        assert!(why.contains("not resolved within 5 s"), "{why}");
        assert!(why.contains("still fetching its index"), "{why}");
        names_once(why, &image);
    });
}

#[test]
fn a_pull_after_a_failed_one_tries_again() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"1s\"\n"));
    let image = PushedImage::push(&fixture.lab, "a/again", "1", &[base()]);
    let rule = fixture.lab.stall(image.layers[0].digest());
    runtime().block_on(async {
        let first = fixture.host("first").await;
        let (_, came) = first.pull(&image, cri_labels).await;
        assert_eq!(came, [Came::Unpacked]);
        fixture.lab.release(rule);
        let second = fixture.host("second").await;
        let (_, came) = second.pull(&image, cri_labels).await;
        assert_eq!(came, [Came::Lazily], "{}", fixture.daemon.log());
        // In the first namespace too: what failed does not stick.
        let (_, came) = first.pull(&image, cri_labels).await;
        assert_eq!(came, [Came::Lazily], "{}", fixture.daemon.log());
    });
}
