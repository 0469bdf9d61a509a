use std::sync::atomic::{AtomicUsize, Ordering};

use formats::{
    digest::Digest,
    oci::{Descriptor, HostPlatform, Index, Manifest, Platform, media_type},
};
use storage::{
    ranges::{FetchError, FetchFailure},
    registry::{ImageError, Reference, RegistryError},
    source::Cause,
};

use crate::server::{Server, client, empty, reply, with};

fn config() -> Vec<u8> {
    b"{}".to_vec()
}

fn manifest(layer: &[u8]) -> Vec<u8> {
    Manifest::new(
        Descriptor::of(media_type::OCI_CONFIG, &config()),
        vec![Descriptor::of(media_type::OCI_LAYER_GZIP, layer)],
    )
    .to_json()
}

fn index(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let descriptors = entries.iter().map(|(architecture, bytes)| {
        let mut descriptor = Descriptor::of(media_type::OCI_MANIFEST, bytes);
        descriptor.platform = Some(Platform {
            architecture: (*architecture).to_owned(),
            os: "linux".to_owned(),
            variant: None,
            extra: serde_json::Map::default(),
        });
        descriptor
    });
    Index::new(descriptors.collect()).to_json()
}

/// Serves documents by digest, and the first one under every tag.
async fn registry(documents: Vec<(&'static str, Vec<u8>)>) -> Server {
    Server::start(move |request| {
        let name = request.path().rsplit('/').next().unwrap();
        let found = match name.parse::<Digest>() {
            Ok(digest) => documents
                .iter()
                .find(|(_, bytes)| Digest::of(bytes) == digest),
            Err(_) => documents.first(),
        };
        match found {
            Some((media_type, bytes)) => {
                let kind = format!("{media_type}; charset=utf-8");
                let reply = with(reply(200, bytes.clone()), "content-type", &kind);
                with(
                    reply,
                    "docker-content-digest",
                    &Digest::of(bytes).to_string(),
                )
            }
            None => empty(404),
        }
    })
    .await
}

fn reference(server: &Server, rest: &str) -> Reference {
    format!("{}/some/image{rest}", server.host())
        .parse()
        .unwrap()
}

fn amd64() -> HostPlatform {
    HostPlatform::parse("linux/amd64").unwrap()
}

#[tokio::test]
async fn tags_and_digests_are_resolved_without_a_head_request() {
    let bytes = manifest(b"layer");
    let digest = Digest::of(&bytes);
    let server = registry(vec![(media_type::OCI_MANIFEST, bytes.clone())]).await;
    let client = client();
    for name in [
        String::new(),
        ":tag".into(),
        format!("@{digest}"),
        format!(":t@{digest}"),
    ] {
        let resolved = client.resolve(&reference(&server, &name)).await.unwrap();
        assert_eq!(resolved.digest, digest);
        assert_eq!(resolved.media_type, media_type::OCI_MANIFEST);
        assert_eq!(resolved.bytes, bytes);
    }
    let log = server.log();
    let names: Vec<_> = log
        .iter()
        .map(|one| one.path().rsplit('/').next().unwrap())
        .collect();
    assert_eq!(
        names,
        ["latest", "tag", &digest.to_string(), &digest.to_string()]
    );
    assert!(log.iter().all(|request| request.method == "GET"));
    let accepted = log[0].header("accept").unwrap();
    for kind in media_type::MANIFEST_TYPES {
        assert!(accepted.contains(kind), "{accepted}");
    }
    assert_eq!(client.stats().cause(Cause::Metadata).requests, 4);
}

#[tokio::test]
async fn an_index_leads_to_the_manifest_of_the_platform() {
    let (amd, arm) = (manifest(b"amd"), manifest(b"arm"));
    let root = index(&[("arm64", &arm), ("amd64", &amd)]);
    let server = registry(vec![
        (media_type::OCI_INDEX, root.clone()),
        (media_type::OCI_MANIFEST, amd.clone()),
        (media_type::OCI_MANIFEST, arm),
    ])
    .await;
    let image = client()
        .image(&reference(&server, ":t"), &amd64())
        .await
        .unwrap();
    assert_eq!(image.root.digest, Digest::of(&root));
    assert_eq!(image.manifest.digest, Digest::of(&amd));
    assert_eq!(image.parsed.layers[0].digest, Digest::of(b"amd"));

    let error = client()
        .image(
            &reference(&server, ":t"),
            &HostPlatform::parse("linux/s390x").unwrap(),
        )
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Platform { .. }), "{error}");
    assert!(error.to_string().contains("s390x"), "{error}");
}

#[tokio::test]
async fn documents_that_are_none_are_refused() {
    let server = registry(vec![("text/html", b"<html>".to_vec())]).await;
    let error = client()
        .image(&reference(&server, ":t"), &amd64())
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Document { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("some/image") && error.contains("sha256:"),
        "{error}"
    );
}

#[tokio::test]
async fn content_that_is_not_its_digest_is_refused() {
    let bytes = manifest(b"layer");
    let sent = bytes.clone();
    let server = Server::start(move |request| {
        let mut sent = sent.clone();
        if request.path().contains("sha256:") {
            sent.push(b' ');
        }
        let lie = Digest::of(b"other").to_string();
        with(reply(200, sent), "docker-content-digest", &lie)
    })
    .await;
    for name in [":t".to_owned(), format!("@{}", Digest::of(&bytes))] {
        let error = client()
            .resolve(&reference(&server, &name))
            .await
            .unwrap_err();
        assert!(matches!(error, RegistryError::Digest { .. }), "{error}");
        assert!(error.to_string().contains(&server.host()), "{error}");
        assert!(!error.is_transient());
    }
}

#[tokio::test]
async fn a_manifest_without_end_is_cut_off() {
    let server = Server::start(|_| reply(200, vec![b' '; 6 << 20])).await;
    let error = client()
        .resolve(&reference(&server, ":t"))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("sent more than 4194304 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn unknown_images_say_so() {
    let server = Server::start(|_| {
        reply(
            404,
            r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
        )
    })
    .await;
    let error = client()
        .resolve(&reference(&server, ":nope"))
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Missing);
    let message = error.report();
    let expected = format!(
        "manifest nope of {}/some/image: {} answered 404 (MANIFEST_UNKNOWN: manifest unknown)",
        server.host(),
        server.host()
    );
    assert_eq!(message, expected);
}

#[tokio::test]
async fn small_blobs_are_verified() {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |_| {
        let wrong = count.fetch_add(1, Ordering::Relaxed) > 0;
        reply(200, if wrong { b"[]".to_vec() } else { config() })
    })
    .await;
    let (client, repository) = (client(), server.repository());
    let digest = Digest::of(&config());
    let got = client
        .small_blob(&repository, digest, 2, Cause::Metadata)
        .await
        .unwrap();
    assert_eq!(got, config());
    let error = client
        .small_blob(&repository, digest, 2, Cause::Metadata)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains(&Digest::of(b"[]").to_string()),
        "{error}"
    );
    let nothing = client
        .small_blob(&repository, Digest::of(b""), 0, Cause::Metadata)
        .await;
    assert!(nothing.unwrap().is_empty());
    let huge = client
        .small_blob(&repository, digest, 1 << 40, Cause::Metadata)
        .await;
    let error = huge.unwrap_err();
    assert!(matches!(error, FetchError::TooLarge { .. }), "{error}");
    assert_eq!(server.log().len(), 2, "nobody was asked for it");
}
