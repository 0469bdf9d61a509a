//! Registries and layers that lie or fail: an ordinary unpack with a reason, or a read that fails
//! with an event. Never a wrong byte, never a dead daemon.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Duration};

use formats::{digest::Digest, stargz::WriterOptions};
use lab::{Action, Auth, Credentials, Lab, LabOptions, Match, Rule, Tls};
use serde_json::Value;
use suite::{
    host::Came,
    images::noise,
    process::wait_for,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
    workdir::Workdir,
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

#[test]
fn a_registry_that_fails_or_lies_costs_laziness_only() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.resolve_timeout = \"3s\"\n"));
    let pid = fixture.daemon.pid();
    let status = |status| Action::Status {
        status,
        retry_after: None,
    };
    let cases: [(&str, Action, &[&str]); 6] = [
        ("status 401", status(401), &["answered 401"]),
        ("status 403", status(403), &["answered 403"]),
        ("status 404", status(404), &["does not have it (404"]),
        // Tried again until the time is up.
        ("status 503", status(503), &["last failure: "]),
        (
            "shifted ranges",
            Action::ShiftContentRange { by: 1 },
            &["ange"],
        ),
        // Every answer ends early: within the deadline, or by it.
        (
            "cut answers",
            Action::Truncate { after: 10 },
            &["layer", "resolved"],
        ),
    ];
    runtime().block_on(async {
        for (index, (what, action, expected)) in cases.into_iter().enumerate() {
            let image = PushedImage::push(
                &fixture.lab,
                &format!("wrong/registry{index}"),
                "1",
                &[layer(300 + index as u64)],
            );
            let rule = Rule::new(Match::blob(image.layers[0].digest()), action);
            let rule = fixture.lab.rules().add(rule);
            let why = refused(&fixture, &image, what).await;
            assert!(
                expected.iter().any(|part| why.contains(part)),
                "{what}: {why}"
            );
            let state = fixture.lab.rules().state(rule).expect("the rule");
            assert!(state.acted > 0, "{what}: the rule never acted");
            fixture.lab.rules().remove(rule);
            alive(&fixture, pid);
        }
        // A blob that is shorter than its descriptor says.
        let image = PushedImage::push(&fixture.lab, "wrong/short", "1", &[layer(400)]);
        let path = fixture.lab.store().blob_path(&image.layers[0].digest());
        let file = File::options().write(true).open(path).expect("the blob");
        file.set_len(image.layers[0].descriptor.size / 2)
            .expect("cut");
        refused(&fixture, &image, "short blob").await;
        // One byte of the TOC is another.
        let image = PushedImage::push(&fixture.lab, "wrong/toc", "1", &[layer(401)]);
        let size = image.layers[0].descriptor.size;
        let flip = Action::Flip {
            at: size - 200,
            len: 1,
        };
        fixture
            .lab
            .rules()
            .add(Rule::new(Match::blob(image.layers[0].digest()), flip));
        let why = refused(&fixture, &image, "flipped TOC").await;
        assert!(why.contains("layer"), "{why}");
        alive(&fixture, pid);
    });
}

#[test]
fn a_registry_that_lets_nobody_in_is_named() {
    if !ready() {
        return;
    }
    let hosts = Workdir::new();
    let fixture = Fixture::new(&format!(
        "{CONFIG}registry.config_path = {:?}\nlazy.resolve_timeout = \"3s\"\n",
        hosts.path().display().to_string()
    ));
    let pid = fixture.daemon.pid();
    let start = |name: &str, tls: Tls, auth: Auth, seed: u64| {
        let options = LabOptions {
            tls,
            auth,
            ..LabOptions::new(fixture.work.sub(name))
        };
        let lab = Lab::start_blocking(options).expect("a registry");
        let dir = hosts.sub(&format!("{name}.example"));
        std::fs::write(
            dir.join("hosts.toml"),
            format!("server = {:?}\n", lab.url()),
        )
        .expect("hosts.toml");
        let mut image = PushedImage::push(&lab, "a/image", "1", &[layer(seed)]);
        image.reference = format!("{name}.example/a/image:1");
        (lab, image)
    };
    let credentials = Credentials {
        user: "somebody".into(),
        password: "else".into(),
    };
    runtime().block_on(async {
        let (_lab, image) = start("untrusted", Tls::SelfSigned, Auth::None, 500);
        let why = refused(&fixture, &image, "untrusted certificate").await;
        assert!(why.to_lowercase().contains("certificate"), "{why}");
        let (_lab, image) = start("closed", Tls::Off, Auth::Basic(credentials), 501);
        let why = refused(&fixture, &image, "no credentials").await;
        assert!(why.contains("401"), "{why}");
        let (lab, image) = start("gone", Tls::Off, Auth::None, 502);
        drop(lab);
        refused(&fixture, &image, "nobody listens").await;
        alive(&fixture, pid);
    });
}

#[test]
fn a_registry_that_ignores_ranges_still_gives_right_bytes() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let pid = fixture.daemon.pid();
    let image = PushedImage::push(&fixture.lab, "wrong/whole", "1", &[layer(402)]);
    let ignore = Rule::new(Match::blob(image.layers[0].digest()), Action::IgnoreRange);
    let rule = fixture.lab.rules().add(ignore);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let (parent, came) = host.pull(&image, cri_labels).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &[]);
        if came != [Came::Lazily] {
            let why = fixture.why_not(&image, 0);
            assert!(why.contains("range"), "{why}");
        }
        let state = fixture.lab.rules().state(rule).expect("the rule");
        assert!(state.acted > 0, "the rule never acted");
        alive(&fixture, pid);
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

#[test]
fn reads_fail_with_an_event_and_never_give_wrong_bytes() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let pid = fixture.daemon.pid();
    let status = |status| Action::Status {
        status,
        retry_after: None,
    };
    let cases = [
        (
            "flipped",
            Action::Flip {
                at: SIZE as u64 / 2,
                len: 1,
            },
        ),
        ("missing", status(404)),
        ("forbidden", status(403)),
        ("unauthorized", status(401)),
        ("shifted", Action::ShiftContentRange { by: 4096 }),
    ];
    runtime().block_on(async {
        for (index, (what, action)) in cases.into_iter().enumerate() {
            let seed = 600 + index as u64;
            let repository = format!("wrong/reads{index}");
            let image = PushedImage::push(&fixture.lab, &repository, "1", &[layer(seed)]);
            let digest = image.layers[0].digest();
            let host = fixture.host(what).await;
            let parent = fixture.pull_lazily(&host, &image).await;
            let (_, container) = fixture.container(&host, &parent, "c").await;
            let before = fixture.daemon.log().len();
            let rule = Rule::new(Match::blob(digest), action);
            let rule = fixture.lab.rules().add(rule);
            let path = container.path().join("data");
            let expected = noise(seed, SIZE);
            let failed = failed_pages(&path, &expected);
            let pages = SIZE / 4096;
            eprintln!("{what}: {failed} of {pages} pages failed");
            assert!(failed > 0, "{what}: every page was read");
            if what == "flipped" {
                assert!(failed < pages, "{what}: all pages failed");
            }
            let log = fixture.daemon.log();
            let event = log[before..]
                .lines()
                .find(|line| line.contains("WARN") && line.contains(&digest.to_string()));
            let event = event.unwrap_or_else(|| panic!("{what}: no event:\n{}", &log[before..]));
            eprintln!("{what}: {event}");
            let shown = fixture.layer(&digest.to_string());
            let events = shown["cache"]["events"].as_array().expect("events");
            let told = events.iter().filter_map(|event| event["message"].as_str());
            let told: Vec<&str> = told.collect();
            assert!(
                told.iter().any(|event| event.contains(&digest.to_string())
                    && (event.contains("offset") || event.contains("bytes"))),
                "{what}: {told:?}"
            );
            alive(&fixture, pid);
            // When the registry is well again, so are the reads.
            fixture.lab.rules().remove(rule);
            wait_for("all pages", Duration::from_secs(60), || {
                failed_pages(&path, &expected) == 0
            });
            fixture.same_tree(&image, container.path(), &[]);
        }
        alive(&fixture, pid);
    });
}
