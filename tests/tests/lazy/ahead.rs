//! One Prepare commits the answers for the layers above that are known by then.

use suite::{
    containerd::{Line, PLUGIN},
    daemon::Daemon,
    host::Host,
    node::Node,
    pushed::{PushedImage, PushedLayer, cri_labels},
    skip,
    tarball::Tarball,
};
use tonic::Code;

use crate::fixture::{CONFIG, Fixture, admin, ready, runtime};

const LAYERS: usize = 5;

fn layers(seed: &str) -> Vec<PushedLayer> {
    (0..LAYERS)
        .map(|index| {
            let mut tar = Tarball::new();
            tar.file(
                &format!("file-{index}"),
                format!("{seed} {index}").as_bytes(),
            )
            .file("changed", format!("{seed} by {index}").as_bytes());
            PushedLayer::estargz(&tar.finish())
        })
        .collect()
}

/// Prepare of the lowest layer, answered when those above are known.
async fn prepare_lowest(
    lab: &lab::Handle,
    host: &Host,
    image: &PushedImage,
    known: impl Fn() -> usize,
) {
    let rule = lab.stall(image.layers[0].digest());
    let key = host.key(&format!("extract-0 {}", image.chains[0]));
    let prepare = host.prepare(&key, "", cri_labels(image, 0));
    let others = async {
        while known() < LAYERS - 1 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        // Known to the table; the resolution hears of it right after.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        lab.release(rule);
    };
    let (answer, ()) = tokio::join!(prepare, others);
    assert_eq!(
        answer.expect_err("a lazy answer").code(),
        Code::AlreadyExists
    );
}

fn known_layers(daemon: &Daemon) -> usize {
    let (_, layers) = admin(&daemon.admin(), "GET", "/v1/layers");
    let layers = layers["layers"].as_array().expect("layers");
    layers
        .iter()
        .filter(|layer| layer["device_bytes"] != 0)
        .count()
}

#[test]
fn layers_above_are_there_before_they_are_asked_for() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"8s\"\n"));
    let image = PushedImage::push(&fixture.lab, "a/ahead", "1", &layers("one"));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        prepare_lowest(&fixture.lab, &host, &image, || {
            known_layers(&fixture.daemon)
        })
        .await;
        let mut parent = String::new();
        for chain in &image.chains {
            let name = chain.to_string();
            let info = host.stat(&name).await.expect("committed ahead");
            assert_eq!((info.kind, &info.parent), (3, &parent));
            assert_eq!(info.labels["containerd.io/snapshot.ref"], name);
            parent = name;
        }
        // Asked for, they are found, and carry what the request brought.
        let mut parent = image.chains[0].to_string();
        for index in 1..LAYERS {
            let chain = image.chains[index].to_string();
            let mut labels = cri_labels(&image, index);
            labels.insert("example.com/own".to_owned(), index.to_string());
            let key = host.key(&format!("extract-{index} {chain}"));
            let answer = host.prepare(&key, &parent, labels.clone()).await;
            assert_eq!(answer.expect_err("lazy").code(), Code::AlreadyExists);
            let found = host
                .find(&chain, &parent)
                .await
                .expect("List")
                .expect("found");
            assert_eq!(found.name, chain);
            labels.insert(
                "containerd.io/snapshot/remote".to_owned(),
                "remote snapshot".to_owned(),
            );
            assert_eq!(found.labels, labels.into_iter().collect());
            parent = found.name;
        }
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &[]);
    });
}

#[test]
fn what_is_never_asked_for_can_be_removed_and_pulled_again() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"8s\"\n"));
    let image = PushedImage::push(&fixture.lab, "a/ahead", "1", &layers("two"));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        prepare_lowest(&fixture.lab, &host, &image, || {
            known_layers(&fixture.daemon)
        })
        .await;
        // Removed and asked for, it is no longer one that was committed ahead.
        let top = LAYERS - 1;
        let (chain, below) = (&image.chains[top], image.chains[top - 1].to_string());
        let name = chain.to_string();
        host.remove(&name).await.expect("Remove");
        let mut labels = cri_labels(&image, top);
        for time in ["first", "second"] {
            let key = host.key(&format!("extract-{time} {chain}"));
            let answer = host.prepare(&key, &below, labels.clone()).await;
            assert_eq!(answer.expect_err("lazy").code(), Code::AlreadyExists);
            let info = host.stat(&name).await.expect("committed");
            assert!(!info.labels.contains_key("example.com/own"), "{time}");
            labels.insert("example.com/own".to_owned(), time.to_owned());
        }
        for chain in image.chains.iter().rev() {
            host.remove(&chain.to_string())
                .await
                .expect("Remove, topmost first");
        }
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &[]);
    });
}

#[test]
fn containerd_collects_what_it_never_asked_for() {
    if !ready() {
        return;
    }
    let line = Line::V1_6;
    if let Some(why) = line.missing() {
        return skip(&why);
    }
    let node = Node::start(line, "lazy.resolve_timeout = \"8s\"\n");
    let pulled = PushedImage::push(&node.lab, "a/pulled", "1", &layers("pulled"));
    let stray = PushedImage::push(&node.lab, "a/stray", "1", &layers("stray"));
    node.containerd.pull(&pulled.reference, PLUGIN);
    runtime().block_on(async {
        let host = Host::connect(&node.daemon.socket(), "default", &node.work.sub("m")).await;
        let before = known_layers(&node.daemon);
        prepare_lowest(&node.lab, &host, &stray, || {
            known_layers(&node.daemon) - before
        })
        .await;
        let top = stray.chains[LAYERS - 1].to_string();
        host.stat(&top).await.expect("committed ahead");
        node.containerd
            .ctr(["images", "rm", "--sync", &pulled.reference]);
        for chain in &stray.chains {
            let gone = host.stat(&chain.to_string()).await;
            assert_eq!(gone.expect_err("collected").code(), Code::NotFound);
        }
    });
}
