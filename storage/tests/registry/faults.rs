use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use storage::{
    ranges::{FetchFailure, RangeSource as _},
    registry::{ClientOptions, RegistryClient, Repository},
    source::Cause,
};

use crate::server::{
    Ending, Server, blob, broken, client, client_with_hosts, dripping, empty, get, options, part,
    reply, serve, slice, with,
};

fn impatient() -> RegistryClient {
    RegistryClient::new(ClientOptions {
        stall_timeout: Duration::from_millis(700),
        ..options()
    })
}

#[tokio::test]
async fn a_cut_body_is_resumed_where_it_ended() {
    let (data, digest) = blob(200_000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let range = request.range().unwrap();
        if count.fetch_add(1, Ordering::Relaxed) < 3 {
            let body = &served[range.clone()];
            broken(part(&served, range), body, 10_000, Ending::Cut)
        } else {
            part(&served, range)
        }
    })
    .await;
    let client = client();
    let blob = client.blob(&server.repository(), digest, 200_000);
    let mut body = blob.fetch(1000..150_000, Cause::Demand).await.unwrap();
    let mut got = Vec::new();
    while let Some(chunk) = body.next_chunk().await.unwrap() {
        got.extend_from_slice(&chunk);
    }
    assert!(got == data[1000..150_000]);
    let starts: Vec<_> = server
        .log()
        .iter()
        .map(|one| one.range().unwrap().start)
        .collect();
    assert_eq!(starts, [1000, 11_000, 21_000, 31_000]);
    assert_eq!(body.meter().requests(), 4);
    assert_eq!(
        body.meter().wire_bytes(),
        149_000,
        "nothing is fetched twice"
    );
    assert_eq!(client.stats().retries, 3);
}

#[tokio::test]
async fn a_cut_whole_body_is_resumed_without_ranges_too() {
    let (data, digest) = blob(200_000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => broken(reply(200, ""), &served, 50_000, Ending::Cut),
        1 => broken(reply(200, ""), &served, 10_000, Ending::Cut),
        _ => reply(200, served.clone()),
    })
    .await;
    let client = client();
    let body = client.blob(&server.repository(), digest, 200_000);
    let body = body.fetch(100..300, Cause::Demand).await.unwrap();
    assert_eq!(body.range(), 0..200_000);
    assert!(body.collect(0..200_000).await.unwrap() == data);
    assert_eq!(server.log().len(), 3);
}

#[tokio::test]
async fn a_body_that_never_gets_further_ends_in_an_error() {
    let (data, digest) = blob(200_000);
    let server = Server::start(move |request| {
        let range = request.range().unwrap();
        if range.start == 0 {
            let body = &data[range.clone()];
            broken(part(&data, range), body, 5000, Ending::Cut)
        } else {
            let body = &data[range.clone()];
            broken(part(&data, range), body, 0, Ending::Cut)
        }
    })
    .await;
    let error = get(
        &client(),
        &server.repository(),
        (digest, 200_000),
        0..100_000,
    )
    .await
    .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Unreachable);
    assert!(error.is_transient());
    let message = error.report();
    assert!(message.contains("bytes 5000..100000"), "{message}");
    assert_eq!(server.log().len(), 6, "one try and five retries");
}

#[tokio::test]
async fn a_stalled_body_or_head_is_asked_for_again() {
    let (data, digest) = blob(100_000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let range = request.range().unwrap();
        let body = &served[range.clone()];
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => broken(part(&served, range), body, 20_000, Ending::Hang),
            1 => broken(part(&served, range), body, 1, Ending::Hang),
            _ => part(&served, range),
        }
    })
    .await;
    let got = get(
        &impatient(),
        &server.repository(),
        (digest, 100_000),
        0..90_000,
    )
    .await;
    assert!(got.unwrap() == data.slice(..90_000));
    let starts: Vec<_> = server
        .log()
        .iter()
        .map(|one| one.range().unwrap().start)
        .collect();
    assert_eq!(starts[..3], [0, 20_000, 20_001]);
}

#[tokio::test]
async fn a_slow_body_is_no_stall_but_a_trickle_is() {
    let (data, digest) = blob(100_000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let range = request.range().unwrap();
        let body = served.slice(range.clone());
        match count.fetch_add(1, Ordering::Relaxed) {
            // Longer than the stall timeout, but something comes all the time.
            0 => dripping(part(&served, range), body, 4000, Duration::from_millis(200)),
            // A byte now and then.
            1 => dripping(part(&served, range), body, 1, Duration::from_millis(100)),
            _ => part(&served, range),
        }
    })
    .await;
    let client = RegistryClient::new(ClientOptions {
        stall_timeout: Duration::from_millis(2500),
        ..options()
    });
    let got = get(&client, &server.repository(), (digest, 100_000), 0..80_000)
        .await
        .unwrap();
    assert!(got == data.slice(..80_000));
    assert_eq!(server.log().len(), 1, "a slow body must not be given up");
    let got = get(&client, &server.repository(), (digest, 100_000), 0..5000)
        .await
        .unwrap();
    assert!(got == data.slice(..5000));
    assert_eq!(server.log().len(), 3, "a trickle must be given up");
}

#[tokio::test]
async fn a_silent_host_is_given_up_with_its_name() {
    // Accepts, and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let mut options = options();
    options.stall_timeout = Duration::from_millis(200);
    options.connect_timeout = Duration::from_millis(200);
    options.retry.retries = 1;
    let client = RegistryClient::new(options);
    let repository = Repository::new(&host, "a/b").unwrap();
    let (_, digest) = blob(10);
    let error = get(&client, &repository, (digest, 10), 0..5)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Unreachable);
    let message = error.report();
    assert!(
        message.contains(&format!("{host} sent nothing for")),
        "{message}"
    );
}

#[tokio::test]
async fn an_error_reply_that_never_ends_does_not_hold_anybody() {
    let server =
        Server::start(|_| broken(empty(416), &b"x".repeat(100_000), 100, Ending::Hang)).await;
    let (_, digest) = blob(1000);
    let error = get(&impatient(), &server.repository(), (digest, 1000), 0..10)
        .await
        .unwrap_err();
    assert!(error.report().contains("416 (xxx"), "{}", error.report());
}

#[tokio::test]
async fn busy_servers_are_asked_again_when_they_say() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let status = match count.fetch_add(1, Ordering::Relaxed) {
            0 => return with(empty(429), "retry-after", "1"),
            1 => return with(empty(503), "retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
            2 => return with(reply(429, "retry-after: 1.17 ms"), "retry-after", "soon"),
            3 => 500,
            4 => 502,
            _ => return serve(request, &served),
        };
        empty(status)
    })
    .await;
    let got = get(&client(), &server.repository(), (digest, 1000), 10..20)
        .await
        .unwrap();
    assert_eq!(got, data.slice(10..20));
    let log = server.log();
    assert_eq!(log.len(), 6);
    let pause = log[1].at - log[0].at;
    assert!(
        pause >= Duration::from_secs(1),
        "Retry-After must be kept, was {pause:?}"
    );
}

#[tokio::test]
async fn a_server_that_stays_busy_ends_in_its_status() {
    for status in [408, 429, 500, 502, 503, 504] {
        let server = Server::start(move |_| reply(status, "no capacity")).await;
        let (_, digest) = blob(1000);
        let error = get(&client(), &server.repository(), (digest, 1000), 0..10)
            .await
            .unwrap_err();
        assert_eq!(error.failure(), FetchFailure::Busy, "{status}");
        let message = error.report();
        assert!(
            message.contains(&format!("{status} (no capacity)")),
            "{message}"
        );
        assert_eq!(server.log().len(), 6);
    }
}

#[tokio::test]
async fn nobody_listening_is_said_in_words() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let repository = Repository::new(&host, "a/b").unwrap();
    let (_, digest) = blob(10);
    let error = get(&client(), &repository, (digest, 10), 0..5)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(
        message.contains(&format!("{host} refused the connection")),
        "{message}"
    );
    assert!(error.is_transient());

    let repository = Repository::new("no-such-host.invalid", "a/b").unwrap();
    let error = get(&client(), &repository, (digest, 10), 0..5)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(
        message.contains("no-such-host.invalid cannot be reached"),
        "{message}"
    );
    assert!(message.contains("dns"), "{message}");
}

#[tokio::test]
async fn a_mirror_that_dies_in_the_middle_is_replaced() {
    let (data, digest) = blob(100_000);
    let served = data.clone();
    let count = AtomicUsize::new(0);
    let mirror = Server::start(move |request| {
        let range = request.range().unwrap();
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => broken(
                part(&served, range.clone()),
                &served[range],
                30_000,
                Ending::Cut,
            ),
            _ => empty(503),
        }
    })
    .await;
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        server.host(),
        mirror.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    let repository = Repository::new("r.test", "a/b").unwrap();
    let got = get(&client, &repository, (digest, 100_000), 0..90_000)
        .await
        .unwrap();
    assert!(got == data.slice(..90_000));
    assert_eq!(server.log()[0].range(), Some(30_000..90_000));
    // It has just failed, so the next range is asked of the other one.
    let before = mirror.log().len();
    get(&client, &repository, (digest, 100_000), 5..6)
        .await
        .unwrap();
    assert_eq!(mirror.log().len(), before);
}

#[tokio::test]
async fn random_faults_never_change_a_byte() {
    let (data, digest) = blob(60_000);
    let served = data.clone();
    let state = Arc::new(AtomicUsize::new(1));
    let dice = move |sides: usize| {
        let roll = |old: usize| Some(old.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        let old = state
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, roll)
            .unwrap();
        (old >> 33) % sides
    };
    let roll = dice.clone();
    let server = Server::start(move |request| {
        let range = request.range().unwrap_or(0..served.len());
        let cut = roll(range.len());
        let body = &served[range.clone()];
        match roll(8) {
            0 => broken(part(&served, range), body, cut, Ending::Cut),
            1 => broken(reply(200, ""), &served, cut, Ending::Cut),
            2 => reply(200, served.clone()),
            3 => empty(503),
            4 => part(&served, range.start..range.start + cut.max(1)),
            _ => part(&served, range),
        }
    })
    .await;
    let mut options = options();
    options.retry.retries = 60;
    let client = RegistryClient::new(options);
    for _ in 0..150 {
        let start = dice(59_999) as u64;
        let end = start + 1 + dice(60_000 - usize::try_from(start).unwrap() - 1) as u64;
        let got = get(&client, &server.repository(), (digest, 60_000), start..end).await;
        let got = got.unwrap_or_else(|error| panic!("{start}..{end}: {}", error.report()));
        assert!(got == slice(&data, start..end), "{start}..{end}");
    }
}
