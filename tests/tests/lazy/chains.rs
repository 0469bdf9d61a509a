//! Chains: lazy and ordinary layers mixed, empty ones, the same one twice, deep ones.

use std::collections::BTreeMap;

use suite::{
    host::Came,
    images::noise,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, ready, runtime},
    simple::{IMPLIED, base, top},
};

fn lowers(mounts: &[snapshotterd::api::types::Mount]) -> Vec<String> {
    mounts[0]
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .map(|list| list.split(':').map(str::to_owned).collect())
        .unwrap_or_default()
}

#[test]
fn ordinary_layers_between_lazy_ones_make_the_same_tree() {
    if !ready() {
        return;
    }
    let mut middle = Tarball::new();
    middle
        .whiteout("epoch")
        .file("implied/deep/middle", b"m")
        .dir("fresh")
        .file("fresh/a", b"a")
        .file("fresh/b", b"b");
    let mut last = Tarball::new();
    last.whiteout("fresh/a")
        .whiteout("etc/suid")
        .file("fresh/c", b"c");
    let fixture = Fixture::new(CONFIG);
    let image = PushedImage::push(
        &fixture.lab,
        "a/mixed",
        "1",
        &[
            base(),
            PushedLayer::gzip(&middle.finish()),
            top(),
            PushedLayer::estargz(&last.finish()),
        ],
    );
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let (parent, came) = host.pull(&image, cri_labels).await;
        assert_eq!(
            came,
            [Came::Lazily, Came::Unpacked, Came::Lazily, Came::Lazily]
        );
        let (_, container) = fixture.container(&host, &parent, "c").await;
        let mut implied = IMPLIED.to_vec();
        implied.extend(["fresh", "etc"]);
        fixture.same_tree(&image, container.path(), &implied);
        let (_, layers) = fixture.admin("GET", "/v1/layers");
        let why = layers["not_lazy"][0]["why_not"].as_str().expect("a reason");
        assert!(why.contains("TOC digest"), "{why}");
    });
}

#[test]
fn empty_layers_and_a_layer_twice_make_a_chain() {
    if !ready() {
        return;
    }
    let empty = PushedLayer::estargz(&Tarball::new().finish());
    let fixture = Fixture::new(CONFIG);
    let layers = [
        empty.clone(),
        base(),
        empty.clone(),
        top(),
        base(),
        empty.clone(),
    ];
    let image = PushedImage::push(&fixture.lab, "a/twice", "1", &layers);
    let nothing = PushedImage::push(&fixture.lab, "a/nothing", "1", &[empty.clone(), empty]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let key = host.key("c");
        let mounts = host
            .prepare(&key, &parent, BTreeMap::new())
            .await
            .expect("a container");
        let lowers = lowers(&mounts);
        assert_eq!(lowers.len(), 3, "{lowers:?}");
        let container = host.mount("c", &mounts);
        fixture.same_tree(&image, container.path(), &IMPLIED);

        let parent = fixture.pull_lazily(&host, &nothing).await;
        let (_, container) = fixture.container(&host, &parent, "nothing").await;
        let entries = std::fs::read_dir(container.path()).expect("a root");
        assert_eq!(entries.count(), 0);
    });
}

#[test]
fn a_chain_of_120_layers_fits_and_extends_its_parents() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let layers: Vec<PushedLayer> = (0..120)
        .map(|n| {
            let mut tar = Tarball::new();
            tar.file(&format!("file{n}"), &noise(n, 100));
            if n > 0 && n % 10 == 0 {
                tar.whiteout(&format!("file{}", n - 1));
            }
            PushedLayer::estargz(&tar.finish())
        })
        .collect();
    let image = PushedImage::push(&fixture.lab, "a/deep", "1", &layers);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let key = host.key("c");
        let mounts = host
            .prepare(&key, &parent, BTreeMap::new())
            .await
            .unwrap_or_else(|status| panic!("{status}\n{}", fixture.daemon.log()));
        let whole = lowers(&mounts);
        assert_eq!(whole.len(), 120);
        // As from the default directories.
        let longest: usize = whole
            .iter()
            .map(|lower| "/run/sd/l/:".len() + lower.rsplit('/').next().unwrap_or("").len())
            .sum();
        let rest = ",upperdir=/var/lib/snapshotterd/snapshots/123456/fs".len() * 2;
        assert!(longest + rest < 4096, "{longest}");
        let container = host.mount("c", &mounts);
        fixture.same_tree(&image, container.path(), &[]);
        let middle = host.stat(&parent).await.expect("the top").parent;
        let view = host.key("v");
        let shorter = lowers(&host.view(&view, &middle).await.expect("a view"));
        assert_eq!(shorter, whole[1..]);
    });
}

#[test]
fn implied_directories_take_after_the_layers_below() {
    if !ready() {
        return;
    }
    let lower = |mode, uid| {
        let mut tar = Tarball::new();
        tar.mode(mode)
            .owner(uid, uid)
            .xattr("user.from", uid.to_string().as_bytes())
            .dir("shared")
            .file("shared/own", b"x");
        PushedLayer::estargz(&tar.finish())
    };
    let mut tar = Tarball::new();
    tar.file("shared/new", b"new");
    let upper = PushedLayer::estargz(&tar.finish());
    let fixture = Fixture::new(CONFIG);
    let one = PushedImage::push(
        &fixture.lab,
        "a/one",
        "1",
        &[lower(0o700, 7), upper.clone()],
    );
    let two = PushedImage::push(
        &fixture.lab,
        "a/two",
        "1",
        &[lower(0o1777, 9), upper.clone()],
    );
    let plain = {
        let mut tar = Tarball::new();
        tar.mode(0o711).owner(3, 3).dir("shared");
        PushedLayer::gzip(&tar.finish())
    };
    let three = PushedImage::push(&fixture.lab, "a/three", "1", &[plain, upper.clone()]);
    let alone = PushedImage::push(&fixture.lab, "a/alone", "1", &[upper]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        for (name, image) in [("1", &one), ("2", &two), ("3", &three), ("4", &alone)] {
            let (parent, _) = host.pull(image, cri_labels).await;
            let (_, container) = fixture.container(&host, &parent, name).await;
            fixture.same_tree(image, container.path(), &["shared"]);
        }
        let layer = fixture.layer(&one.layers[1].digest().to_string());
        let variants: std::collections::BTreeSet<&str> = layer["mounts"]
            .as_array()
            .expect("mounts")
            .iter()
            .filter_map(|mount| mount["variant"].as_str())
            .collect();
        assert_eq!(variants.len(), 4, "{layer}");
    });
}

#[test]
fn layers_are_shared_by_images_and_namespaces() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let one = PushedImage::push(&fixture.lab, "a/one", "1", &[base(), top()]);
    let mut tar = Tarball::new();
    tar.file("other", b"other");
    let two = PushedImage::push(
        &fixture.lab,
        "a/two",
        "1",
        &[base(), PushedLayer::estargz(&tar.finish())],
    );
    runtime().block_on(async {
        let a = fixture.host("a").await;
        let b = fixture.host("b").await;
        let (first, second) =
            tokio::join!(fixture.pull_lazily(&a, &one), fixture.pull_lazily(&b, &two));
        let (_, first) = fixture.container(&a, &first, "one").await;
        let (_, second) = fixture.container(&b, &second, "two").await;
        fixture.same_tree(&one, first.path(), &IMPLIED);
        fixture.same_tree(&two, second.path(), &[]);
        let layer = fixture.layer(&one.layers[0].digest().to_string());
        assert_eq!(layer["mounts"].as_array().map(Vec::len), Some(1), "{layer}");
        assert_eq!(layer["images"].as_array().map(Vec::len), Some(2), "{layer}");
    });
}
