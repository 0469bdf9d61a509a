use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use super::*;

fn config(dir: &Path, text: &str) -> DockerConfig {
    let path = dir.join("config.json");
    fs::write(&path, text).unwrap();
    DockerConfig::new(DockerConfigOptions {
        path,
        helper_dirs: vec![dir.to_owned()],
        helper_timeout: Duration::from_secs(20),
    })
}

fn basic(username: &str, password: &str) -> Credential {
    Credential::Basic {
        username: username.to_owned(),
        password: Secret::new(password),
    }
}

fn helper(dir: &Path, name: &str, script: &str) {
    let path = dir.join(format!("docker-credential-{name}"));
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn stored_credentials_are_found_by_host() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(
        dir.path(),
        r#"{
            "auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOnB3"},
                "ghcr.io": {"auth": "Z2g6YTpiOmM="},
                "https://quay.io/v2/": {"auth": "cXVheTp4"},
                "localhost:5000": {"username": "plain", "password": "pw"},
                "token.io": {"identitytoken": "id"},
                "bearer.io": {"registrytoken": "rt"},
                "empty.io": {},
                "broken.io": {"auth": "%%%"}
            },
            "HttpHeaders": {"x": "y"}
        }"#,
    );
    for host in ["docker.io", "registry-1.docker.io", "index.docker.io"] {
        assert_eq!(
            config.find(host).await.unwrap(),
            Some(basic("hub", "pw")),
            "{host}"
        );
    }
    assert_eq!(
        config.find("ghcr.io").await.unwrap(),
        Some(basic("gh", "a:b:c"))
    );
    assert_eq!(
        config.find("quay.io").await.unwrap(),
        Some(basic("quay", "x"))
    );
    assert_eq!(
        config.find("localhost:5000").await.unwrap(),
        Some(basic("plain", "pw"))
    );
    let token = Credential::IdentityToken(Secret::new("id"));
    assert_eq!(config.find("token.io").await.unwrap(), Some(token));
    let token = Credential::RegistryToken(Secret::new("rt"));
    assert_eq!(config.find("bearer.io").await.unwrap(), Some(token));
    for host in ["empty.io", "broken.io", "other.io", "localhost:5001", "io"] {
        assert_eq!(config.find(host).await.unwrap(), None, "{host}");
    }
}

#[tokio::test]
async fn a_missing_file_is_no_error_and_a_broken_one_shows_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let missing = DockerConfig::new(DockerConfigOptions {
        path: dir.path().join("none.json"),
        ..DockerConfigOptions::default()
    });
    assert_eq!(missing.find("x.io").await.unwrap(), None);
    assert_eq!(config(dir.path(), " \n").find("x.io").await.unwrap(), None);
    let broken = config(dir.path(), r#"{"auths": {"x.io": "s3cret"}}"#);
    let error = broken.find("x.io").await.unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(
        shown.contains("config.json") && shown.contains("line 1"),
        "{shown}"
    );
    assert!(!shown.contains("s3cret"), "{shown}");
    let directory = DockerConfig::new(DockerConfigOptions {
        path: dir.path().to_owned(),
        ..DockerConfigOptions::default()
    });
    let error = directory.find("x.io").await.unwrap_err();
    assert!(matches!(error, CredentialsError::Read { .. }), "{error}");
}

#[tokio::test]
async fn helpers_are_asked_with_the_server_name() {
    let dir = tempfile::tempdir().unwrap();
    helper(
        dir.path(),
        "one",
        r#"read -r server; [ "$1" = get ] || exit 3
           echo "{\"ServerURL\": \"$server\", \"Username\": \"user of $server\", \"Secret\": \"pw\"}""#,
    );
    helper(
        dir.path(),
        "token",
        r#"echo '{"Username":"<token>","Secret":"refresh"}'"#,
    );
    helper(
        dir.path(),
        "none",
        "echo 'credentials not found in native keychain'; exit 1",
    );
    helper(dir.path(), "bad", "echo 'the keychain is on fire'; exit 1");
    helper(dir.path(), "chatty", "echo 'my s3cret'");
    let config = config(
        dir.path(),
        r#"{
            "auths": {"none.io": {"auth": "YTpi"}},
            "credsStore": "one",
            "credHelpers": {
                "token.io": "token", "none.io": "none", "bad.io": "bad", "chatty.io": "chatty",
                "missing.io": "missing", "evil.io": "../../bin/sh"
            }
        }"#,
    );
    assert_eq!(
        config.find("x.io:5000").await.unwrap(),
        Some(basic("user of x.io:5000", "pw"))
    );
    assert_eq!(
        config.find("docker.io").await.unwrap(),
        Some(basic("user of https://index.docker.io/v1/", "pw"))
    );
    let token = Credential::IdentityToken(Secret::new("refresh"));
    assert_eq!(config.find("token.io").await.unwrap(), Some(token));
    assert_eq!(
        config.find("none.io").await.unwrap(),
        Some(basic("a", "b")),
        "falls back to auths"
    );
    for (host, expected) in [
        ("bad.io", "the keychain is on fire"),
        ("chatty.io", "no credential"),
        ("missing.io", "docker-credential-missing"),
        ("evil.io", "not that of a program"),
    ] {
        let error = config.find(host).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(expected), "{shown}");
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}

#[tokio::test]
async fn a_helper_that_hangs_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    helper(
        dir.path(),
        "slow",
        &format!("echo $$ > {}; exec sleep 600", pid.display()),
    );
    let mut config = config(dir.path(), r#"{"credsStore": "slow"}"#);
    config.options.helper_timeout = Duration::from_millis(500);
    let error = config.find("x.io").await.unwrap_err();
    assert!(
        matches!(error, CredentialsError::HelperTimeout { .. }),
        "{error}"
    );
    let Ok(pid) = fs::read_to_string(&pid) else {
        return; // it was killed before it wrote
    };
    let process = format!("/proc/{}/stat", pid.trim());
    // Killed processes vanish once tokio has reaped them.
    for _ in 0..600 {
        let state = fs::read_to_string(&process).unwrap_or_default();
        if state.is_empty() || state.contains(") Z") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the helper still runs");
}

#[test]
fn secrets_do_not_show() {
    let shown = format!("{:?}", basic("user", "s3cret"));
    assert!(
        shown.contains("user") && !shown.contains("s3cret"),
        "{shown}"
    );
}

proptest::proptest! {
    #[test]
    fn any_configuration_is_used_or_refused(at in 0usize..140, with in proptest::char::any()) {
        let text = r#"{"auths":{"x.io":{"auth":"YTpi","identitytoken":"t"},"y.io":{"auth":"YTpi"}},
            "credsStore":"one","credHelpers":{"z.io":"two"}}"#;
        let mutated: String =
            text.chars().enumerate().map(|(i, c)| if i == at { with } else { c }).collect();
        if let Ok(config) = serde_json::from_str::<ConfigFile>(&mutated) {
            for host in ["x.io", "y.io", "z.io"] {
                let names = names_of(host);
                config.stored_for(&names, host);
                config.helper_for(&names);
            }
        }
    }
}
