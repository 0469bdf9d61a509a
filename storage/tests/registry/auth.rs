use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures_util::future::join_all;
use storage::{
    ranges::FetchFailure,
    registry::{ClientOptions, DockerConfig, DockerConfigOptions, RegistryClient, Repository},
};

use crate::server::{
    Logged, Reply, Server, blob, client, empty, get, options, reply, serve, slice, with,
};

/// A client with this docker config.
fn client_with(config: &str) -> (RegistryClient, tempfile::TempDir) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("config.json");
    fs::write(&path, config).unwrap();
    let client = RegistryClient::new(ClientOptions {
        credentials: Arc::new(DockerConfig::new(DockerConfigOptions {
            path,
            helper_dirs: vec![root.path().to_owned()],
            ..DockerConfigOptions::default()
        })),
        ..options()
    });
    (client, root)
}

fn auths(host: &str, entry: &str) -> String {
    format!(r#"{{"auths": {{"{host}": {entry}}}}}"#)
}

/// A token server that gives `token-1`, `token-2` and so on to whom `allows` lets.
async fn token_server(allows: impl Fn(&Logged) -> u16 + Send + Sync + 'static) -> Server {
    let count = AtomicUsize::new(1);
    Server::start(move |request| match allows(request) {
        200 => {
            let number = count.fetch_add(1, Ordering::Relaxed);
            reply(
                200,
                format!(r#"{{"token":"token-{number}","expires_in":300}}"#),
            )
        }
        status => reply(status, r#"{"details":"incorrect username or password"}"#),
    })
    .await
}

/// A registry that serves `data` for tokens with a number of at least `oldest`.
async fn bearer_registry(realm: &str, data: Bytes, oldest: Arc<AtomicUsize>) -> Server {
    let challenge =
        format!(r#"Bearer realm="{realm}",service="the registry",scope="repository:REPO:pull""#);
    Server::start(move |request| {
        let number = request
            .header("authorization")
            .and_then(|value| value.strip_prefix("Bearer token-"))
            .and_then(|number| number.parse::<usize>().ok());
        if number.is_some_and(|number| number >= oldest.load(Ordering::Relaxed)) {
            return serve(request, &data);
        }
        let repository = request.path()[4..].split("/blobs").next().unwrap();
        let challenge = challenge.replace("REPO", repository);
        with(
            reply(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#),
            "www-authenticate",
            &challenge,
        )
    })
    .await
}

fn query_of(request: &Logged) -> String {
    request.uri.query().unwrap_or("").to_owned()
}

#[tokio::test]
async fn anonymous_tokens_are_shared_by_all_requests() {
    let (data, digest) = blob(10_000);
    let tokens = token_server(|_| 200).await;
    let realm = format!("http://{}/token?already=there", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let client = client();
    for start in [0, 10, 20] {
        let range = start..start + 5;
        let got = get(
            &client,
            &server.repository(),
            (digest, 10_000),
            range.clone(),
        )
        .await;
        assert_eq!(got.unwrap(), slice(&data, range));
    }
    assert_eq!(tokens.log().len(), 1);
    assert_eq!(
        query_of(&tokens.log()[0]),
        "already=there&service=the%20registry&scope=repository:some/image:pull"
    );
    assert!(tokens.log()[0].header("authorization").is_none());
    assert_eq!(server.log().len(), 4, "one refusal, three replies");
    // Another repository of the same registry: what it wants is known by now.
    let other = Repository::new(&server.host(), "other/image").unwrap();
    get(&client, &other, (digest, 10_000), 0..5).await.unwrap();
    assert_eq!(server.log().len(), 5);
    assert!(query_of(&tokens.log()[1]).ends_with("scope=repository:other/image:pull"));
    assert_eq!(client.stats().token_requests, 2);
}

#[tokio::test]
async fn a_password_gets_a_token() {
    let (data, digest) = blob(100);
    let tokens = token_server(|request| {
        if request.header("authorization") == Some("Basic dXNlcjpwdw==") {
            200
        } else {
            401
        }
    })
    .await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let (client, _root) = client_with(&auths(&server.host(), r#"{"auth":"dXNlcjpwdw=="}"#));
    let got = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    assert!(query_of(&tokens.log()[0]).ends_with("client_id=snapshotterd&account=user"));
    // The password went to the token server only.
    for request in server.log() {
        assert!(
            request
                .header("authorization")
                .is_none_or(|value| value.starts_with("Bearer"))
        );
    }
}

#[tokio::test]
async fn wrong_and_missing_credentials_are_told_apart() {
    let (data, digest) = blob(100);
    let tokens = token_server(|_| 401).await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data, Arc::new(AtomicUsize::new(1))).await;
    let (client, root) = client_with(&auths(&server.host(), r#"{"auth":"dXNlcjpwdw=="}"#));
    let error = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Denied);
    let message = error.report();
    let config = root.path().join("config.json");
    for part in [
        &format!("{} gives no token", tokens.host()),
        &format!(
            "refused the credentials for {} in the docker config",
            server.host()
        ),
        config.to_str().unwrap(),
        "incorrect username or password",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(
        !message.contains("dXNlcjpwdw") && !format!("{error:?}").contains("pw"),
        "{message}"
    );

    let (client, _root) = client_with("{}");
    let error = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err();
    let message = error.report();
    let expected = format!("no credentials for {} in the docker config", server.host());
    assert!(message.contains(&expected), "{message}");
}

#[tokio::test]
async fn an_anonymous_token_that_is_not_enough_is_no_endless_loop() {
    let (data, digest) = blob(100);
    let tokens = token_server(|_| 200).await;
    let realm = format!("http://{}/token", tokens.host());
    let never = Arc::new(AtomicUsize::new(usize::MAX));
    let server = bearer_registry(&realm, data, never).await;
    let error = get(&client(), &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Denied);
    let message = error.report();
    assert!(message.contains("401: no credentials for"), "{message}");
    assert!(message.contains("UNAUTHORIZED"), "{message}");
    assert_eq!((server.log().len(), tokens.log().len()), (2, 1));
}

#[tokio::test]
async fn basic_authentication_of_the_registry_itself() {
    let (data, digest) = blob(100);
    let served = data.clone();
    let server = Server::start(move |request| match request.header("authorization") {
        Some("Basic dXNlcjpwdw==") => serve(request, &served),
        _ => with(empty(401), "www-authenticate", "Basic realm=\"registry\""),
    })
    .await;
    let (right, _root) = client_with(&auths(&server.host(), r#"{"auth":"dXNlcjpwdw=="}"#));
    for _ in 0..3 {
        let got = get(&right, &server.repository(), (digest, 100), 5..9)
            .await
            .unwrap();
        assert_eq!(got, data.slice(5..9));
    }
    assert_eq!(
        server.log().len(),
        4,
        "once it is known, nothing is asked without"
    );

    let (wrong, _root) = client_with(&auths(&server.host(), r#"{"auth":"dXNlcjpuZWlu"}"#));
    let message = get(&wrong, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err()
        .report();
    assert!(
        message.contains("401:") && message.contains("refused the credentials"),
        "{message}"
    );

    let (none, _root) = client_with("{}");
    let message = get(&none, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err()
        .report();
    let expected = format!(
        "401: no credentials for {} in the docker config",
        server.host()
    );
    assert!(message.contains(&expected), "{message}");
}

#[tokio::test]
async fn identity_tokens_are_exchanged_by_post() {
    let (data, digest) = blob(100);
    let tokens = token_server(|request| {
        let form = String::from_utf8_lossy(&request.body).into_owned();
        let right = request.method == "POST"
            && form.contains("grant_type=refresh_token&refresh_token=re%2Bfresh&client_id=")
            && form.contains("service=the%20registry&scope=repository:some/image:pull");
        if right { 200 } else { 400 }
    })
    .await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let (client, _root) = client_with(&auths(&server.host(), r#"{"identitytoken":"re+fresh"}"#));
    let got = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    let (client, _root) = client_with(&auths(&server.host(), r#"{"identitytoken":"revoked"}"#));
    let error = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Denied, "{}", error.report());
}

#[tokio::test]
async fn servers_that_know_only_post_get_one() {
    for status in [404, 405] {
        let (data, digest) = blob(100);
        let tokens = token_server(move |request| {
            let form = String::from_utf8_lossy(&request.body).into_owned();
            let right = form.contains("grant_type=password&username=user&password=pw&");
            if request.method == "GET" {
                status
            } else if right {
                200
            } else {
                400
            }
        })
        .await;
        let realm = format!("http://{}/token", tokens.host());
        let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
        let (client, _root) = client_with(&auths(&server.host(), r#"{"auth":"dXNlcjpwdw=="}"#));
        let got = get(&client, &server.repository(), (digest, 100), 5..9)
            .await
            .unwrap();
        assert_eq!(got, data.slice(5..9));
    }
}

#[tokio::test]
async fn registry_tokens_are_used_as_they_are() {
    let (data, digest) = blob(100);
    let tokens = token_server(|_| 500).await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let (client, _root) = client_with(&auths(&server.host(), r#"{"registrytoken":"token-7"}"#));
    let got = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    assert!(tokens.log().is_empty());
}

#[tokio::test]
async fn a_revoked_token_is_replaced_once_for_everybody() {
    let (data, digest) = blob(64_000);
    let oldest = Arc::new(AtomicUsize::new(1));
    let tokens = token_server(|_| 200).await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::clone(&oldest)).await;
    let client = client();
    let repository = server.repository();
    for round in 1..=3 {
        oldest.store(round, Ordering::Relaxed);
        let fetches = (0..64u64).map(|index| {
            let range = index * 1000..index * 1000 + 1000;
            let (client, repository, data) = (&client, &repository, &data);
            async move {
                let got = get(client, repository, (digest, 64_000), range.clone()).await;
                let got = got.unwrap_or_else(|error| panic!("{}", error.report()));
                assert_eq!(got, slice(data, range));
            }
        });
        join_all(fetches).await;
        assert_eq!(tokens.log().len(), round, "exactly one exchange each time");
    }
}

#[tokio::test]
async fn a_token_server_that_fails_for_a_while_is_asked_again() {
    let (data, digest) = blob(100);
    let count = AtomicUsize::new(0);
    let tokens = token_server(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => 503,
        1 => 429,
        _ => 200,
    })
    .await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let got = get(&client(), &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    assert_eq!(tokens.log().len(), 3);
}

#[tokio::test]
async fn waiting_requests_share_a_failure_too() {
    let (data, digest) = blob(64_000);
    let tokens = token_server(|_| 403).await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data, Arc::new(AtomicUsize::new(1))).await;
    let (client, repository) = (client(), server.repository());
    let fetches =
        (0..32u64).map(|index| get(&client, &repository, (digest, 64_000), index..index + 1));
    let results = join_all(fetches).await;
    assert!(results.iter().all(|result| {
        result
            .as_ref()
            .is_err_and(|error| error.failure() == FetchFailure::Denied)
    }));
    let asked = tokens.log().len();
    assert!(asked < 32, "32 requests asked {asked} times");
}

#[tokio::test]
async fn odd_token_servers_are_refused() {
    let (data, digest) = blob(100);
    for (realm, expected) in [
        ("not a url", "not a URL"),
        ("ftp://x/token", "neither http nor https"),
        ("/token", "not a URL"),
    ] {
        let server = bearer_registry(realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
        let error = get(&client(), &server.repository(), (digest, 100), 5..9)
            .await
            .unwrap_err();
        let message = error.report();
        assert!(message.contains(expected), "{realm}: {message}");
    }
    for (answer, expected) in [
        ("{}", "without a token"),
        ("{\"token\":\"a\\nb\"}", "characters"),
    ] {
        let tokens = Server::start(move |_| reply(200, answer)).await;
        let realm = format!("http://{}/token", tokens.host());
        let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
        let error = get(&client(), &server.repository(), (digest, 100), 5..9)
            .await
            .unwrap_err();
        let message = error.report();
        assert!(message.contains(expected), "{answer}: {message}");
    }
}

#[tokio::test]
async fn unsupported_schemes_are_named() {
    let server = Server::start(|_| {
        with(
            with(empty(401), "www-authenticate", "Negotiate"),
            "www-authenticate",
            "Digest realm=x",
        )
    })
    .await;
    let (_, digest) = blob(100);
    let error = get(&client(), &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(
        message.contains("not supported (negotiate, digest)"),
        "{message}"
    );
}

#[tokio::test]
async fn a_credential_helper_is_used_end_to_end() {
    let (data, digest) = blob(100);
    let secret = BASE64_STANDARD.encode("helped:s3cret");
    let tokens = token_server(move |request| {
        let sent = request
            .header("authorization")
            .and_then(|value| value.strip_prefix("Basic "));
        if sent == Some(secret.as_str()) {
            200
        } else {
            401
        }
    })
    .await;
    let realm = format!("http://{}/token", tokens.host());
    let server = bearer_registry(&realm, data.clone(), Arc::new(AtomicUsize::new(1))).await;
    let config = format!(r#"{{"credHelpers": {{"{}": "lab"}}}}"#, server.host());
    let (client, root) = client_with(&config);
    let program = root.path().join("docker-credential-lab");
    let script = "#!/bin/sh\nread -r host\ncase $host in 127.0.0.1:*) echo '{\"Username\":\"helped\",\"Secret\":\"s3cret\"}';; *) exit 1;; esac\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let got = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));

    fs::write(&program, "#!/bin/sh\necho locked out; exit 1\n").unwrap();
    let other = Repository::new(&server.host(), "other/image").unwrap();
    let error = get(&client, &other, (digest, 100), 5..9).await.unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Denied);
    let message = error.report();
    assert!(
        message.contains("docker-credential-lab: it failed and said \"locked out\""),
        "{message}"
    );
}

#[tokio::test]
async fn a_403_names_the_credentials_that_were_not_enough() {
    let server = Server::start(|_| -> Reply { reply(403, "quota") }).await;
    let (_, digest) = blob(100);
    let (client, _root) = client_with("{}");
    let message = get(&client, &server.repository(), (digest, 100), 5..9)
        .await
        .unwrap_err()
        .report();
    assert!(
        message.contains("403: no credentials for") && message.contains("(quota)"),
        "{message}"
    );
}
