//! Registries and layers that lie or fail: an ordinary unpack with a reason, or a read that fails
//! with an event. Never a wrong byte, never a dead daemon. Layers are here, [`registries`] below.

mod registries;

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use formats::{digest::Digest, stargz::WriterOptions};
use serde_json::Value;
use suite::{
    host::Came,
    images::noise,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    world::ready,
};

const SIZE: usize = 1 << 20;

fn layer(seed: u64) -> PushedLayer {
    let options = WriterOptions {
        chunk_size: 64 << 10,
        ..WriterOptions::default()
    };
    let mut tar = Tarball::new();
    tar.file("data", &noise(seed, SIZE)).file("small", b"small");
    PushedLayer::estargz_with(&tar.finish(), &options)
}

/// Pulls an image whose only layer cannot be lazy, and returns the recorded reason: it names the
/// layer or the image, and is listed under the image.
async fn refused(fixture: &Fixture, image: &PushedImage, what: &str) -> String {
    let namespace = what.replace(' ', "-");
    let host = fixture.host(&namespace).await;
    let (parent, came) = host.pull(image, cri_labels).await;
    assert_eq!(came, [Came::Unpacked], "{what}: {}", image.reference);
    let (_, container) = fixture.container(&host, &parent, "c").await;
    fixture.same_tree(image, container.path(), &[]);
    let why = fixture.why_not(image, 0);
    eprintln!("{what}: {why}");
    assert!(why.contains(&image.reference), "{what}: {why}");
    // Where the manifest cannot be read, layers are not the matter.
    let digest = image.layers[0].digest().to_string();
    let named = usize::from(!why.starts_with("manifest of "));
    assert_eq!(why.matches(&digest).count(), named, "{what}: {why}");
    let (status, listed) = fixture.admin("GET", &format!("/v1/images?ref={}", image.reference));
    assert_eq!(status, 200, "{what}: {listed}");
    assert_eq!(listed["not_lazy"][0]["why_not"], why, "{what}: {listed}");
    why
}

fn alive(fixture: &Fixture, pid: u32) {
    assert_eq!(fixture.daemon.pid(), pid);
    let (status, _) = fixture.admin("GET", "/v1/status");
    assert_eq!(status, 200);
    let program = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("it runs");
    assert_eq!(program.trim(), "snapshotterd");
}

/// The layer with other bytes for its footer's TOC offset (16 hex digits).
fn with_toc_offset(mut layer: PushedLayer, digits: &str) -> PushedLayer {
    assert_eq!(digits.len(), 16);
    let at = layer
        .blob
        .windows(6)
        .rposition(|window| window == b"STARGZ")
        .expect("a footer");
    layer.blob[at - 16..at].copy_from_slice(digits.as_bytes());
    layer.descriptor.digest = Digest::of(&layer.blob);
    layer
}

#[test]
fn a_footer_that_lies_is_refused() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let pid = fixture.daemon.pid();
    runtime().block_on(async {
        for (index, digits) in [
            "ffffffffffffffff",
            "7fffffffffffffff",
            "0000000000ffffff",
            "0000000000000000",
            "0000000000000400",
            "00000000000000zz",
        ]
        .into_iter()
        .enumerate()
        {
            let layer = with_toc_offset(layer(200 + index as u64), digits);
            let repository = format!("wrong/footer{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer]);
            let why = refused(&fixture, &image, &format!("footer {digits}")).await;
            assert!(why.contains("index of layer"), "{digits}: {why}");
        }
        alive(&fixture, pid);
    });
}

/// The layer with another TOC, whose digest the manifest states.
fn with_toc(layer: PushedLayer, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> PushedLayer {
    let limits = formats::limits::Limits::default();
    let size = layer.blob.len() as u64;
    let footer = formats::stargz::parse_footer(&layer.blob, size).expect("a footer");
    let range = footer.toc_range(size);
    let at = |offset: u64| usize::try_from(offset).expect("in memory");
    let (start, end) = (at(range.start), at(range.end));
    let json = formats::stargz::inflate_toc(&layer.blob[start..end], &limits).expect("a TOC");
    let json = change(json);
    let toc = Tarball::new().file("stargz.index.json", &json).finish();
    let blob = [
        &layer.blob[..start],
        &suite::pushed::gzip(&toc),
        &layer.blob[end..],
    ]
    .concat();
    let mut descriptor = layer.descriptor;
    descriptor.digest = Digest::of(&blob);
    descriptor.size = blob.len() as u64;
    let name = formats::oci::ANNOTATION_TOC_DIGEST.to_owned();
    let digest = Digest::of(&json).to_string();
    descriptor.annotations.insert(name, digest);
    PushedLayer {
        blob,
        descriptor,
        ..layer
    }
}

/// Changes the TOC's entries.
fn entries(json: &[u8], change: impl FnOnce(&mut Vec<Value>)) -> Vec<u8> {
    let mut toc: Value = serde_json::from_slice(json).expect("JSON");
    change(toc["entries"].as_array_mut().expect("entries"));
    serde_json::to_vec(&toc).expect("JSON")
}

/// The entry of the file `data` (its first chunk).
fn data(entries: &mut [Value]) -> &mut Value {
    let mut all = entries.iter_mut();
    all.find(|entry| entry["name"] == "data").expect("data")
}

/// What is done to a TOC's entries.
type Change = fn(&mut Vec<Value>);

/// Says what it wants with the right digest: the content is judged.
#[test]
fn a_toc_that_lies_is_refused() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let pid = fixture.daemon.pid();
    let cases: [(&str, Change); 10] = [
        ("offset far away", |all| {
            data(all)["offset"] = (1_u64 << 50).into();
        }),
        ("offset negative", |all| data(all)["offset"] = (-5).into()),
        ("size without chunks", |all| {
            data(all)["size"] = (1_u64 << 62).into();
        }),
        ("chunk beyond the file", |all| {
            data(all)["chunkSize"] = (1_u64 << 40).into();
        }),
        ("chunk without digest", |all| {
            data(all)["chunkDigest"] = "".into();
        }),
        ("digest of another kind", |all| {
            data(all)["chunkDigest"] = "md5:d41d8cd98f00b204e9800998ecf8427e".into();
        }),
        ("type unknown", |all| data(all)["type"] = "socket".into()),
        ("name with a NUL", |all| data(all)["name"] = "da\0ta".into()),
        ("mode of text", |all| data(all)["mode"] = "0644".into()),
        ("link to nothing", |all| {
            all.push(serde_json::json!({
                "name": "link", "type": "hardlink", "linkName": "nothing",
            }));
        }),
    ];
    runtime().block_on(async {
        for (index, (what, change)) in cases.into_iter().enumerate() {
            let layer = with_toc(layer(700 + index as u64), |json| entries(&json, change));
            let repository = format!("wrong/toc{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer]);
            refused(&fixture, &image, &format!("TOC {what}")).await;
            alive(&fixture, pid);
        }
        for (index, json) in [
            &b""[..],
            b"{",
            b"[]",
            b"{\"version\":1,\"entries\":7}",
            b"\xff",
        ]
        .into_iter()
        .enumerate()
        {
            let layer = with_toc(layer(720 + index as u64), |_| json.to_vec());
            let repository = format!("wrong/json{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer]);
            refused(&fixture, &image, &format!("TOC bytes {index}")).await;
            alive(&fixture, pid);
        }
    });
}

/// Digests of chunks that are not those of the bytes: nothing is shown, and the pass finds out.
#[test]
fn chunk_digests_that_lie_give_errors_and_are_refuted() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let pid = fixture.daemon.pid();
    let seed = 740;
    let layer = with_toc(layer(seed), |json| {
        entries(&json, |all| {
            data(all)["chunkDigest"] = Digest::of(b"something else").to_string().into();
        })
    });
    let image = PushedImage::push(&fixture.lab, "wrong/chunk", "1", &[layer]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        let path = container.path().join("data");
        // Its first chunk of 64 KiB, and whatever the kernel asked for together with its end.
        let failed = failed_pages(&path, &noise(seed, SIZE));
        assert!((16..=64).contains(&failed), "{failed} pages failed");
        let digest = image.layers[0].digest().to_string();
        let shown = fixture.layer(&digest);
        let events = shown["cache"]["events"].as_array().expect("events");
        let told = events.iter().filter_map(|event| event["message"].as_str());
        let told: Vec<&str> = told.collect();
        let names = |event: &&str| {
            event.contains(&digest) && event.contains(&image.reference) && event.contains("offset")
        };
        assert!(told.iter().any(names), "{told:?}");
        let verdict = &crate::world::verdicts(&fixture)[0];
        assert_eq!(verdict["verdict"], "refuted", "{verdict}");
        alive(&fixture, pid);
    });
}

#[test]
fn media_types_nobody_knows_are_refused() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let pid = fixture.daemon.pid();
    runtime().block_on(async {
        for (index, media_type) in [
            "application/vnd.example.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "text/plain",
            "",
        ]
        .into_iter()
        .enumerate()
        {
            let mut layer = layer(760 + index as u64);
            layer.descriptor.media_type = media_type.to_owned();
            let repository = format!("wrong/type{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer]);
            let host = fixture.host(&format!("type{index}")).await;
            let (_, came) = host.pull(&image, cri_labels).await;
            assert_eq!(came, [Came::Unpacked], "{media_type:?}");
            let why = fixture.why_not(&image, 0);
            let digest = image.layers[0].digest().to_string();
            assert!(why.contains(&digest), "{why}");
            assert!(why.contains(&repository), "{why}");
            assert!(why.contains("media type"), "{why}");
            alive(&fixture, pid);
        }
    });
}

/// Reads the file page by page; returns how many pages failed. The others are right.
fn failed_pages(path: &Path, expected: &[u8]) -> usize {
    let file = File::open(path).expect("opening needs no data");
    let mut failed = 0;
    for (page, expected) in expected.chunks(4096).enumerate() {
        let mut buf = vec![0; expected.len()];
        match file.read_exact_at(&mut buf, page as u64 * 4096) {
            Ok(()) => assert!(buf == expected, "wrong bytes in page {page}"),
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(libc::EIO),
                    "page {page}: {error}"
                );
                failed += 1;
            }
        }
    }
    failed
}
