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
        let totals = fixture.lab.log().totals_since(&before);
        let (_, container) = fixture.container(&host, &parent, "c").await;
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

#[test]
fn an_image_of_40_layers_starts() {
    starts(40);
}

#[test]
fn an_image_of_120_layers_starts() {
    starts(120);
}
