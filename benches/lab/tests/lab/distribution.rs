//! Push, pull, lists, referrers, delete.

use formats::digest::Digest;
use http::Method;
use lab::{Lab, LabOptions, RequestKind, Store};
use serde_json::json;

use crate::client::{Client, Fixture, get, noise, request};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

async fn push_whole(lab: &Lab, repo: &str, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
    let answer = request(lab, Method::POST, &path, &[], bytes.to_vec()).await;
    assert_eq!(answer.status, 201);
    assert_eq!(
        answer.header("location"),
        format!("/v2/{repo}/blobs/{digest}")
    );
    assert_eq!(answer.header("docker-content-digest"), digest.to_string());
    digest
}

fn manifest(config: Digest, layers: &[Digest]) -> serde_json::Value {
    let layers: Vec<_> = layers
        .iter()
        .map(|digest| {
            json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                   "digest": digest, "size": 1})
        })
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": config, "size": 2},
        "layers": layers,
    })
}

#[tokio::test]
async fn an_image_goes_in_and_comes_out() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    assert_eq!(get(lab, "/v2/", &[]).await.status, 200);
    let layer = noise(3_000_000);
    let layer_digest = push_whole(lab, "a/image", &layer).await;
    let config = push_whole(lab, "a/image", b"{}").await;
    let bytes = manifest(config, &[layer_digest]).to_string();
    let digest = Digest::of(bytes.as_bytes());

    let put = request(
        lab,
        Method::PUT,
        "/v2/a/image/manifests/v1",
        &[("content-type", MANIFEST)],
        bytes.clone(),
    )
    .await;
    assert_eq!(put.status, 201);
    assert_eq!(put.header("docker-content-digest"), digest.to_string());

    for reference in [
        "v1".to_owned(),
        digest.to_string(),
        digest.to_string().replace(':', "%3A"),
    ] {
        let path = format!("/v2/a/image/manifests/{reference}");
        let pulled = get(lab, &path, &[("accept", MANIFEST), ("accept", INDEX)]).await;
        assert_eq!(pulled.status, 200);
        assert_eq!(pulled.body, bytes);
        assert_eq!(pulled.header("content-type"), MANIFEST);
        assert_eq!(pulled.header("docker-content-digest"), digest.to_string());
        let head = request(lab, Method::HEAD, &path, &[("accept", "*/*")], "").await;
        assert_eq!(head.status, 200);
        assert_eq!(head.header("content-length"), bytes.len().to_string());
        assert!(head.body.is_empty());
        let refused = get(lab, &path, &[("accept", INDEX)]).await;
        assert_eq!(refused.status, 404);
        assert_eq!(refused.json()["errors"][0]["code"], "MANIFEST_UNKNOWN");
    }
    let path = format!("/v2/a/image/blobs/{layer_digest}");
    let pulled = get(lab, &path, &[]).await;
    assert_eq!(
        (pulled.status.as_u16(), pulled.body.len()),
        (200, layer.len())
    );
    assert!(pulled.body == layer);
    assert_eq!(pulled.header("etag"), format!("\"{layer_digest}\""));
    let head = request(lab, Method::HEAD, &path, &[("range", "bytes=0-1")], "").await;
    assert_eq!(
        (head.status.as_u16(), head.header("content-length")),
        (200, "3000000")
    );
    assert_eq!(head.header("accept-ranges"), "bytes");

    // A second process on the same directory sees it all.
    let store = Store::open(fixture.dir.path()).unwrap();
    assert_eq!(store.repos().unwrap(), ["a/image"]);
    assert_eq!(store.tags(&"a/image".parse().unwrap()).unwrap(), ["v1"]);
}

#[tokio::test]
async fn uploads_in_chunks() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let bytes = noise(2_500_000);
    let digest = Digest::of(&bytes);
    let mut client = Client::connect(lab).await;
    let begun = client
        .send(Method::POST, "/v2/r/blobs/uploads/", &[], "")
        .await
        .unwrap();
    assert_eq!(begun.status, 202);
    let at = begun.header("location").to_owned();
    let first = client
        .send(
            Method::PATCH,
            &at,
            &[("content-range", "0-999999")],
            bytes[..1_000_000].to_vec(),
        )
        .await
        .unwrap();
    assert_eq!(
        (first.status.as_u16(), first.header("range")),
        (202, "0-999999")
    );
    // A chunk that does not follow is refused and changes nothing.
    let gap = client
        .send(Method::PATCH, &at, &[("content-range", "5-9")], "12345")
        .await
        .unwrap();
    assert_eq!(
        (gap.status.as_u16(), gap.header("range")),
        (416, "0-999999")
    );
    let state = client.get(&at, &[]).await;
    assert_eq!(
        (state.status.as_u16(), state.header("range")),
        (204, "0-999999")
    );
    // Docker sends chunks without Content-Range, and the rest with the PUT.
    let second = client
        .send(
            Method::PATCH,
            &at,
            &[],
            bytes[1_000_000..2_000_000].to_vec(),
        )
        .await
        .unwrap();
    assert_eq!(second.status, 202);
    let done = client
        .send(
            Method::PUT,
            &format!("{at}?digest={digest}"),
            &[],
            bytes[2_000_000..].to_vec(),
        )
        .await
        .unwrap();
    assert_eq!(done.status, 201);
    assert!(get(lab, &format!("/v2/r/blobs/{digest}"), &[]).await.body == bytes);
    assert_eq!(get(lab, &at, &[]).await.status, 404);
    assert_eq!(
        std::fs::read_dir(fixture.dir.path().join("incoming"))
            .unwrap()
            .count(),
        0
    );
}

#[tokio::test]
async fn what_does_not_match_its_digest_is_refused() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let wrong = Digest::of(b"other");
    let path = format!("/v2/r/blobs/uploads/?digest={wrong}");
    let answer = request(lab, Method::POST, &path, &[], "this").await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["errors"][0]["code"], "DIGEST_INVALID");
    assert_eq!(
        get(lab, &format!("/v2/r/blobs/{wrong}"), &[]).await.status,
        404
    );

    let path = format!("/v2/r/manifests/{wrong}");
    let headers = [("content-type", MANIFEST)];
    assert_eq!(
        request(lab, Method::PUT, &path, &headers, "{}")
            .await
            .status,
        400
    );
    let lacking = manifest(wrong, &[]).to_string();
    let answer = request(lab, Method::PUT, "/v2/r/manifests/t", &headers, lacking).await;
    assert_eq!(answer.json()["errors"][0]["code"], "MANIFEST_BLOB_UNKNOWN");
    let answer = request(lab, Method::PUT, "/v2/r/manifests/t", &headers, "[]").await;
    assert_eq!(answer.json()["errors"][0]["code"], "MANIFEST_INVALID");
    let path = "/v2/r/blobs/uploads/?digest=sha512:00";
    assert_eq!(request(lab, Method::POST, path, &[], "x").await.status, 400);
    assert_eq!(get(lab, "/v2/UPPER/tags/list", &[]).await.status, 400);
    assert_eq!(get(lab, "/v2/a/../b/tags/list", &[]).await.status, 400);
    assert_eq!(get(lab, "/v3/", &[]).await.status, 404);
    assert_eq!(
        request(lab, Method::PUT, "/v2/_catalog", &[], "")
            .await
            .status,
        405
    );
}

#[tokio::test]
async fn repositories_share_blobs_by_mount_only() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let digest = push_whole(lab, "one", b"shared").await;
    assert_eq!(
        get(lab, &format!("/v2/two/blobs/{digest}"), &[])
            .await
            .status,
        404
    );
    let from_nowhere = format!("/v2/two/blobs/uploads/?mount={digest}&from=three");
    let answer = request(lab, Method::POST, &from_nowhere, &[], "").await;
    assert_eq!(answer.status, 202, "an ordinary upload begins instead");
    let mount = format!("/v2/two/blobs/uploads/?mount={digest}&from=one");
    assert_eq!(
        request(lab, Method::POST, &mount, &[], "").await.status,
        201
    );
    let path = format!("/v2/two/blobs/{digest}");
    assert_eq!(get(lab, &path, &[]).await.body, "shared");
    assert_eq!(
        request(lab, Method::DELETE, &path, &[], "").await.status,
        202
    );
    assert_eq!(
        request(lab, Method::DELETE, &path, &[], "").await.status,
        404
    );
    assert_eq!(
        get(lab, &format!("/v2/one/blobs/{digest}"), &[]).await.body,
        "shared"
    );
}

#[tokio::test]
async fn lists_come_in_pages() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    for tag in ["c", "a", "b"] {
        lab.push_manifest("x/y", tag, MANIFEST, b"{}").unwrap();
    }
    lab.push_manifest("x", "t", MANIFEST, b"{}").unwrap();
    let page = get(lab, "/v2/x/y/tags/list?n=2", &[]).await;
    assert_eq!(page.json(), json!({"name": "x/y", "tags": ["a", "b"]}));
    assert_eq!(
        page.header("link"),
        "</v2/x/y/tags/list?n=2&last=b>; rel=\"next\""
    );
    let page = get(lab, "/v2/x/y/tags/list?n=2&last=b", &[]).await;
    assert_eq!(page.json()["tags"], json!(["c"]));
    assert_eq!(page.header("link"), "");
    assert_eq!(
        get(lab, "/v2/x/y/tags/list?n=0", &[]).await.json()["tags"],
        json!([])
    );
    assert_eq!(get(lab, "/v2/none/tags/list", &[]).await.status, 404);
    let catalog = get(lab, "/v2/_catalog", &[]).await;
    assert_eq!(catalog.json(), json!({"repositories": ["x", "x/y"]}));
}

#[tokio::test]
async fn referrers_are_found_filtered_and_deleted() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let subject = Digest::of(b"not pushed yet");
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX, "artifactType": "application/x.profile",
        "manifests": [], "annotations": {"k": "v"}, "subject": {"digest": subject},
    })
    .to_string();
    let put = request(
        lab,
        Method::PUT,
        &format!("/v2/r/manifests/{}", Digest::of(index.as_bytes())),
        &[("content-type", INDEX)],
        index.clone(),
    )
    .await;
    assert_eq!(
        (put.status.as_u16(), put.header("oci-subject")),
        (201, &*subject.to_string())
    );
    let path = format!("/v2/r/referrers/{subject}");
    let found = get(lab, &path, &[]).await;
    assert_eq!(found.header("content-type"), INDEX);
    assert_eq!(
        found.json()["manifests"],
        json!([{"mediaType": INDEX, "digest": Digest::of(index.as_bytes()), "size": index.len(),
                "artifactType": "application/x.profile", "annotations": {"k": "v"}}])
    );
    let other = get(lab, &format!("{path}?artifactType=other"), &[]).await;
    assert_eq!(other.json()["manifests"], json!([]));
    assert_eq!(other.header("oci-filters-applied"), "artifactType");
    let manifest = format!("/v2/r/manifests/{}", Digest::of(index.as_bytes()));
    assert_eq!(
        request(lab, Method::DELETE, &manifest, &[], "")
            .await
            .status,
        202
    );
    assert_eq!(get(lab, &path, &[]).await.json()["manifests"], json!([]));
    assert_eq!(get(lab, &manifest, &[]).await.status, 404);
}

#[tokio::test]
async fn deleting_a_manifest_takes_its_tags() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let digest = lab
        .push_manifest("r", "one", MANIFEST, b"{\"a\":1}")
        .unwrap();
    lab.push_manifest("r", "two", MANIFEST, b"{\"a\":1}")
        .unwrap();
    lab.push_manifest("r", "three", MANIFEST, b"{\"a\":2}")
        .unwrap();
    let tag = request(lab, Method::DELETE, "/v2/r/manifests/one", &[], "").await;
    assert_eq!(tag.status, 202);
    assert_eq!(get(lab, "/v2/r/manifests/two", &[]).await.status, 200);
    let path = format!("/v2/r/manifests/{digest}");
    assert_eq!(
        request(lab, Method::DELETE, &path, &[], "").await.status,
        202
    );
    assert_eq!(
        get(lab, "/v2/r/tags/list", &[]).await.json()["tags"],
        json!(["three"])
    );
}

#[tokio::test]
async fn every_request_is_logged() {
    let log_dir = tempfile::tempdir().unwrap();
    let file = log_dir.path().join("requests.jsonl");
    let fixture = Fixture::new(|options| options.log_file = Some(file.clone())).await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("a/b", &noise(100_000)).unwrap();
    let path = format!("/v2/a/b/blobs/{digest}");
    let mark = lab.log().mark();
    get(lab, &path, &[("range", "bytes=10-1009")]).await;
    get(
        lab,
        "/v2/a/b/manifests/none",
        &[("authorization", "Basic eA==")],
    )
    .await;
    lab.log()
        .wait_until(|entries| entries.len() == 2 && entries.iter().all(|e| e.duration_ms.is_some()))
        .await;

    let entries = lab.log().entries_since(&mark);
    let first = &entries[0];
    assert_eq!((first.kind, first.status), (RequestKind::Blob, Some(206)));
    assert_eq!(
        (first.method.as_str(), first.path.as_str()),
        ("GET", path.as_str())
    );
    assert_eq!(
        (first.repo.as_deref(), first.digest),
        (Some("a/b"), Some(digest))
    );
    assert_eq!(first.range.as_deref(), Some("bytes=10-1009"));
    assert_eq!(
        (first.bytes, first.length, first.complete),
        (1000, 1000, true)
    );
    assert!(first.first_byte_ms.is_some() && !first.authorization);
    assert_eq!(first.user_agent.as_deref(), Some("lab-tests"));
    let second = &entries[1];
    assert_eq!(
        (second.kind, second.status),
        (RequestKind::Manifest, Some(404))
    );
    assert_eq!(second.reference.as_deref(), Some("none"));
    assert!(second.authorization && second.connection != first.connection);
    let totals = lab.log().totals_since(&mark);
    assert_eq!(
        (
            totals.requests,
            totals.blob_requests,
            totals.manifest_requests
        ),
        (2, 1, 1)
    );
    assert_eq!(
        (totals.blob_bytes, totals.blobs[&digest].bytes),
        (1000, 1000)
    );
    assert_eq!((totals.connections, totals.failed), (2, 1));

    let lines: Vec<lab::LogEntry> = std::fs::read_to_string(&file)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let mut sorted = lines.clone();
    sorted.sort_by_key(|entry| entry.index);
    assert_eq!(sorted, entries);
}

#[tokio::test]
async fn content_survives_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(LabOptions::new(dir.path())).await.unwrap();
    let digest = push_whole(&lab, "r", b"kept").await;
    lab.stop().await;
    let lab = Lab::start_blocking(LabOptions::new(dir.path())).unwrap();
    assert_eq!(
        get(&lab, &format!("/v2/r/blobs/{digest}"), &[]).await.body,
        "kept"
    );
}
