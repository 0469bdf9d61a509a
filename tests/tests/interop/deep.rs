//! Images of many layers.

use suite::{
    host::Came,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    world::ready,
};

/// Each layer adds a file, changes one, and deletes one of the layer before.
fn layers(count: usize) -> Vec<PushedLayer> {
    (0..count)
        .map(|index| {
            let mut tar = Tarball::new();
            tar.dir("d")
                .file(
                    &format!("d/{index:03}"),
                    format!("layer {index}").as_bytes(),
                )
                .file("changed", format!("by {index}").as_bytes())
                .file(&format!("short-lived-{index:03}"), b"gone above");
            if let Some(below) = index.checked_sub(1) {
                tar.whiteout(&format!("short-lived-{below:03}"));
            }
            PushedLayer::estargz(&tar.finish())
        })
        .collect()
}

/// The labels as containerd sends them: a label holds at most 4096 bytes, key included, so the
/// list of layers is cut at a whole digest.
fn labels(image: &PushedImage, index: usize) -> std::collections::BTreeMap<String, String> {
    let mut labels = cri_labels(image, index);
    let key = "containerd.io/snapshot/cri.image-layers";
    if let Some(value) = labels.get_mut(key) {
        let room = 4096 - key.len();
        if value.len() > room {
            let end = value[..room].rfind(',').unwrap_or(0);
            value.truncate(end);
        }
    }
    labels
}

fn starts(count: usize) {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let image = PushedImage::push(&fixture.lab, "deep/image", "1", &layers(count));
    let before = fixture.lab.log().mark();
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let (parent, came) = host.pull(&image, labels).await;
        assert!(
            came.iter().all(|came| *came == Came::Lazily),
            "{came:?}\n{}",
            fixture.daemon.log()
        );
        let (_, container) = fixture.container(&host, &parent, "c").await;
        let totals = fixture.lab.log().totals_since(&before);
        for layer in &image.layers {
            let requests = totals
                .blobs
                .get(&layer.digest())
                .map_or(0, |blob| blob.requests);
            assert!(
                (1..=2).contains(&requests),
                "{requests} requests for layer {} before its mount",
                layer.digest()
            );
        }
        fixture.same_tree(&image, container.path(), &[]);
        let last = format!("by {}", count - 1);
        let changed = std::fs::read(container.path().join("changed")).expect("a file");
        assert_eq!(changed, last.as_bytes());
    });
}

/// Layers whose index does not come with their last few KiB, and some that have a start list.
#[test]
fn large_layers_take_two_requests_before_their_mount() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layers: Vec<_> = [(0, 3 << 20), (12_000, 0), (3, 20 << 20), (12_000, 1 << 20)]
        .into_iter()
        .enumerate()
        .map(|(index, (files, large))| {
            let mut tar = Tarball::new();
            let seed = 40 + index as u64;
            tar.file(&format!("large{index}"), &suite::images::noise(seed, large));
            for file in 0..files {
                // Long names: the index of 12,000 of them is larger than what comes with a footer.
                let name = format!("{index}-{file:05}-{}", "n".repeat(80));
                tar.file(&name, &suite::images::noise(seed * 100_000 + file, 40));
            }
            let options = formats::stargz::WriterOptions {
                level: 1,
                ..formats::stargz::WriterOptions::default()
            };
            PushedLayer::estargz_with(&tar.finish(), &options)
        })
        .collect();
    let image = PushedImage::push(&fixture.lab, "deep/large", "1", &layers);
    let before = fixture.lab.log().mark();
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        let totals = fixture.lab.log().totals_since(&before);
        for layer in &image.layers {
            let blob = totals.blobs.get(&layer.digest());
            let (requests, bytes) = blob.map_or((0, 0), |blob| (blob.requests, blob.bytes));
            let size = layer.descriptor.size;
            eprintln!("{requests} requests, {bytes} of {size} bytes before the mount");
            assert!(
                (1..=2).contains(&requests),
                "{requests} requests for a layer of {size} bytes before its mount"
            );
        }
        fixture.same_tree(&image, container.path(), &[]);
    });
}

/// A pull that takes longer than layers have to be resolved, because something else in it does:
/// the time counts from when a layer is first heard of, and no label holds all of them.
#[test]
fn a_slow_pull_of_many_layers_is_lazy_to_its_end() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!(
        "{CONFIG}lazy.hydration = \"off\"\nlazy.resolve_timeout = \"2s\"\n"
    ));
    let image = PushedImage::push(&fixture.lab, "deep/slow", "1", &layers(70));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let slow = |image: &PushedImage, index: usize| {
            if index == 40 {
                std::thread::sleep(std::time::Duration::from_secs(3));
            }
            // A dozen layers at a time.
            let mut labels = labels(image, index);
            if let Some(list) = labels.get_mut("containerd.io/snapshot/cri.image-layers") {
                let dozen: Vec<&str> = list.split(',').take(12).collect();
                *list = dozen.join(",");
            }
            labels
        };
        let (parent, came) = host.pull(&image, slow).await;
        assert!(
            came.iter().all(|came| *came == Came::Lazily),
            "{came:?}\n{}",
            fixture.daemon.log()
        );
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &[]);
    });
}

#[test]
fn an_image_of_40_layers_starts() {
    starts(40);
}

#[test]
fn an_image_of_120_layers_starts() {
    starts(120);
}
