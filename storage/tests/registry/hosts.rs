use storage::{
    ranges::FetchFailure,
    registry::{Reference, RegistryError, Repository},
};

use crate::server::{Server, blob, client_with_hosts, empty, get, reply, serve};

const MANIFEST: &str = r#"{"schemaVersion":2}"#;

fn repository() -> Repository {
    Repository::new("r.test", "a/b").unwrap()
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_told_for_whom() {
    let (data, digest) = blob(1000);
    let lacking = Server::start(|_| empty(404)).await;
    let served = data.clone();
    let mirror = Server::start(move |request| serve(request, &served)).await;
    let server = Server::start(|_| empty(500)).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n\
         [host.\"http://{}/prefix\"]\n\
         [host.\"http://{mirror}/v2/proxy\"]\noverride_path = true\n\
         [host.\"http://{mirror}/v2/proxy\".header]\nx-for-mirror = \"yes\"\n",
        server.host(),
        lacking.host(),
        mirror = mirror.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    let got = get(&client, &repository(), (digest, 1000), 5..9)
        .await
        .unwrap();
    assert_eq!(got, data.slice(5..9));
    let expected = format!("/prefix/v2/a/b/blobs/{digest}?ns=r.test");
    assert_eq!(lacking.log()[0].uri.to_string(), expected);
    assert!(lacking.log()[0].header("x-for-mirror").is_none());
    let expected = format!("/v2/proxy/a/b/blobs/{digest}?ns=r.test");
    assert_eq!(mirror.log()[0].uri.to_string(), expected);
    assert_eq!(mirror.log()[0].header("x-for-mirror"), Some("yes"));
    assert!(server.log().is_empty());
}

#[tokio::test]
async fn the_error_is_that_of_the_registry_itself() {
    let (_, digest) = blob(1000);
    let mirror = Server::start(|_| reply(418, "teapot")).await;
    let server = Server::start(|_| reply(404, "gone fishing")).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        server.host(),
        mirror.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    let error = get(&client, &repository(), (digest, 1000), 5..9)
        .await
        .unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Missing);
    assert!(
        error.report().contains("gone fishing"),
        "{}",
        error.report()
    );
    assert_eq!((mirror.log().len(), server.log().len()), (1, 1));
}

#[tokio::test]
async fn a_mirror_that_is_down_is_asked_last_for_a_while() {
    let (data, digest) = blob(1000);
    let mirror = Server::start(|_| empty(503)).await;
    let served = data.clone();
    let server = Server::start(move |request| serve(request, &served)).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        server.host(),
        mirror.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    for _ in 0..5 {
        get(&client, &repository(), (digest, 1000), 5..9)
            .await
            .unwrap();
    }
    assert_eq!((mirror.log().len(), server.log().len()), (1, 5));
}

#[tokio::test]
async fn capabilities_decide_who_is_asked_for_what() {
    let (data, digest) = blob(1000);
    let served = data.clone();
    let pulls = Server::start(move |request| serve(request, &served)).await;
    let resolves = Server::start(|_| reply(200, MANIFEST)).await;
    let pushes =
        Server::start(|request| empty(if request.method == "HEAD" { 200 } else { 500 })).await;
    let root = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\ncapabilities = [\"push\"]\n\
         [host.\"http://{}\"]\ncapabilities = [\"pull\"]\n\
         [host.\"http://{}\"]\ncapabilities = [\"resolve\"]\n",
        pushes.host(),
        pulls.host(),
        resolves.host()
    );
    let client = client_with_hosts(root.path(), "r.test", &hosts);
    get(&client, &repository(), (digest, 1000), 5..9)
        .await
        .unwrap();
    let reference: Reference = "r.test/a/b:tag".parse().unwrap();
    assert_eq!(client.resolve(&reference).await.unwrap().bytes, MANIFEST);
    assert!(client.blob_exists(&repository(), digest).await.unwrap());
    for server in [&pulls, &resolves, &pushes] {
        assert_eq!(server.log().len(), 1);
    }

    let hosts = format!(
        "server = \"http://{}\"\ncapabilities = [\"resolve\"]",
        pulls.host()
    );
    let other = tempfile::tempdir().unwrap();
    let client = client_with_hosts(other.path(), "r.test", &hosts);
    let error = client.blob_exists(&repository(), digest).await.unwrap_err();
    assert!(matches!(error, RegistryError::NoEndpoint { .. }), "{error}");
    assert!(error.to_string().contains("capability \"push\""), "{error}");
}

#[tokio::test]
async fn a_broken_hosts_file_is_an_error_and_not_ignored() {
    let (_, digest) = blob(1000);
    let root = tempfile::tempdir().unwrap();
    let client = client_with_hosts(root.path(), "r.test", "server = [");
    let error = get(&client, &repository(), (digest, 1000), 5..9)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(message.contains("r.test/hosts.toml"), "{message}");
    assert!(!error.is_transient());
}
