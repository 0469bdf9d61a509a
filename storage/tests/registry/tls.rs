use std::{path::Path, process::Command, sync::Arc};

use storage::{
    ranges::{FetchError, FetchFailure},
    registry::{ClientOptions, RegistryClient, Repository, TrustedRoots},
};

use crate::{
    certs::Authority,
    server::{Server, blob, client, client_with_hosts, empty, get, options, reply, serve, with},
};

async fn secure(config: Arc<rustls::ServerConfig>) -> Server {
    let (data, _) = blob(1000);
    Server::start_with(Some(config), move |request| serve(request, &data)).await
}

/// Fetches a little from `r.test` with this `hosts.toml`.
async fn fetch(root: &Path, hosts: &str) -> Result<(), FetchError> {
    let (data, digest) = blob(1000);
    let client = client_with_hosts(root, "r.test", hosts);
    let repository = Repository::new("r.test", "a/b").unwrap();
    let got = get(&client, &repository, (digest, 1000), 5..9).await?;
    assert_eq!(got, data.slice(5..9));
    Ok(())
}

async fn problem(root: &Path, hosts: &str) -> String {
    let error = fetch(root, hosts).await.unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Invalid, "{}", error.report());
    error.report()
}

#[tokio::test]
async fn a_private_authority_is_trusted_when_named() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let server = secure(authority.server("127.0.0.1")).await;
    let url = format!("https://{}", server.host());
    let ca = authority.write(root.path());

    let message = problem(root.path(), &format!("server = \"{url}\"")).await;
    let config = root.path().join("r.test/hosts.toml");
    for part in [
        "is not signed by a trusted authority",
        "ca = ",
        config.to_str().unwrap(),
        &server.host(),
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(server.log().is_empty());

    for ca in [
        format!("{ca:?}"),
        format!("[{ca:?}]"),
        "\"../ca.pem\"".to_owned(),
    ] {
        let hosts = format!("[host.\"{url}\"]\nca = {ca}");
        fetch(root.path(), &hosts)
            .await
            .unwrap_or_else(|error| panic!("{}", error.report()));
    }
    fetch(
        root.path(),
        &format!("server = \"{url}\"\nskip_verify = true"),
    )
    .await
    .unwrap();

    // Trusted for everything.
    let (_, digest) = blob(1000);
    let dir = root.path().join("r.test/hosts.toml");
    std::fs::write(dir, format!("server = \"{url}\"")).unwrap();
    let client = RegistryClient::new(ClientOptions {
        hosts_dirs: vec![root.path().to_owned()],
        trusted_roots: TrustedRoots::Files(vec![ca]),
        ..options()
    });
    let repository = Repository::new("r.test", "a/b").unwrap();
    get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_a_certificate_is_said() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(root.path());
    for (config, expected) in [
        (
            authority.server("other.test"),
            "was issued for another name",
        ),
        (
            authority.server_until("127.0.0.1", 2001, None),
            "has expired",
        ),
    ] {
        let server = secure(config).await;
        let hosts = format!("server = \"https://{}\"\nca = \"../ca.pem\"", server.host());
        let message = problem(root.path(), &hosts).await;
        assert!(
            message.contains(expected) && message.contains(&server.host()),
            "{message}"
        );
    }
}

#[tokio::test]
async fn client_certificates_are_shown() {
    let root = tempfile::tempdir().unwrap();
    let (authority, clients) = (Authority::new(), Authority::new());
    authority.write(root.path());
    let server = secure(authority.server_for_clients("127.0.0.1", &clients)).await;
    let (certificate, key) = clients.client();
    std::fs::write(root.path().join("c.pem"), &certificate).unwrap();
    std::fs::write(root.path().join("k.pem"), &key).unwrap();
    std::fs::write(root.path().join("both.pem"), certificate + &key).unwrap();
    let hosts = format!(
        "server = \"https://{}\"\nca = \"../ca.pem\"\n",
        server.host()
    );
    for client in [
        "[[\"../c.pem\", \"../k.pem\"]]",
        "\"../both.pem\"",
        "[\"../both.pem\"]",
    ] {
        let hosts = format!("{hosts}client = {client}");
        fetch(root.path(), &hosts)
            .await
            .unwrap_or_else(|error| panic!("{}", error.report()));
    }
    let error = fetch(root.path(), &hosts).await.unwrap_err();
    let message = error.report();
    assert!(message.contains("client certificate"), "{message}");
}

#[tokio::test]
async fn unusable_certificate_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("junk.pem"), "junk").unwrap();
    let bad = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(root.path().join("bad.pem"), bad).unwrap();
    let authority = Authority::new();
    authority.write(root.path());
    for (hosts, expected) in [
        ("ca = \"../missing.pem\"", "missing.pem"),
        ("ca = \"../junk.pem\"", "holds no PEM certificate"),
        ("ca = \"../bad.pem\"", "cannot be used as an authority"),
        ("client = \"../ca.pem\"", "holds no PEM key"),
        (
            "client = [[\"../ca.pem\", \"../missing.pem\"]]",
            "missing.pem",
        ),
    ] {
        let hosts = format!("server = \"https://127.0.0.1:1\"\n{hosts}");
        let message = problem(root.path(), &hosts).await;
        assert!(message.contains(expected), "{hosts}: {message}");
    }
}

#[tokio::test]
async fn loopback_registries_may_speak_either() {
    let (data, digest) = blob(1000);
    let authority = Authority::new();
    let server = secure(authority.server("127.0.0.1")).await;
    let client = client();
    for _ in 0..2 {
        let got = get(&client, &server.repository(), (digest, 1000), 5..9).await;
        let got = got.unwrap_or_else(|error| panic!("{}", error.report()));
        assert_eq!(got, data.slice(5..9));
    }
    assert_eq!(
        client.stats().connections,
        2,
        "one plain, then one with TLS"
    );

    // A server that says 400 to plain HTTP, as Go's and nginx's do when they expect TLS, but has
    // no TLS: the 400 is the answer.
    let plain = Server::start(|_| reply(400, "bad name")).await;
    let error = get(&client, &plain.repository(), (digest, 1000), 5..9)
        .await
        .unwrap_err();
    assert!(
        error.report().contains("400 (bad name)"),
        "{}",
        error.report()
    );
}

#[tokio::test]
async fn plain_http_behind_an_https_url_is_recognised() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start(|_| empty(200)).await;
    let hosts = format!("server = \"https://{}\"", server.host());
    let message = problem(root.path(), &hosts).await;
    let advice = format!("server = \"http://{}\"", server.host());
    assert!(
        message.contains("does not speak TLS") && message.contains(&advice),
        "{message}"
    );

    // With TLS settings but a plain URL, TLS is only tried.
    let (data, _) = blob(1000);
    let server = Server::start(move |request| serve(request, &data)).await;
    let hosts = format!("server = \"http://{}\"\nskip_verify = true", server.host());
    fetch(root.path(), &hosts).await.unwrap();
}

#[tokio::test]
async fn passwords_are_not_sent_to_a_plain_token_server_of_a_secure_registry() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(root.path());
    let challenge = "Bearer realm=\"http://token.invalid/token\",service=\"x\"";
    let server = Server::start_with(Some(authority.server("127.0.0.1")), move |_| {
        with(empty(401), "www-authenticate", challenge)
    })
    .await;
    let config = root.path().join("config.json");
    let auths = format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, server.host());
    std::fs::write(&config, auths).unwrap();
    let dir = root.path().join("r.test");
    std::fs::create_dir(&dir).unwrap();
    let hosts = format!("server = \"https://{}\"\nca = \"../ca.pem\"", server.host());
    std::fs::write(dir.join("hosts.toml"), hosts).unwrap();
    let client = RegistryClient::new(ClientOptions {
        hosts_dirs: vec![root.path().to_owned()],
        credentials: Arc::new(storage::registry::DockerConfig::new(
            storage::registry::DockerConfigOptions {
                path: config,
                ..Default::default()
            },
        )),
        ..options()
    });
    let repository = Repository::new("r.test", "a/b").unwrap();
    let (_, digest) = blob(1000);
    let message = get(&client, &repository, (digest, 1000), 5..9)
        .await
        .unwrap_err()
        .report();
    assert!(
        message.contains("credentials over plain HTTP, which are not sent"),
        "{message}"
    );
}

/// The test below runs itself in a process whose environment names the authority.
const CHILD: &str = "REGISTRY_TEST_HOST";

#[tokio::test]
async fn the_authorities_of_the_system_can_be_named_in_the_environment() {
    if let Ok(host) = std::env::var(CHILD) {
        let root = tempfile::tempdir().unwrap();
        fetch(root.path(), &format!("server = \"https://{host}\""))
            .await
            .unwrap_or_else(|error| panic!("{}", error.report()));
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(root.path());
    let server = secure(authority.server("127.0.0.1")).await;
    let host = server.host();
    let run = |variable: &str, value: &Path| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                "tls::the_authorities_of_the_system_can_be_named_in_the_environment",
            ])
            .env(CHILD, &host)
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR")
            .env(variable, value);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let output = run("SSL_CERT_FILE", &ca).await.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let output = run("UNRELATED", &ca).await.unwrap();
    assert!(
        !output.status.success(),
        "without it the authority must not be trusted"
    );
}
