use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use storage::{
    ranges::{FetchError, FetchFailure, RangeSource as _, VerifiedBody},
    registry::RegistryError,
    source::Cause,
};

use crate::server::{
    Logged, Server, blob, client, client_with_hosts, empty, get, part, reply, serve, slice, with,
};

const LEN: usize = 300_000;

#[tokio::test]
async fn ranges_are_exact_and_counted_by_cause() {
    let (data, digest) = blob(LEN);
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let client = client();
    let blob = client.blob(&server.repository(), digest, LEN as u64);
    for (range, cause) in [
        (0..1, Cause::Metadata),
        (100..250_000, Cause::Demand),
        (LEN as u64 - 1..LEN as u64, Cause::Demand),
        (0..LEN as u64, Cause::Hydration),
    ] {
        let body = blob.fetch(range.clone(), cause).await.unwrap();
        assert_eq!(body.range(), range);
        let got = body.collect(range.clone()).await.unwrap();
        assert!(got == slice(&data, range.clone()), "{range:?}");
    }
    let stats = client.stats();
    assert_eq!(stats.cause(Cause::Metadata).bytes, 1);
    assert_eq!(stats.cause(Cause::Demand).bytes, 249_901);
    assert_eq!(stats.cause(Cause::Demand).requests, 2);
    assert_eq!(stats.cause(Cause::Hydration).bytes, LEN as u64);
    assert_eq!(stats.total().requests, 4);
    assert_eq!(server.log().len(), 4);
    assert!(
        server.log()[3].range().is_none(),
        "a whole blob needs no range"
    );
    assert_eq!(stats.retries, 0);
    let agent = server.log()[0].header("user-agent").unwrap().to_owned();
    assert!(agent.starts_with("snapshotterd/"), "{agent}");
    assert_eq!(server.log()[0].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn the_body_meters_its_own_traffic_and_connections_are_kept() {
    let (data, digest) = blob(LEN);
    let server = Server::start(move |request| serve(request, &data)).await;
    let client = client();
    let blob = client.blob(&server.repository(), digest, LEN as u64);
    for _ in 0..5 {
        let mut body = blob.fetch(5..2000, Cause::Prefetch).await.unwrap();
        while body.next_chunk().await.unwrap().is_some() {}
        assert_eq!(body.meter().requests(), 1);
        assert_eq!(body.meter().wire_bytes(), 1995);
    }
    assert_eq!(client.stats().connections, 1);
    assert!(server.log().iter().all(|request| request.connection == 0));
}

#[tokio::test]
async fn a_whole_blob_is_verified() {
    let (data, digest) = blob(LEN);
    let flip = Arc::new(AtomicUsize::new(0));
    let flipped = Arc::clone(&flip);
    let server = Server::start(move |request| {
        let mut data = data.to_vec();
        data[LEN - 5] ^= u8::try_from(flipped.load(Ordering::Relaxed)).unwrap();
        serve(request, &data)
    })
    .await;
    let client = client();
    let source = client.blob(&server.repository(), digest, LEN as u64);
    let body = VerifiedBody::open(&source, digest, Cause::Metadata)
        .await
        .unwrap();
    assert_eq!(body.collect().await.unwrap().len(), LEN);
    flip.store(1, Ordering::Relaxed);
    let repository = server.repository();
    let body = client.whole_blob(&repository, digest, LEN as u64, Cause::Metadata);
    let error = body.await.unwrap().collect().await.unwrap_err();
    assert!(matches!(error, FetchError::Digest { .. }), "{error}");
    assert!(error.to_string().contains("some/image"), "{error}");
}

#[tokio::test]
async fn a_server_that_ignores_ranges_gives_all_it_sends() {
    let (data, digest) = blob(LEN);
    let served = data.clone();
    let server = Server::start(move |_| reply(200, served.clone())).await;
    let client = client();
    let blob = client.blob(&server.repository(), digest, LEN as u64);
    let mut body = blob.fetch(1000..2000, Cause::Demand).await.unwrap();
    assert_eq!(body.range(), 0..LEN as u64);
    let mut all = Vec::new();
    while let Some(chunk) = body.next_chunk().await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    assert!(all == data, "everything that came can be kept");
    let got = get(&client, &server.repository(), (digest, LEN), 1000..2000).await;
    assert_eq!(got.unwrap(), data.slice(1000..2000));
    assert_eq!(server.log().len(), 2);
}

#[tokio::test]
async fn a_shorter_part_than_asked_for_is_completed() {
    let (data, digest) = blob(2_000_000);
    let served = data.clone();
    let server = Server::start(move |request| {
        let range = request.range().unwrap_or(0..served.len());
        let end = range.end.min(range.start + 700_000);
        part(&served, range.start..end)
    })
    .await;
    let got = get(
        &client(),
        &server.repository(),
        (digest, data.len()),
        10..1_999_990,
    )
    .await;
    assert!(got.unwrap() == data.slice(10..1_999_990));
    let asked: Vec<_> = server.log().iter().filter_map(Logged::range).collect();
    assert_eq!(
        asked,
        [10..1_999_990, 700_010..1_999_990, 1_400_010..1_999_990]
    );
}

#[tokio::test]
async fn replies_that_do_not_match_the_request_are_refused() {
    let (data, digest) = blob(1000);
    let wrong = Arc::new(AtomicUsize::new(0));
    let which = Arc::clone(&wrong);
    let server = Server::start(move |_| {
        let parted =
            |stated: &str, body: &[u8]| with(reply(206, body.to_vec()), "content-range", stated);
        match which.load(Ordering::Relaxed) {
            0 => parted("bytes 101-200/1000", &data[101..201]),
            1 => parted("bytes 100-199/1001", &data[100..200]),
            2 => parted("bytes 100-299/1000", &data[100..300]),
            3 => parted("bytes 100-199/1000", &data[100..198]),
            4 => parted("items 100-199/1000", &data[100..200]),
            5 => reply(206, data.slice(100..200)),
            6 => reply(200, data.slice(..999)),
            7 => empty(204),
            8 => with(
                part(&data, 100..200),
                "content-type",
                "Multipart/byteranges; boundary=x",
            ),
            9 => with(part(&data, 100..200), "content-encoding", "gzip"),
            10 => with(reply(416, ""), "content-range", "bytes */50"),
            11 => parted("bytes 101-199/1000", &data[101..200]),
            12 => parted("bytes 99-199/1000", &data[99..200]),
            13 => parted("bytes 0-9/1000", &data[..10]),
            _ => empty(400),
        }
    })
    .await;
    for (kind, expected) in [
        "sent bytes 101..201 when asked for 100..200",
        "says that the blob has 1001 bytes",
        "sent bytes 100..300",
        "announced 98 bytes where 100 belong",
        "valid Content-Range",
        "valid Content-Range",
        "announced 999 bytes where 1000 belong",
        "204",
        "multipart",
        "gzip",
        "416",
        "sent bytes 101..200",
        "sent bytes 99..200",
        "sent bytes 0..10",
        "400",
    ]
    .into_iter()
    .enumerate()
    {
        wrong.store(kind, Ordering::Relaxed);
        // A new client, for nothing known about the host to play a part.
        let error = get(&client(), &server.repository(), (digest, 1000), 100..200)
            .await
            .expect_err(expected);
        let message = error.report();
        assert!(message.contains(expected), "{kind}: {message}");
        for part in [
            "100..200",
            &digest.to_string(),
            &server.host(),
            "some/image",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert_eq!(error.failure(), FetchFailure::Invalid, "{message}");
        assert!(!error.is_transient(), "{message}");
    }
}

#[tokio::test]
async fn a_wrong_reply_of_a_mirror_is_made_good_by_the_next_host() {
    let (data, digest) = blob(1000);
    let shifted = data.clone();
    let mirror = Server::start(move |_| part(&shifted, 101..201)).await;
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]",
        server.host(),
        mirror.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    let repository = storage::registry::Repository::new("r.test", "a/b").unwrap();
    let got = get(&client, &repository, (digest, 1000), 100..200)
        .await
        .unwrap();
    assert_eq!(got, data.slice(100..200));
    assert_eq!(mirror.log().len(), 1);
}

#[tokio::test]
async fn bounds_are_checked_before_anybody_is_asked() {
    let (data, digest) = blob(1000);
    let server = Server::start(move |request| serve(request, &data)).await;
    let client = client();
    for range in [5..5, 0..1001, u64::MAX - 1..u64::MAX] {
        let error = get(&client, &server.repository(), (digest, 1000), range)
            .await
            .unwrap_err();
        assert!(matches!(error, FetchError::OutOfBounds { .. }), "{error}");
    }
    assert!(server.log().is_empty());
}

#[tokio::test]
async fn a_missing_blob_says_so_with_the_words_of_the_server() {
    let server = Server::start(|_| {
        reply(
            404,
            r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}"#,
        )
    })
    .await;
    let (_, digest) = blob(1000);
    let error = get(&client(), &server.repository(), (digest, 1000), 0..10)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Missing);
    let message = error.report();
    assert!(
        message.contains("404 (BLOB_UNKNOWN: blob unknown to registry)"),
        "{message}"
    );
    let FetchError::Source { source, .. } = &error else {
        panic!("{error:?}");
    };
    let registry = source.downcast_ref::<RegistryError>().unwrap();
    assert_eq!(registry.status(), Some(404));
    assert_eq!(server.log().len(), 1, "a 404 is not retried");
}

#[tokio::test]
async fn a_body_may_be_dropped_at_any_time() {
    let (data, digest) = blob(LEN);
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let client = client();
    let blob = client.blob(&server.repository(), digest, LEN as u64);
    for read in [0, 1, 2] {
        let mut body = blob.fetch(0..LEN as u64, Cause::Demand).await.unwrap();
        for _ in 0..read {
            body.next_chunk().await.unwrap();
        }
    }
    let got = get(&client, &server.repository(), (digest, LEN), 7..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(7..9));
}
