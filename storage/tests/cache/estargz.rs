//! Real eStargz layers: upstream's, where the fixtures are at hand, and ours through the lab.

use std::{fs, io::Cursor, path::Path, path::PathBuf, sync::Arc};

use formats::{
    digest::Digest,
    limits::Limits,
    stargz::{StargzLayer, StartList, WriterOptions, build, decode_chunk, parse_toc},
};
use lab::{Lab, LabOptions, LinkModel};
use skip::skip;
use storage::{
    cache::{CacheOptions, LayerBlob, Wire, WireOptions},
    hydrate::{HydrateOptions, Mode, StargzProof, Verdict},
    prefetch::Prefetch,
    ranges::RangeSource,
    registry::{ClientOptions, RegistryClient, Repository},
    source::BlobSource as _,
};

use crate::{
    fixture::{ramp, read, scheduler},
    source::{Handle, Scripted},
};

/// A ustar archive of regular files.
pub(crate) fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, payload) in files {
        let mut header = [0_u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", payload.len()).as_bytes());
        header[136..147].copy_from_slice(b"14000000000");
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(payload);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// Half compressible, half not.
fn payload(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = ramp(seed, len);
    for (at, byte) in bytes.iter_mut().enumerate() {
        if at % 64 < 32 {
            *byte = u8::try_from(at % 7).unwrap();
        }
    }
    bytes
}

struct Opened {
    layer: Arc<StargzLayer>,
    blob: Arc<LayerBlob>,
}

async fn open(dir: &Path, source: Arc<dyn RangeSource>, identity: Digest) -> Opened {
    let wire = Wire::open(
        WireOptions {
            dir: dir.to_owned(),
            identity,
            name: "estargz layer".to_owned(),
        },
        source,
        scheduler(),
    )
    .unwrap();
    let toc = wire.fetch_index(&Limits::default()).await.unwrap();
    let layer = Arc::new(parse_toc(&toc.json, toc.toc_offset, &Limits::default()).unwrap());
    assert_eq!(layer.toc_digest, Digest::of(&toc.json));
    let map = Arc::new(layer.map.clone());
    let blob = LayerBlob::open(wire, map, CacheOptions::default()).unwrap();
    Opened { layer, blob }
}

fn hydrate(opened: &Opened, layer_digest: Digest, diff_id: Digest) {
    opened.blob.hydrate(HydrateOptions {
        layer_digest,
        mode: Mode::Full,
        prover: Arc::new(StargzProof {
            layer: Arc::clone(&opened.layer),
            diff_id,
            limits: Limits::default(),
        }),
    });
}

fn decode_all(layer: &StargzLayer, blob: &[u8]) -> Vec<u8> {
    let at = |n: u64| usize::try_from(n).unwrap();
    let mut decoded = vec![0; at(layer.map.decoded_len())];
    let mut out = Vec::new();
    for chunk in layer.map.chunks() {
        let remote = chunk.remote_range();
        decode_chunk(&blob[at(remote.start)..at(remote.end)], chunk, &mut out).unwrap();
        decoded[at(chunk.decoded.0)..at(chunk.decoded.0) + out.len()].copy_from_slice(&out);
    }
    decoded
}

fn fixtures() -> Option<PathBuf> {
    let root = std::env::var_os("SNAPSHOTTERD_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"),
        PathBuf::from,
    );
    if root.join("stargz/index.json").is_file() {
        return Some(root);
    }
    skip(&format!(
        "no fixtures at {} (set SNAPSHOTTERD_FIXTURES)",
        root.display()
    ));
    None
}

/// Blob, layer digest and DiffID of each layer of an image in an OCI layout.
fn layers(layout: &Path, tag: &str) -> Vec<(Vec<u8>, Digest, Digest)> {
    let blob = |digest: &serde_json::Value| {
        let digest: Digest = digest.as_str().unwrap().parse().unwrap();
        let bytes = fs::read(layout.join("blobs/sha256").join(digest.hex())).unwrap();
        (bytes, digest)
    };
    let json = |digest: &serde_json::Value| -> serde_json::Value {
        serde_json::from_slice(&blob(digest).0).unwrap()
    };
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let named = |m: &&serde_json::Value| {
        m["annotations"]["org.opencontainers.image.ref.name"].as_str() == Some(tag)
    };
    let manifests = index["manifests"].as_array().unwrap();
    let manifest = json(&manifests.iter().find(named).unwrap()["digest"]);
    let config = json(&manifest["config"]["digest"]);
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap().clone();
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let (bytes, digest) = blob(&layer["digest"]);
            (bytes, digest, diff_id.as_str().unwrap().parse().unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn upstreams_layers_are_read_and_proven_at_the_cost_of_their_size() {
    let Some(root) = fixtures() else { return };
    for tag in [
        "esgz-noopt",
        "esgz-landmark",
        "esgz-min50k",
        "esgz-chunk4096",
    ] {
        // The first layer has names that are not UTF-8: it is not lazy.
        for (bytes, digest, diff_id) in layers(&root.join("stargz"), tag).into_iter().skip(1) {
            let source = Scripted::new(bytes.clone().into());
            let dir = tempfile::tempdir().unwrap();
            let opened = open(dir.path(), Arc::new(Handle(Arc::clone(&source))), digest).await;
            assert!(source.requests() <= 2, "{tag}: {:?}", source.log());
            let expected = decode_all(&opened.layer, &bytes);
            opened.blob.prefetch_list(&opened.layer.start_list);
            let len = usize::try_from(opened.blob.len()).unwrap();
            for part in [len / 3..len, 0..len / 3 + 1] {
                let part = part.start..part.end.min(len);
                let got = read(&opened.blob, part.start as u64, part.len())
                    .await
                    .unwrap();
                assert!(got == expected[part], "{tag}");
            }
            hydrate(&opened, digest, diff_id);
            let record = opened.blob.hydrated().await.unwrap();
            assert_eq!(record.verdict, Verdict::Proven, "{tag}");
            assert!(record.complete);
            let size = bytes.len() as u64;
            assert!(source.served() <= size + size / 100, "{tag}");
            assert!(
                fs::read(opened.blob.data_path()).unwrap_or_default() == expected,
                "{tag}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_ours_through_the_registry_client_and_a_shaped_link() {
    let files: Vec<_> = (0..300)
        .map(|i| {
            let len = [100, 9_000, 70_000, 250_001][i % 4];
            (format!("dir/file{i:04}"), payload(i as u64, len))
        })
        .collect();
    let hot: Vec<Vec<u8>> = (0..40)
        .map(|i| files[i * 7].0.clone().into_bytes())
        .collect();
    let mut bytes = Vec::new();
    let built = build(
        Cursor::new(tar(&files)),
        &mut bytes,
        &WriterOptions {
            chunk_size: 100_000,
            level: 6,
            prioritized: hot,
        },
        &Limits::default(),
    )
    .unwrap();

    let (store, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lab = Lab::start(LabOptions {
        link: Some(LinkModel::new(
            400_000_000,
            std::time::Duration::from_millis(5),
        )),
        ..LabOptions::new(store.path())
    })
    .await
    .unwrap();
    let digest = lab.push_blob("app", &bytes).unwrap();
    let client = RegistryClient::new(ClientOptions::default());
    let repository = Repository::new(&lab.host(), "app").unwrap();
    let remote = client.blob(&repository, digest, built.blob_len);

    let opened = open(dir.path(), Arc::new(remote), built.toc_digest).await;
    assert!(lab.log().totals().blob_requests <= 2);
    assert_eq!(opened.layer.toc_digest, built.toc_digest);
    assert!(matches!(opened.layer.start_list, StartList::Until(_)));
    let expected = decode_all(&opened.layer, &bytes);
    opened.blob.prefetch_list(&opened.layer.start_list);
    hydrate(&opened, digest, built.diff_id);
    for step in 0..30 {
        let at = step * 7_919_000 % expected.len();
        let end = expected.len().min(at + 50_000);
        let got = read(&opened.blob, at as u64, end - at).await.unwrap();
        assert!(got == expected[at..end]);
    }
    assert!(matches!(opened.blob.prefetch_done().await, Prefetch::Done));
    let record = opened.blob.hydrated().await.unwrap();
    assert_eq!(record.verdict, Verdict::Proven);
    let served = lab.log().totals().blob_bytes;
    assert!(served <= built.blob_len + built.blob_len / 100, "{served}");
    let traffic = opened.blob.status().traffic.total();
    assert_eq!(
        traffic.bytes, served,
        "what we count is what the registry counted"
    );
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_toc_that_lies_about_its_tar_is_refuted() {
    let files = |mode: u8| {
        let mut tar = tar(&[
            ("a".to_owned(), payload(1, 20_000)),
            ("b".to_owned(), payload(2, 30_000)),
        ]);
        tar[106] = mode;
        let sum = |h: &[u8]| h.iter().map(|b| u32::from(*b)).sum::<u32>();
        tar[148..156].fill(b' ');
        let total = sum(&tar[..512]);
        tar[148..155].copy_from_slice(format!("{total:06o}\0").as_bytes());
        tar
    };
    let pack = |tar: Vec<u8>| {
        let mut bytes = Vec::new();
        let options = WriterOptions::default();
        let built = build(Cursor::new(tar), &mut bytes, &options, &Limits::default()).unwrap();
        (bytes, built)
    };
    let (honest, built) = pack(files(b'4'));
    let (_, other) = pack(files(b'5'));
    let source = Scripted::new(honest.into());
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path(), Arc::new(Handle(source)), built.toc_digest).await;
    // The image claims a DiffID that these bytes do not have.
    hydrate(&opened, built.blob_digest, other.diff_id);
    let record = opened.blob.hydrated().await.unwrap();
    assert_eq!(record.diff_id, Some(built.diff_id));
    let Verdict::Refuted { reasons } = record.verdict else {
        panic!("{record:?}");
    };
    assert!(
        reasons[0].contains(&other.diff_id.to_string()),
        "{reasons:?}"
    );
}
