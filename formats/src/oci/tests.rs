use super::*;
use crate::digest::Digest;

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[test]
fn layer_types_are_classified_and_named_again() {
    for (name, family, compression, nondistributable) in [
        (media_type::OCI_LAYER, Family::Oci, Compression::None, false),
        (
            media_type::OCI_LAYER_GZIP,
            Family::Oci,
            Compression::Gzip,
            false,
        ),
        (
            media_type::OCI_LAYER_ZSTD,
            Family::Oci,
            Compression::Zstd,
            false,
        ),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            Family::Oci,
            Compression::Gzip,
            true,
        ),
        (
            media_type::DOCKER_LAYER,
            Family::Docker,
            Compression::None,
            false,
        ),
        (
            media_type::DOCKER_LAYER_GZIP,
            Family::Docker,
            Compression::Gzip,
            false,
        ),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Family::Docker,
            Compression::Gzip,
            true,
        ),
    ] {
        let parsed = LayerMediaType::parse(name).unwrap();
        assert_eq!(
            parsed,
            LayerMediaType {
                family,
                compression,
                nondistributable
            }
        );
        assert_eq!(parsed.to_string(), name);
    }
    for name in [
        "",
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.oci.image.layer.v1.tarball",
        "application/vnd.oci.empty.v1+json",
    ] {
        let error = LayerMediaType::parse(name).unwrap_err();
        assert_eq!(error.0, name);
    }
}

#[test]
fn manifest_keeps_what_it_does_not_know() {
    let config = digest("config");
    let layer = digest("layer");
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","artifactType":"x/y",
        "config":{{"mediaType":"{}","digest":"{config}","size":7,"data":"e30="}},
        "layers":[{{"mediaType":"{}","digest":"{layer}","size":9,"urls":["http://a/b"],
          "annotations":{{"{ANNOTATION_TOC_DIGEST}":"{config}","k":"v"}},"new":[1]}}],
        "annotations":{{"a":"b"}},"subject":{{"x":null}}}}"#,
        media_type::OCI_MANIFEST,
        media_type::OCI_CONFIG,
        media_type::OCI_LAYER_GZIP,
    );
    let manifest = Manifest::parse(text.as_bytes(), None).unwrap();
    assert!(manifest.is_image());
    assert_eq!(manifest.layers[0].toc_digest(), Some(Ok(config)));
    let before: serde_json::Value = serde_json::from_str(&text).unwrap();
    let after: serde_json::Value = serde_json::from_slice(&manifest.to_json()).unwrap();
    assert_eq!(before, after);
}

#[test]
fn documents_are_what_they_say() {
    let config = Descriptor::of(media_type::DOCKER_CONFIG, b"c");
    let mut manifest = Manifest::new(config.clone(), Vec::new());
    let index = Index::new(vec![config]);
    let parse = |bytes: &[u8], served| Document::parse(bytes, served);

    assert!(matches!(
        parse(
            &manifest.to_json(),
            Some("application/vnd.oci.image.manifest.v1+json; charset=utf-8")
        ),
        Ok(Document::Manifest(_))
    ));
    assert!(matches!(
        parse(&manifest.to_json(), Some(media_type::DOCKER_MANIFEST)),
        Err(OciError::TypeMismatch { .. })
    ));
    manifest.media_type = None;
    assert!(matches!(
        parse(&manifest.to_json(), Some("application/json")),
        Ok(Document::Manifest(_))
    ));
    // A document without a type of its own is what the registry says, or nothing.
    assert!(matches!(
        parse(&manifest.to_json(), Some(media_type::OCI_INDEX)),
        Err(OciError::Ambiguous(_))
    ));
    assert!(matches!(
        parse(&index.to_json(), None),
        Ok(Document::Index(_))
    ));
    let mut both = index;
    both.extra.insert("layers".into(), serde_json::json!([]));
    assert!(matches!(
        parse(&both.to_json(), None),
        Err(OciError::Ambiguous(_))
    ));
    let schema1 = br#"{"schemaVersion":1,"mediaType":"application/vnd.docker.distribution.manifest.v1+prettyjws"}"#;
    assert!(
        matches!(parse(schema1, None), Err(OciError::UnknownManifestType(name)) if name.ends_with("v1+prettyjws"))
    );
    assert!(matches!(
        parse(br#"{"schemaVersion":1,"layers":[]}"#, None),
        Err(OciError::SchemaVersion { actual: 1, .. })
    ));
    assert!(matches!(parse(b"{}", None), Err(OciError::Unrecognised)));
    assert!(matches!(parse(b"[1", None), Err(OciError::Json { .. })));
    let huge = vec![b' '; MAX_MANIFEST_BYTES + 1];
    assert!(matches!(parse(&huge, None), Err(OciError::TooLarge { .. })));
}

#[test]
fn wrong_descriptors_are_refused() {
    for (digest, size) in [
        ("sha512:00", "1"),
        ("sha256:00", "1"),
        (
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "-1",
        ),
        (
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "1.5",
        ),
    ] {
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":{size}}},"layers":[]}}"#
        );
        assert!(
            matches!(
                Document::parse(text.as_bytes(), None),
                Err(OciError::Json { .. })
            ),
            "{text}"
        );
    }
}

#[test]
fn docker_config_with_nulls() {
    let id = digest("layer");
    let text = format!(
        r#"{{"architecture":"amd64","os":"linux","docker_version":"19",
        "config":{{"Env":["A=b"],"Cmd":["sh","-c"],"Entrypoint":null,"Volumes":null,"Labels":null,
          "User":"","ExposedPorts":{{"80/tcp":{{}}}},"StopSignal":"SIGQUIT","OnBuild":null,
          "WorkingDir":"/w"}},
        "rootfs":{{"type":"layers","diff_ids":["{id}"]}},
        "history":[{{"created_by":"x","empty_layer":true,"comment":"c"}}]}}"#
    );
    let config = ImageConfig::parse(text.as_bytes()).unwrap();
    assert_eq!(config.config.cmd.as_deref().unwrap(), ["sh", "-c"]);
    assert_eq!(config.config.entrypoint, None);
    assert_eq!(config.config.stop_signal.as_deref(), Some("SIGQUIT"));
    assert_eq!(config.rootfs.diff_ids, [id]);
    assert!(config.history[0].empty_layer);
    assert_eq!(config.extra["docker_version"], "19");
    assert_eq!(ImageConfig::parse(&config.to_json()).unwrap(), config);

    let manifest = Manifest::new(Descriptor::of(media_type::OCI_CONFIG, b""), Vec::new());
    assert!(matches!(
        config.check_against(&manifest),
        Err(OciError::LayerCount {
            layers: 0,
            diff_ids: 1
        })
    ));
    assert!(matches!(
        ImageConfig::parse(br#"{"rootfs":{"type":"disk"}}"#),
        Err(OciError::RootFsType(_))
    ));
}

#[test]
fn chain_ids_follow_the_specification() {
    let ids = [digest("a"), digest("b"), digest("c")];
    let chain = chain_ids(&ids);
    assert_eq!(chain[0], ids[0]);
    assert_eq!(chain[1], digest(&format!("{} {}", ids[0], ids[1])));
    assert_eq!(chain[2], digest(&format!("{} {}", chain[1], ids[2])));
}

#[test]
fn the_best_platform_wins() {
    let descriptor = |platform: &str| {
        let mut parts = platform.split('/');
        let mut descriptor = Descriptor::of(media_type::OCI_MANIFEST, platform.as_bytes());
        descriptor.platform = (!platform.is_empty()).then(|| Platform {
            os: parts.next().unwrap_or_default().into(),
            architecture: parts.next().unwrap_or_default().into(),
            variant: parts.next().map(Into::into),
            ..Platform::default()
        });
        descriptor
    };
    let choose = |host: &str, offered: &[&str]| {
        let index = Index::new(offered.iter().map(|name| descriptor(name)).collect());
        let host = HostPlatform::parse(host).unwrap();
        let chosen = index.choose(&host)?.digest;
        offered
            .iter()
            .find(|name| digest(name) == chosen)
            .map(|name| (*name).to_owned())
    };
    let all = [
        "unknown/unknown",
        "",
        "linux/386",
        "linux/arm/v5",
        "linux/arm/v7",
        "linux/arm64/v8",
        "linux/amd64/v3",
        "linux/amd64",
        "windows/amd64",
    ];
    assert_eq!(choose("linux/amd64", &all).unwrap(), "linux/amd64");
    assert_eq!(choose("linux/amd64/v4", &all).unwrap(), "linux/amd64/v3");
    assert_eq!(choose("linux/aarch64", &all).unwrap(), "linux/arm64/v8");
    assert_eq!(choose("linux/arm/v6", &all).unwrap(), "linux/arm/v5");
    assert_eq!(choose("linux/arm64", &all[..5]).unwrap(), "linux/arm/v7");
    assert_eq!(choose("linux/s390x", &all).unwrap(), "");
    assert_eq!(choose("linux/s390x", &all[2..]), None);
    assert_eq!(
        HostPlatform::parse("linux/x86_64").unwrap().to_string(),
        "linux/amd64"
    );
    assert_eq!(HostPlatform::parse("linux"), None);
}

#[test]
fn layout_files() {
    let layout = OciLayout::parse(br#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    assert_eq!(layout, OciLayout::default());
    assert!(matches!(
        OciLayout::parse(br#"{"imageLayoutVersion":"2.0"}"#),
        Err(OciError::LayoutVersion(_))
    ));
    let mut tagged = Descriptor::of(media_type::OCI_MANIFEST, b"m");
    tagged
        .annotations
        .insert(ANNOTATION_REF_NAME.into(), "v1".into());
    let index = Index::new(vec![tagged.clone()]);
    let read = Index::parse(&index.to_json(), None).unwrap();
    assert_eq!(read.tagged("v1"), Some(&tagged));
    assert_eq!(read.tagged("v2"), None);
    assert!(blob_path(&digest("")).starts_with("blobs/sha256/e3b0c442"));
}
