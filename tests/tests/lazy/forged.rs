//! What one image says about a layer is never served to another.

use std::collections::BTreeMap;

use lab::{Lab, LabOptions};
use suite::{
    host::{Came, Host},
    images::noise,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
};

use crate::fixture::{CONFIG, Fixture, ready, runtime};

fn layer(content: &[u8]) -> PushedLayer {
    PushedLayer::estargz(
        &Tarball::new()
            .file("program", content)
            .file("padding", &noise(9, 200_000))
            .finish(),
    )
}

/// A registry that serves `forged` under the digest of `genuine`.
fn forger(fixture: &Fixture, genuine: &PushedLayer, forged: &PushedLayer) -> (Lab, PushedImage) {
    let lab = Lab::start_blocking(LabOptions::new(fixture.work.sub("forger")))
        .expect("the forger's registry");
    let mut pushed = genuine.clone();
    pushed.descriptor.annotations = forged.descriptor.annotations.clone();
    pushed.descriptor.size = forged.blob.len() as u64;
    // The image claims the genuine DiffID: the chain ID is the genuine one.
    let image = PushedImage::push(&lab, "a/forged", "1", &[pushed]);
    std::fs::write(lab.store().blob_path(&genuine.digest()), &forged.blob)
        .expect("other bytes under the digest");
    (lab, image)
}

#[test]
fn a_forged_toc_pulled_first_never_reaches_the_genuine_image() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let (good, bad) = (layer(b"genuine"), layer(b"forgery"));
    let genuine = PushedImage::push(&fixture.lab, "a/genuine", "1", std::slice::from_ref(&good));
    let (_lab, forged) = forger(&fixture, &good, &bad);
    assert_eq!(genuine.chains, forged.chains);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let read = async |host: &Host, parent: &str, name: &str| {
            let (_, container) = fixture.container(host, parent, name).await;
            std::fs::read(container.path().join("program")).expect("a file")
        };
        let forged_top = fixture.pull_lazily(&host, &forged).await;
        assert_eq!(read(&host, &forged_top, "forged").await, b"forgery");
        // The same namespace, with the forger's snapshot still there.
        let top = fixture.pull_lazily(&host, &genuine).await;
        assert_ne!(top, forged_top);
        assert_eq!(read(&host, &top, "genuine").await, b"genuine");
        // Another namespace.
        let other = fixture.host("other").await;
        let top = fixture.pull_lazily(&other, &genuine).await;
        assert_eq!(read(&other, &top, "genuine").await, b"genuine");
        // And each finds its own again, whichever was answered last.
        let again = fixture.pull_lazily(&host, &forged).await;
        assert_eq!(read(&host, &again, "again").await, b"forgery");
        let top = fixture.pull_lazily(&host, &genuine).await;
        assert_eq!(read(&host, &top, "last").await, b"genuine");
    });
}

/// On the host that has the genuine image, the genuine bytes are what is served under the digest:
/// the forged TOC digest matches nothing, and the genuine image is none the worse for it.
#[test]
fn a_forged_toc_digest_on_the_same_host_is_refused_and_does_not_stick() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let (good, bad) = (layer(b"genuine"), layer(b"forgery"));
    let mut paired = good.clone();
    paired.descriptor.annotations = bad.descriptor.annotations.clone();
    let forged = PushedImage::push(&fixture.lab, "a/forged", "1", &[paired]);
    let genuine = PushedImage::push(&fixture.lab, "a/genuine", "1", std::slice::from_ref(&good));
    assert_eq!(genuine.chains, forged.chains);
    assert_eq!(genuine.layers[0].digest(), forged.layers[0].digest());
    runtime().block_on(async {
        for namespace in ["default", "other"] {
            let host = fixture.host(namespace).await;
            // A namespace of its own: unpacked, it is an ordinary snapshot under the chain's name.
            let victim = fixture.host(&format!("forged-{namespace}")).await;
            let (top, came) = victim.pull(&forged, cri_labels).await;
            assert_eq!(came, [Came::Unpacked]);
            let (_, container) = fixture.container(&victim, &top, "forged").await;
            let read = std::fs::read(container.path().join("program")).expect("a file");
            assert_eq!(read, b"genuine", "what the digest of the layer says");
            let top = fixture.pull_lazily(&host, &genuine).await;
            let (_, container) = fixture.container(&host, &top, "genuine").await;
            fixture.same_tree(&genuine, container.path(), &[]);
        }
        let (_, layers) = fixture.admin("GET", "/v1/layers");
        let why = layers["not_lazy"][0]["why_not"].as_str().expect("a reason");
        let lie = &forged.layers[0].descriptor.annotations[formats::oci::ANNOTATION_TOC_DIGEST];
        assert!(why.contains(lie.as_str()), "{why}");
    });
}

/// A host that serves the forger's bytes under the genuine digest in the forger's repository.
#[test]
fn a_host_that_serves_two_blobs_under_one_digest_mixes_nothing() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let (good, bad) = (layer(b"genuine"), layer(b"forgery"));
    let mut paired = good.clone();
    paired.descriptor.annotations = bad.descriptor.annotations.clone();
    paired.descriptor.size = bad.blob.len() as u64;
    let forged = PushedImage::push(&fixture.lab, "a/forged", "1", &[paired]);
    let genuine = PushedImage::push(&fixture.lab, "a/genuine", "1", std::slice::from_ref(&good));
    let path = fixture.lab.store().blob_path(&good.digest());
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let read = async |top: &str, name: &str| {
            let (_, container) = fixture.container(&host, top, name).await;
            std::fs::read(container.path().join("program")).expect("a file")
        };
        std::fs::write(&path, &bad.blob).expect("the forger's bytes");
        let top = fixture.pull_lazily(&host, &forged).await;
        assert_eq!(read(&top, "forged").await, b"forgery");
        std::fs::write(&path, &good.blob).expect("the genuine bytes");
        let top = fixture.pull_lazily(&host, &genuine).await;
        assert_eq!(read(&top, "genuine").await, b"genuine");
        let (_, container) = fixture.container(&host, &top, "whole").await;
        fixture.same_tree(&genuine, container.path(), &[]);
    });
}

#[test]
fn a_refuted_layer_gets_no_new_containers() {
    if !ready() {
        return;
    }
    // Hydrated when the test says so: it may be refuted before the pull is over.
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let (good, bad) = (layer(b"genuine"), layer(b"forgery"));
    let (_lab, forged) = forger(&fixture, &good, &bad);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let top = fixture.pull_lazily(&host, &forged).await;
        let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(status, 200, "{verdicts}");
        assert_eq!(verdicts["layers"][0]["verdict"], "refuted", "{verdicts}");
        let refused = host
            .prepare(&host.key("c"), &top, BTreeMap::new())
            .await
            .expect_err("a refuted chain");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains(&forged.reference), "{refused}");
        let digest = good.digest().to_string();
        assert!(refused.message().contains(&digest), "{refused}");
        let refused = host
            .view(&host.key("v"), &top)
            .await
            .expect_err("a view of it");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        // Pulled again, it is refused as well.
        let chain = forged.chains[0].to_string();
        let refused = host
            .prepare(
                &host.key(&format!("extract-1-x {chain}")),
                "",
                cri_labels(&forged, 0),
            )
            .await
            .expect_err("the forged layer again");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    });
}

/// The same layer, under a DiffID that it does not have.
fn falsely_claimed(fixture: &Fixture, layer: &PushedLayer) -> PushedImage {
    let mut layer = layer.clone();
    layer.diff_id = formats::digest::Digest::of(b"another tar");
    PushedImage::push(&fixture.lab, "a/false", "1", &[layer])
}

/// Hydrates everything and returns how the layer came out.
fn judged(fixture: &Fixture, layer: &PushedLayer) -> serde_json::Value {
    let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
    assert_eq!(status, 200, "{verdicts}");
    fixture.layer(&layer.digest().to_string())
}

async fn refused(host: &Host, image: &PushedImage, parent: &str) {
    let told = host
        .prepare(&host.key("c"), parent, BTreeMap::new())
        .await
        .expect_err("a container under a DiffID that is false");
    assert_eq!(told.code(), tonic::Code::FailedPrecondition);
    assert!(told.message().contains(&image.reference), "{told}");
    assert!(told.message().contains("the image claims DiffID"), "{told}");
}

async fn pull_refused(host: &Host, image: &PushedImage) {
    let chain = image.chains[0].to_string();
    let key = host.key(&format!("extract-0-x {chain}"));
    let told = host
        .prepare(&key, "", cri_labels(image, 0))
        .await
        .expect_err("a pull under a DiffID that is false");
    assert_eq!(told.code(), tonic::Code::FailedPrecondition);
    assert!(told.message().contains(&image.reference), "{told}");
}

fn status_of(fixture: &Fixture, image: &PushedImage) -> String {
    let (status, shown) = fixture.admin("GET", &format!("/v1/images?ref={}", image.reference));
    assert_eq!(status, 200, "{shown}");
    shown["layers"][0]["verdict"]
        .as_str()
        .expect("a verdict")
        .to_owned()
}

#[test]
fn a_false_diff_id_that_comes_first_harms_only_its_own_image() {
    if !ready() {
        return;
    }
    let mut fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layer = layer(b"genuine");
    let wrong = falsely_claimed(&fixture, &layer);
    let honest = PushedImage::push(&fixture.lab, "a/genuine", "1", std::slice::from_ref(&layer));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let wrong_top = fixture.pull_lazily(&host, &wrong).await;
        let shown = judged(&fixture, &layer);
        assert_eq!(shown["verdict"], "proven", "{shown}");
        assert_eq!(shown["diff_id"], layer.diff_id.to_string(), "{shown}");
        assert_eq!(
            shown["false_claims"][0]["image"], wrong.reference,
            "{shown}"
        );
        refused(&host, &wrong, &wrong_top).await;
        pull_refused(&host, &wrong).await;
        let top = fixture.pull_lazily(&host, &honest).await;
        let (_, container) = fixture.container(&host, &top, "honest").await;
        fixture.same_tree(&honest, container.path(), &[]);
        assert_eq!(status_of(&fixture, &honest), "proven");
        assert_eq!(status_of(&fixture, &wrong), "refuted");
    });
    // What was found out outlives a restart.
    fixture.daemon.terminate();
    fixture.daemon.restart();
    runtime().block_on(async {
        let host = fixture.host("other").await;
        pull_refused(&host, &wrong).await;
        let top = fixture.pull_lazily(&host, &honest).await;
        let (_, container) = fixture.container(&host, &top, "again").await;
        fixture.same_tree(&honest, container.path(), &[]);
    });
}

#[test]
fn a_false_diff_id_that_comes_later_harms_only_its_own_image() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layer = layer(b"genuine");
    let honest = PushedImage::push(&fixture.lab, "a/genuine", "1", std::slice::from_ref(&layer));
    let wrong = falsely_claimed(&fixture, &layer);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let top = fixture.pull_lazily(&host, &honest).await;
        // While nothing is known, both are claims.
        let wrong_top = fixture.pull_lazily(&host, &wrong).await;
        let shown = judged(&fixture, &layer);
        assert_eq!(shown["verdict"], "proven", "{shown}");
        refused(&host, &wrong, &wrong_top).await;
        pull_refused(&host, &wrong).await;
        let (_, container) = fixture.container(&host, &top, "honest").await;
        fixture.same_tree(&honest, container.path(), &[]);
        let other = fixture.host("other").await;
        pull_refused(&other, &wrong).await;
        fixture.pull_lazily(&other, &honest).await;
        assert_eq!(status_of(&fixture, &honest), "proven");
        assert_eq!(status_of(&fixture, &wrong), "refuted");
    });
}
