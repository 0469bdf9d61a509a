use std::{
    collections::HashMap,
    io::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use formats::digest::Digest;
use storage::{
    ranges::{FileSource, MemorySource, RangeSource},
    registry::{Pushed, Reference, Repository},
};

use crate::server::{Logged, Reply, Server, blob, client, empty, options, reply, with};

type Store = Arc<Mutex<HashMap<String, Bytes>>>;

/// Where uploads are sent to.
#[derive(Clone, Copy)]
enum Place {
    Relative,
    Absolute,
}

/// A registry that takes pushes; `spoil` may answer first.
async fn registry(
    place: Place,
    spoil: impl Fn(&Logged) -> Option<Reply> + Send + Sync + 'static,
) -> (Server, Store) {
    let store = Store::default();
    let kept = Arc::clone(&store);
    let server = Server::start(move |request| {
        spoil(request).unwrap_or_else(|| answer(place, &kept, request))
    })
    .await;
    (server, store)
}

fn answer(place: Place, store: &Store, request: &Logged) -> Reply {
    let mut store = store.lock().unwrap();
    let query = request.uri.query().unwrap_or("");
    let parameter = |name: &str| {
        query
            .split('&')
            .find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    };
    let name = request.path().rsplit('/').next().unwrap().to_owned();
    match request.method.as_str() {
        "HEAD" => empty(if store.contains_key(&name) { 200 } else { 404 }),
        "POST" => {
            if let Some(digest) = parameter("mount") {
                assert_eq!(parameter("from").unwrap(), "from/here");
                if store.contains_key(&format!("mountable {digest}")) {
                    return with(empty(201), "location", "/somewhere");
                }
            }
            let host = request.header("host").unwrap();
            let path = "/v2/uploads/1?_state=AB%2F=:/==";
            let location = match place {
                Place::Relative => path.to_owned(),
                Place::Absolute => format!("http://{host}{path}"),
            };
            with(empty(202), "location", &location)
        }
        "PUT" => {
            let key = match parameter("digest") {
                Some(digest) => {
                    assert!(query.starts_with("_state=AB%2F=:/==&digest="), "{query}");
                    assert_eq!(Digest::of(&request.body).to_string(), digest);
                    assert_eq!(
                        request.header("content-type"),
                        Some("application/octet-stream")
                    );
                    digest
                }
                None => name,
            };
            let length = request.header("content-length").unwrap();
            assert_eq!(length, request.body.len().to_string());
            store.insert(key, request.body.clone());
            empty(201)
        }
        _ => empty(405),
    }
}

fn memory(data: &Bytes) -> Arc<dyn RangeSource> {
    Arc::new(MemorySource::new("test", data.clone()))
}

#[tokio::test]
async fn blobs_go_up_from_memory_and_files() {
    for place in [Place::Relative, Place::Absolute] {
        let (server, store) = registry(place, |_| None).await;
        let client = client();
        let repository = server.repository();
        let (data, digest) = blob(3_000_000);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&data).unwrap();
        let content = Arc::new(FileSource::open(file.path()).unwrap());
        let pushed = client
            .push_blob(&repository, digest, content, None)
            .await
            .unwrap();
        assert_eq!(pushed, Pushed::Uploaded);
        assert!(store.lock().unwrap()[&digest.to_string()] == data);
        assert_eq!(client.stats().pushed_bytes, 3_000_000);

        let pushed = client
            .push_blob(&repository, digest, memory(&data), None)
            .await
            .unwrap();
        assert_eq!(pushed, Pushed::Existed);

        let empty = Bytes::new();
        let pushed = client
            .push_blob(&repository, Digest::of(b""), memory(&empty), None)
            .await;
        assert_eq!(pushed.unwrap(), Pushed::Uploaded);
        assert!(store.lock().unwrap()[&Digest::of(b"").to_string()].is_empty());
    }
}

#[tokio::test]
async fn blobs_are_mounted_where_possible() {
    let (server, store) = registry(Place::Relative, |_| None).await;
    let client = client();
    let from = Repository::new(&server.host(), "from/here").unwrap();
    let (data, digest) = blob(1000);
    store
        .lock()
        .unwrap()
        .insert(format!("mountable {digest}"), data.clone());
    let pushed = client
        .push_blob(&server.repository(), digest, memory(&data), Some(&from))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Mounted);
    let (data, digest) = blob(1001);
    let pushed = client
        .push_blob(&server.repository(), digest, memory(&data), Some(&from))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Uploaded);
    assert!(store.lock().unwrap()[&digest.to_string()] == data);
    let elsewhere = Repository::new("other.test", "from/here").unwrap();
    let (data, digest) = blob(1002);
    let pushed = client
        .push_blob(
            &server.repository(),
            digest,
            memory(&data),
            Some(&elsewhere),
        )
        .await;
    assert_eq!(
        pushed.unwrap(),
        Pushed::Uploaded,
        "another registry has nothing to mount from"
    );
}

#[tokio::test]
async fn uploads_are_begun_again_after_transient_failures() {
    let count = AtomicUsize::new(0);
    let (server, store) = registry(Place::Relative, move |request| {
        let failing = request.method == "PUT" || request.method == "POST";
        (failing && count.fetch_add(1, Ordering::Relaxed) < 4).then(|| empty(503))
    })
    .await;
    let client = client();
    let (data, digest) = blob(1_000_000);
    client
        .push_blob(&server.repository(), digest, memory(&data), None)
        .await
        .unwrap();
    assert!(store.lock().unwrap()[&digest.to_string()] == data);
    assert_eq!(client.stats().retries, 4);
}

#[tokio::test]
async fn manifests_are_put_under_their_tag_or_digest() {
    let (server, store) = registry(Place::Relative, |_| None).await;
    let client = client();
    let manifest = Bytes::from_static(b"{\"schemaVersion\":2}");
    let digest = Digest::of(&manifest);
    let kind = formats::oci::media_type::OCI_MANIFEST;
    let reference: Reference = format!("{}/a/b:tag", server.host()).parse().unwrap();
    let got = client
        .push_manifest(&reference, kind, manifest.clone())
        .await
        .unwrap();
    assert_eq!(got, digest);
    assert_eq!(store.lock().unwrap()["tag"], manifest);
    assert_eq!(server.log()[0].header("content-type"), Some(kind));
    let pinned = reference.with_digest(digest);
    client
        .push_manifest(&pinned, kind, manifest.clone())
        .await
        .unwrap();
    assert_eq!(store.lock().unwrap()[&digest.to_string()], manifest);
    let wrong = pinned.with_digest(Digest::of(b"x"));
    let error = client
        .push_manifest(&wrong, kind, manifest)
        .await
        .unwrap_err();
    assert!(
        error.report().contains("the manifest has digest"),
        "{}",
        error.report()
    );
}

#[tokio::test]
async fn a_push_asks_for_a_token_that_may_push() {
    let realm = Arc::new(Mutex::new(String::new()));
    let at = Arc::clone(&realm);
    let (server, _store) = registry(Place::Absolute, move |request| {
        let allowed = request.header("authorization") == Some("Bearer pushy");
        let challenge = format!("Bearer realm=\"{}\",service=\"s\"", at.lock().unwrap());
        (!allowed).then(|| with(empty(401), "www-authenticate", &challenge))
    })
    .await;
    let tokens = Server::start(|_| reply(200, r#"{"token":"pushy"}"#)).await;
    *realm.lock().unwrap() = format!("http://{}/token", tokens.host());
    let client = client();
    let (data, digest) = blob(1000);
    let from = Repository::new(&server.host(), "from/here").unwrap();
    let pushed = client
        .push_blob(&server.repository(), digest, memory(&data), Some(&from))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Uploaded);
    let asked: Vec<_> = tokens
        .log()
        .iter()
        .map(|one| one.uri.query().unwrap().to_owned())
        .collect();
    assert_eq!(asked[0], "service=s&scope=repository:some/image:pull,push");
    assert_eq!(
        asked[1],
        "service=s&scope=repository:from/here:pull&scope=repository:some/image:pull,push"
    );
    assert_eq!(asked.len(), 2);
    let log = server.log();
    let put = log.iter().find(|one| one.method == "PUT").unwrap();
    assert_eq!(put.header("authorization"), Some("Bearer pushy"));
}

#[tokio::test]
async fn uploads_elsewhere_get_no_credentials() {
    let store = Store::default();
    let kept = Arc::clone(&store);
    let depot = Server::start(move |request| answer(Place::Relative, &kept, request)).await;
    let location = format!("http://{}/v2/uploads/1?_state=AB%2F=:/==", depot.host());
    let server = Server::start(move |request| {
        if request.header("authorization").is_none() {
            return with(empty(401), "www-authenticate", "Basic realm=x");
        }
        match request.method.as_str() {
            "POST" => with(empty(202), "location", &location),
            _ => empty(404),
        }
    })
    .await;
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("config.json");
    let auths = format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, server.host());
    std::fs::write(&path, auths).unwrap();
    let client = storage::registry::RegistryClient::new(storage::registry::ClientOptions {
        credentials: Arc::new(storage::registry::DockerConfig::new(
            storage::registry::DockerConfigOptions {
                path,
                ..Default::default()
            },
        )),
        ..options()
    });
    let (data, digest) = blob(1000);
    client
        .push_blob(&server.repository(), digest, memory(&data), None)
        .await
        .unwrap();
    assert_eq!(depot.log().len(), 1);
    assert!(depot.log()[0].header("authorization").is_none());
    assert!(store.lock().unwrap()[&digest.to_string()] == data);
}

#[tokio::test]
async fn content_that_cannot_be_read_is_no_fault_of_the_registry() {
    let (server, _store) = registry(Place::Relative, |_| None).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1000).unwrap();
    let content = Arc::new(FileSource::open(file.path()).unwrap());
    file.as_file().set_len(10).unwrap();
    let digest = Digest::of(b"whatever");
    let error = client()
        .push_blob(&server.repository(), digest, content, None)
        .await
        .unwrap_err();
    let message = error.report();
    assert!(
        message.contains("content to push could not be read"),
        "{message}"
    );
    assert!(!error.is_transient(), "{message}");
}
