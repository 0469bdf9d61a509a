use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};

use super::*;
use crate::tree::{InodeId, Kind, Mtime, NotLazyReason as R, Rdev};

const TOC_OFFSET: RemoteOffset = RemoteOffset(10_000);

fn digest(content: &[u8]) -> String {
    Digest::of(content).to_string()
}

fn toc(entries: &[Value]) -> Vec<u8> {
    json!({"version": 1, "entries": entries})
        .to_string()
        .into_bytes()
}

fn parse(entries: &[Value]) -> Result<StargzLayer, TocError> {
    parse_toc(&toc(entries), TOC_OFFSET, &Limits::default())
}

fn parsed(entries: &[Value]) -> StargzLayer {
    parse(entries).unwrap_or_else(|error| panic!("{error}"))
}

/// A regular file of one chunk.
fn file(name: &str, offset: u64, size: u64) -> Value {
    json!({
        "name": name, "type": "reg", "size": size, "offset": offset,
        "digest": digest(name.as_bytes()), "chunkDigest": digest(name.as_bytes()),
    })
}

fn with(mut entry: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else {
        panic!("an object");
    };
    for (key, value) in changes {
        if value == json!("absent") {
            entry.as_object_mut().expect("an object").remove(&key);
        } else {
            entry[key] = value;
        }
    }
    entry
}

fn chunk(offset: u64, chunk_offset: u64, chunk_size: u64) -> Value {
    json!({
        "name": "ignored", "type": "chunk", "offset": offset, "chunkOffset": chunk_offset,
        "chunkSize": chunk_size, "chunkDigest": digest(b"chunk"),
    })
}

#[test]
fn attributes_and_types() {
    let layer = parsed(&[
        json!({"name": "./", "type": "dir", "mode": 0, "uid": 5}),
        json!({"name": "./bin/", "type": "dir", "mode": 16877, "modtime": "2023-11-14T22:13:20Z"}),
        json!({"name": "bin/su", "type": "reg", "mode": 0o104_755, "uid": 1, "gid": 2,
               "userName": "u", "NumLink": 1, "later": {"fields": [1]},
               "xattrs": {"user.a": "AQI=", "user.empty": ""}}),
        json!({"name": "/bin/../bin/sh", "type": "symlink", "linkName": "/su"}),
        json!({"name": "hard", "type": "hardlink", "linkName": "./bin/su", "uid": 9, "mode": 0o644}),
        json!({"name": "null", "type": "char", "devMajor": 1, "devMinor": 3, "xattrs": null}),
        json!({"name": "disk", "type": "block", "devMajor": 259, "devMinor": 70000}),
        json!({"name": "pipe", "type": "fifo", "modtime": "1969-12-31T23:00:00Z"}),
        json!({"name": "no/entry/file", "type": "reg", "modtime": "2023-11-14T22:13:20.5Z"}),
        json!({"name": "no/.wh.gone", "type": "reg"}),
    ]);
    let at = |path: &str| {
        layer
            .tree
            .inode(layer.tree.lookup(path.as_bytes()).expect(path))
    };
    assert_eq!(at("").attrs.mode, 0o755);
    assert_eq!(at("bin").attrs.mode, 0o755);
    assert_eq!(at("bin").attrs.mtime.seconds, 1_700_000_000);
    let su = at("bin/su");
    // The link's header came last.
    assert_eq!((su.attrs.mode, su.attrs.uid, su.nlink), (0o644, 9, 2));
    assert_eq!(su.attrs.xattrs[&b"user.a"[..]], [1, 2]);
    assert!(su.attrs.xattrs[&b"user.empty"[..]].is_empty());
    assert_eq!(su.attrs.mtime, Mtime::default());
    assert_eq!(at("bin/sh").kind, Kind::Symlink(b"/su".to_vec()));
    assert_eq!(
        at("disk").kind,
        Kind::BlockDevice(Rdev {
            major: 259,
            minor: 70000
        })
    );
    assert_eq!(at("pipe").attrs.mtime, Mtime::default());
    assert_eq!(at("no/entry/file").attrs.mtime.seconds, 1_700_000_001);
    assert_eq!(at("no/gone").kind, Kind::Whiteout);
    assert_eq!(layer.tree.implied_directories(), [&b"no"[..], b"no/entry"]);
    assert_eq!(
        (layer.map.decoded_len(), layer.start_list),
        (0, StartList::None)
    );
}

#[test]
fn empty_layers() {
    for text in [
        &br#"{"version":1,"entries":null}"#[..],
        br#"{"version":1,"entries":[]}"#,
        br#"{"version":1}"#,
        b" {\"entries\":[], \"version\":1}\n\t ",
    ] {
        let layer = parse_toc(text, TOC_OFFSET, &Limits::default()).expect("parses");
        assert_eq!(layer.tree, LayerTree::empty());
        assert_eq!(layer.map.decoded_len(), 0);
        assert_eq!(layer.toc_digest, Digest::of(text));
    }
}

#[test]
fn chunks_tile_files_in_remote_order() {
    let layer = parsed(&[
        with(file("late", 3000, 10), json!({"chunkSize": 4})),
        chunk(3100, 4, 4),
        chunk(3200, 8, 0),
        // Exactly twice the chunk size: the last one says so too. No offset is offset 0.
        with(
            file("early", 0, 8),
            json!({"chunkSize": 4, "offset": "absent", "innerOffset": 512}),
        ),
        chunk(100, 4, 4),
        json!({"name": "empty", "type": "reg", "digest": digest(b"")}),
        with(file("inner", 100, 5), json!({"innerOffset": 1028})),
    ]);
    let shape: Vec<_> = layer
        .map
        .chunks()
        .iter()
        .map(|chunk| {
            (
                chunk.decoded.0,
                chunk.len,
                chunk.remote_range(),
                chunk.inner,
            )
        })
        .collect();
    assert_eq!(
        shape,
        [
            (0, 4, 0..100, 512),
            (4, 4, 100..3000, 0),
            (4096, 5, 100..3000, 1028),
            (8192, 4, 3000..3100, 0),
            (8196, 4, 3100..3200, 0),
            (8200, 2, 3200..10_000, 0),
        ]
    );
    assert_eq!(layer.map.decoded_len(), 3 * 4096);
    let Kind::Regular(late) = &layer
        .tree
        .inode(layer.tree.lookup(b"late").expect("late"))
        .kind
    else {
        panic!("a file");
    };
    assert_eq!(late.extents.len(), 1);
    assert_eq!((late.extents[0].decoded.0, late.extents[0].len), (8192, 10));
}

#[test]
fn landmarks_are_hidden_and_say_what_to_prefetch() {
    let landmark = |name: &str, offset: u64| {
        json!({"name": name, "type": "reg", "size": 1, "offset": offset,
               "digest": digest(&[0x0f]), "chunkDigest": digest(&[0x0f])})
    };
    let layer = parsed(&[
        file("a", 0, 4),
        landmark("./.prefetch.landmark", 500),
        file("b", 600, 4),
    ]);
    assert_eq!(layer.start_list, StartList::Until(RemoteOffset(500)));
    assert_eq!(
        layer
            .tree
            .directory(InodeId::ROOT)
            .expect("root")
            .entries
            .len(),
        2
    );
    assert_eq!(layer.map.chunks().len(), 2);
    assert_eq!(layer.map.chunks()[0].remote_range(), 0..500);

    for order in [[0, 1], [1, 0]] {
        let both = [
            landmark(".prefetch.landmark", 500),
            landmark(".no.prefetch.landmark", 600),
        ];
        let layer = parsed(&order.map(|index| both[index].clone()));
        assert_eq!(layer.start_list, StartList::Nothing);
    }
    // The name alone does not make a landmark, nor does it below the root.
    for entry in [
        file(".prefetch.landmark", 500, 1),
        file(".no.prefetch.landmark", 500, 2),
        landmark("d/.prefetch.landmark", 500),
    ] {
        let layer = parsed(&[entry]);
        assert_eq!(layer.start_list, StartList::None);
        assert_eq!(layer.map.chunks().len(), 1);
    }
}

#[test]
fn whole_file_digests_may_stand_in() {
    let whole = |name, offset| with(file(name, offset, 5), json!({"chunkDigest": "absent"}));
    assert_eq!(
        parsed(&[whole("a", 0), file("b", 9, 5)]).map.chunks().len(),
        2
    );
    let chunked = [
        whole("a", 0),
        with(file("b", 100, 5), json!({"chunkSize": 3})),
        chunk(200, 3, 2),
    ];
    assert!(matches!(
        parse(&chunked),
        Err(TocError::NotLazy(R::NoChunkDigest { .. }))
    ));
}

#[test]
fn what_is_not_lazy() {
    type Case = (Vec<Value>, fn(&R) -> bool);

    let limits = Limits {
        max_chunk_bytes: 1000,
        max_member_bytes: 2000,
        ..Limits::default()
    };
    let cases: Vec<Case> = vec![
        (vec![json!({"name": "a\u{fffd}", "type": "reg"})], |r| {
            matches!(r, R::NotText { .. })
        }),
        (
            vec![json!({"name": "a", "type": "reg", "xattrs": {"user.\u{fffd}": ""}})],
            |r| matches!(r, R::NotText { .. }),
        ),
        (vec![file("a", 0, 1), file("a", 9, 1)], |r| {
            matches!(r, R::Duplicate { .. })
        }),
        (
            vec![
                json!({"name": "a", "type": "hardlink", "linkName": "b"}),
                file("b", 0, 1),
            ],
            |r| matches!(r, R::HardLinkTarget { .. }),
        ),
        (
            vec![
                json!({"name": "a", "type": "hardlink", "linkName": "b"}),
                json!({"name": "b", "type": "hardlink", "linkName": "a"}),
            ],
            |r| matches!(r, R::HardLinkTarget { .. }),
        ),
        (vec![file("a", 0, 1), file("a/b", 9, 1)], |r| {
            matches!(r, R::ParentNotDirectory { .. })
        }),
        (vec![json!({"name": "a\u{0}b", "type": "reg"})], |r| {
            matches!(r, R::Name { .. })
        }),
        (
            vec![json!({"name": "a", "type": "dir", "xattrs": {"trusted.overlay.opaque": "eQ=="}})],
            |r| matches!(r, R::OverlayXattr { .. }),
        ),
        (vec![json!({"name": "a", "type": "socket"})], |r| {
            matches!(r, R::UnknownType { .. })
        }),
        (vec![json!({"name": "a"})], |r| {
            matches!(r, R::UnknownType { .. })
        }),
        (
            vec![with(
                file("a", 0, 1),
                json!({"chunkDigest": "absent", "digest": "absent"}),
            )],
            |r| matches!(r, R::NoChunkDigest { .. }),
        ),
        (
            vec![
                with(file("a", 0, 9), json!({"chunkSize": 4})),
                with(chunk(100, 4, 5), json!({"chunkDigest": ""})),
            ],
            |r| matches!(r, R::NoChunkDigest { file_offset: 4, .. }),
        ),
        (
            vec![with(file("a", 0, 1), json!({"chunkDigest": "sha512:00"}))],
            |r| matches!(r, R::UnsupportedDigest { .. }),
        ),
        (vec![file("a", 0, 1001)], |r| {
            matches!(r, R::ChunkTooLarge { .. })
        }),
        (vec![file("a", 0, 3 << 30)], |r| {
            matches!(r, R::ChunkTooLarge { .. })
        }),
        (
            vec![with(file("a", 0, 10), json!({"innerOffset": 1991}))],
            |r| matches!(r, R::ChunkTooLarge { len: 2001, .. }),
        ),
        (
            vec![with(file("a", 0, 10), json!({"innerOffset": i64::MAX}))],
            |r| matches!(r, R::ChunkTooLarge { .. }),
        ),
    ];
    for (entries, expected) in cases {
        match parse_toc(&toc(&entries), TOC_OFFSET, &limits) {
            Err(TocError::NotLazy(reason)) if expected(&reason) => {}
            other => panic!("{entries:?}: {other:?}"),
        }
    }
}

#[test]
fn entries_that_contradict_themselves() {
    let first = || with(file("f", 100, 10), json!({"chunkSize": 4}));
    for (entries, expected) in [
        (
            vec![with(file("f", 0, 1), json!({"size": -1}))],
            "size is negative",
        ),
        (
            vec![with(file("f", 0, 1), json!({"offset": -1}))],
            "offset is negative",
        ),
        (
            vec![with(file("f", 0, 1), json!({"innerOffset": -1}))],
            "innerOffset is negative",
        ),
        (
            vec![with(file("f", 0, 1), json!({"chunkSize": -1}))],
            "chunkSize is negative",
        ),
        (
            vec![with(file("f", 0, 1), json!({"chunkSize": 2}))],
            "behind its file",
        ),
        (
            vec![with(file("f", 0, 1), json!({"chunkOffset": 1}))],
            "has a chunkOffset",
        ),
        (
            vec![with(file("f", 0, 1), json!({"uid": -1}))],
            "uid or gid",
        ),
        (
            vec![with(file("f", 0, 1), json!({"gid": 1_u64 << 32}))],
            "uid or gid",
        ),
        (
            vec![with(file("f", 0, 1), json!({"modtime": "yesterday"}))],
            "modtime",
        ),
        (
            vec![json!({"name": "c", "type": "char", "devMajor": -1})],
            "device number",
        ),
        (vec![file("f", 10_000, 1)], "in front of the TOC"),
        (vec![file("f", 1 << 62, 1)], "in front of the TOC"),
        (vec![chunk(0, 0, 1)], "does not follow"),
        (
            vec![json!({"name": "d", "type": "dir"}), chunk(0, 0, 1)],
            "does not follow",
        ),
        (vec![first()], "add up"),
        (vec![first(), file("g", 200, 1)], "add up"),
        (vec![first(), chunk(200, 4, 5)], "add up"),
        (vec![first(), chunk(200, 4, 7)], "behind its file"),
        (vec![first(), chunk(200, 5, 5)], "where the last one ends"),
        (vec![first(), chunk(200, 3, 7)], "where the last one ends"),
        (
            vec![first(), chunk(200, 8, 2), chunk(300, 4, 4)],
            "where the last one ends",
        ),
        (
            vec![first(), chunk(200, 4, 0), chunk(300, 10, 1)],
            "behind its file",
        ),
        (
            vec![first(), chunk(200, 4, 0), chunk(300, 10, 0)],
            "at the end of its file",
        ),
        // Bytes out of order, twice, or shared.
        (vec![first(), chunk(50, 4, 6)], "overlap"),
        (vec![first(), chunk(100, 4, 6)], "overlap"),
        (vec![file("f", 100, 4), file("g", 100, 4)], "overlap"),
        (
            vec![
                file("f", 100, 4),
                with(file("g", 100, 4), json!({"innerOffset": 3})),
            ],
            "overlap",
        ),
        (
            vec![first(), chunk(300, 4, 6), file("g", 200, 1)],
            "overlap",
        ),
    ] {
        match parse(&entries) {
            Err(error @ TocError::Entry { .. }) => {
                assert!(error.to_string().contains(expected), "{entries:?}: {error}");
            }
            other => panic!("{entries:?}: {other:?}"),
        }
    }
    let error = parse(&[file("a", 100, 4), file("b/c", 100, 4)]).expect_err("overlaps");
    assert!(error.to_string().contains("/b/c"), "{error}");
}

#[test]
fn what_is_not_the_json_of_a_toc() {
    let limits = Limits::default();
    for text in [
        &b""[..],
        b"null",
        b"[]",
        b"{\"version\":1,\"entries\":[]} x",
        b"{\"version\":1,\"entries\":[]}{}",
        b"{\"version\":1,\"entries\":[]",
        b"{\"version\":1,\"entries\":[],\"entries\":[]}",
        b"{\"version\":1,\"version\":1,\"entries\":[]}",
        b"{\"version\":1,\"entries\":{}}",
        b"{\"version\":1,\"entries\":[1]}",
        b"{\"version\":1,\"entries\":[{\"name\":\"a\",\"type\":\"reg\",\"size\":1.5}]}",
        b"{\"version\":1,\"entries\":[{\"name\":\"a\",\"name\":\"a\"}]}",
        b"{\"version\":1,\"entries\":[{\"name\":\"\xff\"}]}",
        b"{\"version\":1,\"entries\":[{\"name\":\"\\ud800\"}]}",
        b"{\"version\":1,\"entries\":[{\"name\":\"a\",\"xattrs\":{\"user.a\":\"*\"}}]}",
    ] {
        let result = parse_toc(text, TOC_OFFSET, &limits);
        assert!(
            matches!(result, Err(TocError::Json { .. })),
            "{}: {result:?}",
            text.escape_ascii()
        );
    }
    let nested = [b"{\"a\":".to_vec(), vec![b'['; 100_000]].concat();
    assert!(parse_toc(&nested, TOC_OFFSET, &limits).is_err());
    for version in [0, 2] {
        let text = json!({"version": version, "entries": []}).to_string();
        assert_eq!(
            parse_toc(text.as_bytes(), TOC_OFFSET, &limits),
            Err(TocError::Version { found: version })
        );
    }
}

#[test]
fn limits_hold() {
    let small = Limits {
        max_index_bytes: 300,
        max_entries: 2,
        max_depth: 3,
        max_decoded_bytes: 8192,
        ..Limits::default()
    };
    let parse = |entries: &[Value]| parse_toc(&toc(entries), TOC_OFFSET, &small);
    let dir = |name: &str| json!({"name": name, "type": "dir"});
    assert!(parse(&[dir("a"), dir("b")]).is_ok());
    assert_eq!(
        parse(&[dir("a"), dir("b"), dir("c")]),
        Err(TocError::TooManyEntries { limit: 2 })
    );
    assert!(matches!(
        parse(&[dir("a/b/c/d")]),
        Err(TocError::Limit { index: 0, .. })
    ));
    assert!(matches!(
        parse(&[dir(&"x".repeat(300))]),
        Err(TocError::TooLarge { limit: 300, .. })
    ));
    let small = Limits {
        max_decoded_bytes: 8192,
        ..Limits::default()
    };
    let files = [file("a", 0, 1), file("b", 1, 1), file("c", 2, 1)];
    let error = parse_toc(&toc(&files), TOC_OFFSET, &small).expect_err("too large");
    assert!(error.to_string().contains("/c"), "{error}");
}

fn member(name: &str, size: usize, body: &[u8]) -> Vec<u8> {
    let mut tar = vec![0; 512];
    tar[..name.len()].copy_from_slice(name.as_bytes());
    tar[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    tar[156] = b'0';
    tar[148..156].fill(b' ');
    let sum: u32 = tar.iter().map(|byte| u32::from(*byte)).sum();
    tar[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend_from_slice(body);
    tar.resize(tar.len().next_multiple_of(512), 0);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&tar).expect("writes to memory");
    encoder.finish().expect("writes to memory")
}

#[test]
fn the_member_of_a_toc() {
    let limits = Limits {
        max_index_bytes: 100,
        ..Limits::default()
    };
    let body = br#"{"version":1,"entries":[]}"#;
    let good = member(TOC_TAR_NAME, body.len(), body);
    assert_eq!(inflate_toc(&good, &limits).expect("a TOC"), body);
    assert_eq!(
        inflate_toc(&member(TOC_TAR_NAME, 0, b""), &limits).expect("empty"),
        b""
    );
    assert!(matches!(
        inflate_toc(&member("other.json", body.len(), body), &limits),
        Err(TocError::Container { .. })
    ));
    assert!(matches!(
        inflate_toc(&member(TOC_TAR_NAME, 2000, body), &limits),
        Err(TocError::TooLarge {
            actual: 2000,
            limit: 100
        })
    ));
    assert!(matches!(
        inflate_toc(&member(TOC_TAR_NAME, 90, b""), &limits),
        Err(TocError::Container { .. })
    ));
    for cut in 0..good.len() - 8 {
        // Cutting the trailer and the archive's padding loses nothing.
        if let Ok(json) = inflate_toc(&good[..cut], &limits) {
            assert_eq!(json, body);
        }
    }
    assert!(matches!(
        inflate_toc(b"", &limits),
        Err(TocError::Container { .. })
    ));
    assert!(matches!(
        inflate_toc(b"junk", &limits),
        Err(TocError::Gzip(_))
    ));
}
