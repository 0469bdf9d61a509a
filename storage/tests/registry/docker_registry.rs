//! A real registry: distribution as Debian packages it.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use formats::{
    digest::Digest,
    oci::{Descriptor, Manifest, media_type},
};
use skip::skip;
use storage::{
    ranges::{FetchFailure, MemorySource},
    registry::{Pushed, Reference, RegistryError, Repository},
    source::Cause,
};

use crate::server::{client, get, noise, slice};

/// The registry, killed when dropped.
struct Registry {
    child: Child,
    host: String,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program() -> Option<PathBuf> {
    let in_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|dir| dir.join("docker-registry"))
            .find(|program| program.is_file())
    });
    let unpacked = || {
        let cache = std::env::var_os("SNAPSHOTTERD_CACHE")
            .map(PathBuf::from)
            .or_else(|| {
                Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/snapshotterd"))
            })?;
        let program = cache.join("debs/docker-registry/usr/bin/docker-registry");
        program.is_file().then_some(program)
    };
    in_path.or_else(unpacked)
}

async fn start() -> Option<Registry> {
    let Some(program) = program() else {
        skip("no docker-registry (tests/peers/debs unpacks it)");
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let config = dir.path().join("config.yml");
    let store = dir.path().join("store").display().to_string();
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {host:?}}}\n\
         storage: {{filesystem: {{rootdirectory: {store:?}}}}}\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut child = Command::new(program)
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while tokio::net::TcpStream::connect(&host).await.is_err() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "docker-registry ended: {ended:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Some(Registry {
        child,
        host,
        _dir: dir,
    })
}

#[tokio::test]
async fn a_real_registry_takes_and_gives_an_image() {
    let Some(registry) = start().await else {
        return;
    };
    let client = client();
    let repository = Repository::new(&registry.host, "team/app").unwrap();
    let layer = noise(5_000_000);
    let config = bytes::Bytes::from_static(b"{\"architecture\":\"amd64\",\"os\":\"linux\"}");
    for content in [&config, &layer] {
        let source = || Arc::new(MemorySource::new("test", content.clone()));
        let digest = Digest::of(content);
        let pushed = client.push_blob(&repository, digest, source(), None).await;
        assert_eq!(pushed.unwrap(), Pushed::Uploaded);
        let pushed = client.push_blob(&repository, digest, source(), None).await;
        assert_eq!(pushed.unwrap(), Pushed::Existed);
    }
    let other = Repository::new(&registry.host, "team/other").unwrap();
    let source = Arc::new(MemorySource::new("test", layer.clone()));
    let digest = Digest::of(&layer);
    let pushed = client
        .push_blob(&other, digest, source, Some(&repository))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Mounted);

    let manifest = Manifest::new(
        Descriptor::of(media_type::OCI_CONFIG, &config),
        vec![Descriptor::of(media_type::OCI_LAYER_GZIP, &layer)],
    )
    .to_json();
    let reference: Reference = format!("{repository}:tag").parse().unwrap();
    let sent = client
        .push_manifest(
            &reference,
            media_type::OCI_MANIFEST,
            manifest.clone().into(),
        )
        .await
        .unwrap();
    let got = client.resolve(&reference).await.unwrap();
    assert_eq!(
        (got.digest, got.media_type.as_str()),
        (sent, media_type::OCI_MANIFEST)
    );
    assert_eq!(got.bytes, manifest);

    for range in [0..1, 1..4_999_999, 4_999_999..5_000_000, 0..5_000_000] {
        let got = get(&client, &repository, (digest, layer.len()), range.clone())
            .await
            .unwrap();
        assert!(got == slice(&layer, range.clone()), "{range:?}");
    }
    let whole = client
        .small_blob(&repository, digest, 5_000_000, Cause::Hydration)
        .await;
    assert!(whole.unwrap() == layer);
}

#[tokio::test]
async fn its_errors_are_understood() {
    let Some(registry) = start().await else {
        return;
    };
    let client = client();
    let repository = Repository::new(&registry.host, "team/app").unwrap();
    let reference: Reference = format!("{repository}:none").parse().unwrap();
    let error = client.resolve(&reference).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Status { status: 404, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("MANIFEST_UNKNOWN"), "{error}");

    let layer = noise(1000);
    let digest = Digest::of(&layer);
    let missing = get(&client, &repository, (digest, 1000), 0..10)
        .await
        .unwrap_err();
    assert_eq!(
        missing.failure(),
        FetchFailure::Missing,
        "{}",
        missing.report()
    );

    // A digest that is not that of the content.
    let source = Arc::new(MemorySource::new("test", layer.clone()));
    let wrong = client
        .push_blob(&repository, Digest::of(b"other"), source, None)
        .await;
    let wrong = wrong.unwrap_err().to_string();
    assert!(
        wrong.contains("400") && wrong.contains("DIGEST_INVALID"),
        "{wrong}"
    );

    // A descriptor that promises more than there is: 416, with a body that never comes.
    let source = Arc::new(MemorySource::new("test", layer));
    client
        .push_blob(&repository, digest, source, None)
        .await
        .unwrap();
    let beyond = get(&client, &repository, (digest, 2000), 1500..1600)
        .await
        .unwrap_err();
    assert!(beyond.report().contains("416"), "{}", beyond.report());
    assert_eq!(beyond.failure(), FetchFailure::Invalid);
    let longer = get(&client, &repository, (digest, 2000), 500..600)
        .await
        .unwrap_err();
    assert!(
        longer
            .report()
            .contains("has 1000 bytes, its descriptor 2000"),
        "{}",
        longer.report()
    );
}
