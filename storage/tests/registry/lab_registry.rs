//! Whole images against the lab registry: pushed, resolved, pulled by ranges, under faults.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use formats::{
    digest::Digest,
    oci::{Descriptor, HostPlatform, Index, Manifest, Platform, media_type},
};
use futures_util::future::join_all;
use lab::{Action, Auth, Credentials, Lab, LabOptions, Match, RequestKind, Rule, Tls};
use storage::{
    ranges::{FetchFailure, MemorySource},
    registry::{
        ClientOptions, DockerConfig, DockerConfigOptions, Pushed, Reference, RegistryClient,
        Repository,
    },
    source::Cause,
};

use crate::server::{client, client_with_hosts, get, noise, options, slice};

const LEN: usize = 2_000_000;

async fn start(adjust: impl FnOnce(&mut LabOptions)) -> (Lab, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = LabOptions::new(dir.path().join("store"));
    adjust(&mut options);
    (Lab::start(options).await.unwrap(), dir)
}

fn repository(lab: &Lab) -> Repository {
    Repository::new(&lab.host(), "team/app").unwrap()
}

/// A client with a user for this registry.
fn client_of(
    lab: &Lab,
    dir: &std::path::Path,
    user: &str,
    adjust: impl FnOnce(&mut ClientOptions),
) -> RegistryClient {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let path = dir.join("config.json");
    let auth = BASE64_STANDARD.encode(user);
    let config = format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, lab.host());
    std::fs::write(&path, config).unwrap();
    let mut options = ClientOptions {
        credentials: Arc::new(DockerConfig::new(DockerConfigOptions {
            path,
            ..DockerConfigOptions::default()
        })),
        ..options()
    };
    adjust(&mut options);
    RegistryClient::new(options)
}

fn credentials() -> Credentials {
    Credentials {
        user: "user".to_owned(),
        password: "pass:word".to_owned(),
    }
}

/// Pushes an image of one layer with an index under `:tag` and gives the layer's digest.
async fn push_image(client: &RegistryClient, repository: &Repository, layer: &Bytes) -> Digest {
    let config = Bytes::from_static(b"{\"architecture\":\"amd64\",\"os\":\"linux\"}");
    for content in [&config, layer] {
        let digest = Digest::of(content);
        let source = Arc::new(MemorySource::new("test", content.clone()));
        let pushed = client.push_blob(repository, digest, source, None).await;
        assert_eq!(
            pushed.unwrap_or_else(|e| panic!("{}", e.report())),
            Pushed::Uploaded
        );
    }
    let manifest = Manifest::new(
        Descriptor::of(media_type::OCI_CONFIG, &config),
        vec![Descriptor::of(media_type::OCI_LAYER_GZIP, layer)],
    )
    .to_json();
    let mut descriptor = Descriptor::of(media_type::OCI_MANIFEST, &manifest);
    descriptor.platform = Some(Platform {
        architecture: "amd64".to_owned(),
        os: "linux".to_owned(),
        variant: None,
        extra: serde_json::Map::default(),
    });
    let index = Index::new(vec![descriptor.clone()]).to_json();
    let reference = |rest: &str| format!("{repository}{rest}").parse::<Reference>().unwrap();
    let by_digest = reference(&format!("@{}", descriptor.digest));
    client
        .push_manifest(&by_digest, media_type::OCI_MANIFEST, manifest.into())
        .await
        .unwrap();
    client
        .push_manifest(&reference(":tag"), media_type::OCI_INDEX, index.into())
        .await
        .unwrap();
    Digest::of(layer)
}

async fn pull_image(client: &RegistryClient, repository: &Repository, layer: &Bytes) {
    let reference: Reference = format!("{repository}:tag").parse().unwrap();
    let platform = HostPlatform::parse("linux/amd64").unwrap();
    let image = client.image(&reference, &platform).await.unwrap();
    let descriptor = &image.parsed.layers[0];
    let (digest, len) = (descriptor.digest, descriptor.size);
    let whole = client
        .small_blob(repository, digest, len, Cause::Hydration)
        .await
        .unwrap();
    assert!(whole == layer);
}

#[tokio::test]
async fn images_go_up_and_come_down_with_every_kind_of_access() {
    let layer = noise(LEN);
    let bearer = |credentials| Auth::Bearer {
        credentials,
        expires_in: Duration::from_secs(300),
    };
    for (auth, redirect) in [
        (Auth::None, None),
        (Auth::Basic(credentials()), None),
        (bearer(None), Some(Duration::from_secs(600))),
        (bearer(Some(credentials())), Some(Duration::from_secs(600))),
    ] {
        let (lab, dir) = start(|options| {
            options.auth = auth;
            options.redirect = redirect;
        })
        .await;
        let client = client_of(&lab, dir.path(), "user:pass:word", |_| {});
        let repository = repository(&lab);
        push_image(&client, &repository, &layer).await;
        pull_image(&client, &repository, &layer).await;
        let entries = lab.log().entries();
        let storage: Vec<_> = entries
            .iter()
            .filter(|one| one.kind == RequestKind::Storage)
            .collect();
        assert_eq!(!storage.is_empty(), redirect.is_some());
        assert!(storage.iter().all(|one| !one.authorization));
    }
}

#[tokio::test]
async fn tls_with_a_private_authority_needs_only_its_certificate() {
    let (lab, dir) = start(|options| {
        options.tls = Tls::PrivateCa;
        options.auth = Auth::Bearer {
            credentials: Some(credentials()),
            expires_in: Duration::from_secs(300),
        };
    })
    .await;
    let hosts = dir.path().join("certs.d").join(lab.host());
    std::fs::create_dir_all(&hosts).unwrap();
    let url = format!("https://{}", lab.host());
    let toml = format!("server = \"{url}\"\nca = {:?}", lab.ca_pem_path().unwrap());
    std::fs::write(hosts.join("hosts.toml"), toml).unwrap();
    let client = client_of(&lab, dir.path(), "user:pass:word", |options| {
        options.hosts_dirs = vec![dir.path().join("certs.d")];
    });
    let layer = noise(LEN);
    push_image(&client, &repository(&lab), &layer).await;
    pull_image(&client, &repository(&lab), &layer).await;

    std::fs::write(hosts.join("hosts.toml"), format!("server = \"{url}\"")).unwrap();
    let untrusting = client_with_hosts(&dir.path().join("certs.d"), "unrelated", "");
    let reference: Reference = format!("{}:tag", repository(&lab)).parse().unwrap();
    let error = untrusting.resolve(&reference).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("not signed by a trusted authority"),
        "{error}"
    );
}

#[tokio::test]
async fn wrong_passwords_are_refused_with_advice() {
    for auth in [
        Auth::Basic(credentials()),
        Auth::Bearer {
            credentials: Some(credentials()),
            expires_in: Duration::from_secs(300),
        },
    ] {
        let (lab, dir) = start(|options| options.auth = auth).await;
        let client = client_of(&lab, dir.path(), "user:wrong", |_| {});
        let reference: Reference = format!("{}:tag", repository(&lab)).parse().unwrap();
        let error = client.resolve(&reference).await.unwrap_err();
        assert_eq!(error.failure(), FetchFailure::Denied);
        assert!(
            error.to_string().contains("refused the credentials"),
            "{error}"
        );
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
}

#[tokio::test]
async fn ranges_survive_every_scripted_fault() {
    let layer = noise(LEN);
    let (lab, _dir) = start(|_| {}).await;
    let digest = lab.push_blob("team/app", &layer).unwrap();
    for (action, times) in [
        (Action::Truncate { after: 100_000 }, 3),
        (Action::Reset { after: 100_000 }, 3),
        (Action::Close, 3),
        (Action::IgnoreRange, 1),
        (
            Action::Status {
                status: 503,
                retry_after: Some("0".to_owned()),
            },
            3,
        ),
        (
            Action::Status {
                status: 429,
                retry_after: None,
            },
            3,
        ),
    ] {
        let name = format!("{action:?}");
        let rule = lab
            .rules()
            .add(Rule::new(Match::blob(digest), action).times(times));
        let range = 1000..1_500_000;
        let got = get(&client(), &repository(&lab), (digest, LEN), range.clone()).await;
        let got = got.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
        assert!(got == slice(&layer, range), "{name}");
        assert_eq!(lab.rules().state(rule).unwrap().acted, times, "{name}");
        lab.rules().clear();
    }
    lab.rules().add(Rule::new(
        Match::blob(digest),
        Action::ShiftContentRange { by: 1 },
    ));
    let error = get(&client(), &repository(&lab), (digest, LEN), 5..10)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Invalid, "{}", error.report());
}

#[tokio::test]
async fn a_stall_is_waited_out_or_asked_around() {
    let layer = noise(LEN);
    let (lab, _dir) = start(|_| {}).await;
    let digest = lab.push_blob("team/app", &layer).unwrap();
    let stall = Action::Stall {
        after: Some(50_000),
    };
    let rule = lab
        .rules()
        .add(Rule::new(Match::blob(digest), stall).times(1));
    let client = RegistryClient::new(ClientOptions {
        stall_timeout: Duration::from_millis(700),
        ..options()
    });
    let got = get(&client, &repository(&lab), (digest, LEN), 0..1_000_000)
        .await
        .unwrap();
    assert!(got == layer.slice(..1_000_000));
    assert_eq!(lab.rules().state(rule).unwrap().acted, 1);
    let entries = lab.log().entries();
    assert_eq!(
        entries[1].range.as_deref(),
        Some("bytes=50000-999999"),
        "resumed, not repeated"
    );
}

#[tokio::test]
async fn a_registry_that_comes_back_is_used_again() {
    let layer = noise(LEN);
    let (lab, _dir) = start(|_| {}).await;
    let digest = lab.push_blob("team/app", &layer).unwrap();
    let mut options = options();
    options.retry.retries = 10_000;
    let client = RegistryClient::new(options);
    get(&client, &repository(&lab), (digest, LEN), 0..10)
        .await
        .unwrap();
    lab.gone().await;
    let repository = repository(&lab);
    let fetch = get(&client, &repository, (digest, LEN), 5..500_000);
    tokio::pin!(fetch);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut fetch).await;
    assert!(early.is_err(), "nobody can have answered");
    lab.back().await;
    assert!(fetch.await.unwrap() == layer.slice(5..500_000));
}

#[tokio::test]
async fn revoked_tokens_and_expired_redirects_disturb_nobody() {
    let layer = noise(LEN);
    let (lab, _dir) = start(|options| {
        options.auth = Auth::Bearer {
            credentials: None,
            expires_in: Duration::from_secs(300),
        };
        options.redirect = Some(Duration::from_millis(200));
    })
    .await;
    let digest = lab.push_blob("team/app", &layer).unwrap();
    let (client, repository) = (client(), repository(&lab));
    for round in 1..=3 {
        let fetches = (0..32u64).map(|index| {
            let range = index * 50_000..index * 50_000 + 50_000;
            let (client, repository, layer) = (&client, &repository, &layer);
            async move {
                let got = get(client, repository, (digest, LEN), range.clone()).await;
                let got = got.unwrap_or_else(|error| panic!("{}", error.report()));
                assert!(got == slice(layer, range));
            }
        });
        join_all(fetches).await;
        assert!(
            lab.token_requests() <= round,
            "one token each round at most"
        );
        lab.revoke_tokens();
        // Longer than the redirects last.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
