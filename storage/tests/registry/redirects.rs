use std::sync::{
    Arc,
    atomic::{AtomicU16, AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use storage::{
    ranges::FetchFailure,
    registry::{ClientOptions, DockerConfig, DockerConfigOptions, RegistryClient, Repository},
};

use crate::server::{
    Server, blob, client, empty, get, options, redirect, reply, serve, slice, with,
};

#[tokio::test]
async fn a_redirect_is_followed_byte_for_byte_and_used_again() {
    let (data, digest) = blob(10_000);
    let served = data.clone();
    let cdn = Server::start(move |request| serve(request, &served)).await;
    let signed = "/some%2Fkey/?Signature=a%2Fb+c~_-%3D&Key-Pair=AB==&Expires=99999999999";
    let location = format!("http://{}{signed}", cdn.host());
    let server = Server::start(move |_| redirect(307, &location)).await;
    let client = client();
    for range in [0..100, 5000..6000, 9_999..10_000] {
        let got = get(
            &client,
            &server.repository(),
            (digest, 10_000),
            range.clone(),
        )
        .await;
        assert_eq!(got.unwrap(), slice(&data, range));
    }
    assert_eq!(server.log().len(), 1, "the redirect is used again");
    for request in cdn.log() {
        assert_eq!(request.uri.to_string(), signed);
        assert_eq!(request.header("host"), Some(cdn.host().as_str()));
    }
    assert_eq!(client.stats().redirects, 1);
}

#[tokio::test]
async fn relative_redirects_stay_on_the_host() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let server = Server::start(move |request| {
        if request.path().contains("/blobs/") {
            redirect(302, "../../../store/x?y==")
        } else {
            serve(request, &served)
        }
    })
    .await;
    let got = get(&client(), &server.repository(), (digest, 1000), 10..20)
        .await
        .unwrap();
    assert_eq!(got, data.slice(10..20));
    assert_eq!(server.log()[1].uri.to_string(), "/v2/store/x?y==");
}

#[tokio::test]
async fn credentials_and_private_headers_stay_with_the_host_they_are_for() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let cdn = Server::start(move |request| serve(request, &served)).await;
    let location = format!("http://{}/x", cdn.host());
    let server = Server::start(move |request| {
        if request.header("authorization").is_none() {
            return with(empty(401), "www-authenticate", "Basic realm=\"r\"");
        }
        redirect(307, &location)
    })
    .await;
    let root = tempfile::tempdir().unwrap();
    let config = root.path().join("config.json");
    let auths = format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, server.host());
    std::fs::write(&config, auths).unwrap();
    let dir = root.path().join("r.test");
    std::fs::create_dir(&dir).unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[header]\nx-secret = \"s3cret\"",
        server.host()
    );
    std::fs::write(dir.join("hosts.toml"), hosts).unwrap();
    let client = RegistryClient::new(ClientOptions {
        hosts_dirs: vec![root.path().to_owned()],
        credentials: Arc::new(DockerConfig::new(DockerConfigOptions {
            path: config,
            ..DockerConfigOptions::default()
        })),
        ..options()
    });
    let repository = Repository::new("r.test", "a/b").unwrap();
    for _ in 0..2 {
        let got = get(&client, &repository, (digest, 1000), 10..20)
            .await
            .unwrap();
        assert_eq!(got, data.slice(10..20));
    }
    assert_eq!(server.log()[1].header("authorization"), Some("Basic dTpw"));
    assert!(
        server
            .log()
            .iter()
            .all(|request| request.header("x-secret") == Some("s3cret"))
    );
    assert_eq!(cdn.log().len(), 2);
    for request in cdn.log() {
        let names: Vec<&str> = request
            .headers
            .keys()
            .map(http::HeaderName::as_str)
            .collect();
        assert!(request.header("authorization").is_none(), "{names:?}");
        assert!(request.header("x-secret").is_none(), "{names:?}");
        assert!(request.header("range").is_some(), "{names:?}");
    }
}

#[tokio::test]
async fn an_expired_redirect_is_asked_for_again_once() {
    for refusal in [400, 401, 403, 404, 410] {
        let (data, digest) = blob(1000);
        let served = data.clone();
        let age = Arc::new(AtomicUsize::new(0));
        let now = Arc::clone(&age);
        let cdn = Server::start(move |request| {
            let valid = format!("/{}", now.load(Ordering::Relaxed));
            if request.path() == valid {
                serve(request, &served)
            } else {
                reply(refusal, "Request has expired")
            }
        })
        .await;
        let host = cdn.host();
        let now = Arc::clone(&age);
        let server = Server::start(move |_| {
            redirect(
                307,
                &format!("http://{host}/{}", now.load(Ordering::Relaxed)),
            )
        })
        .await;
        let client = client();
        let repository = server.repository();
        let fetch = || get(&client, &repository, (digest, 1000), 10..20);
        assert_eq!(fetch().await.unwrap(), data.slice(10..20));
        age.store(1, Ordering::Relaxed);
        assert_eq!(fetch().await.unwrap(), data.slice(10..20), "{refusal}");
        assert_eq!(server.log().len(), 2, "{refusal}");
        assert_eq!(client.stats().retries, 0, "renewal is no retry");
    }
}

#[tokio::test]
async fn many_ranges_of_a_blob_ask_for_one_redirect() {
    let (data, digest) = blob(64_000);
    let served = data.clone();
    let generation = Arc::new(AtomicUsize::new(0));
    let now = Arc::clone(&generation);
    let cdn = Server::start(move |request| {
        if request.path() == format!("/{}", now.load(Ordering::Relaxed)) {
            serve(request, &served)
        } else {
            empty(403)
        }
    })
    .await;
    let host = cdn.host();
    let now = Arc::clone(&generation);
    let server = Server::start(move |_| {
        redirect(
            307,
            &format!("http://{host}/{}", now.load(Ordering::Relaxed)),
        )
    })
    .await;
    let client = client();
    let repository = server.repository();
    for round in 0..2 {
        generation.store(round, Ordering::Relaxed);
        let fetches = (0..64u64).map(|index| {
            let range = index * 1000..index * 1000 + 1000;
            let (client, repository, data) = (&client, &repository, &data);
            async move {
                let got = get(client, repository, (digest, 64_000), range.clone())
                    .await
                    .unwrap();
                assert_eq!(got, slice(data, range));
            }
        });
        join_all(fetches).await;
        assert_eq!(server.log().len(), round + 1, "round {round}");
    }
}

#[tokio::test]
async fn a_target_that_always_refuses_ends_in_its_error() {
    let (_, digest) = blob(1000);
    let cdn = Server::start(|_| reply(403, "<Error>AccessDenied</Error>")).await;
    let location = format!("http://{}/x", cdn.host());
    let server = Server::start(move |_| redirect(307, &location)).await;
    let client = client();
    for round in 1..=2 {
        let error = get(&client, &server.repository(), (digest, 1000), 0..5)
            .await
            .unwrap_err();
        assert_eq!(error.failure(), FetchFailure::Denied);
        let message = error.report();
        assert!(
            message.contains(&cdn.host()) && message.contains("AccessDenied"),
            "{message}"
        );
        assert_eq!((server.log().len(), cdn.log().len()), (round, round));
    }
}

#[tokio::test]
async fn redirects_end_and_go_nowhere_odd() {
    let (_, digest) = blob(1000);
    for (location, expected) in [
        ("/again", "too many redirects"),
        ("ftp://x/y", "neither http nor https"),
        ("http://169.254.169.254/latest/", "link-local"),
        ("http://user:pw@x.invalid/", "credentials"),
    ] {
        let server = Server::start(move |_| redirect(302, location)).await;
        let error = get(&client(), &server.repository(), (digest, 1000), 0..5)
            .await
            .unwrap_err();
        let message = error.report();
        assert!(message.contains(expected), "{message}");
        assert!(!message.contains("user:pw"), "{message}");
        assert!(server.log().len() <= 6);
        assert!(!error.is_transient());
    }
}

#[tokio::test]
async fn a_failing_target_is_given_up_for_a_new_one() {
    let (data, digest) = blob(1000);
    let dead = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let served = data.clone();
    let cdn = Server::start(move |request| serve(request, &served)).await;
    let (alive, count) = (cdn.host(), AtomicU16::new(0));
    let server = Server::start(move |_| {
        let first = count.fetch_add(1, Ordering::Relaxed) == 0;
        redirect(
            307,
            &format!("http://{}/x", if first { &dead } else { &alive }),
        )
    })
    .await;
    let got = get(&client(), &server.repository(), (digest, 1000), 3..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(3..9));
    assert_eq!(server.log().len(), 2);
}

#[tokio::test]
async fn a_target_that_ignores_ranges_works_too() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let cdn = Server::start(move |_| reply(200, served.clone())).await;
    let location = format!("http://{}/x", cdn.host());
    let server = Server::start(move |request| {
        assert!(request.range().is_some());
        redirect(308, &location)
    })
    .await;
    let got = get(&client(), &server.repository(), (digest, 1000), 3..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(3..9));
}
