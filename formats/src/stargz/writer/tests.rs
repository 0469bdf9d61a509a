use std::io::Cursor;

use super::*;
use crate::{
    gzip::Inflater,
    stargz::{StargzLayer, StartList, decode_chunk, inflate_toc, parse_footer, parse_toc},
    tree::Kind,
};

/// A tar archive under construction.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, flag: u8, name: &str, link: &str, content: &[u8]) -> Self {
        let mut header = members::ustar_header(name, content.len() as u64);
        header[100..107].copy_from_slice(b"0000755");
        header[156] = flag;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        self.push(header, content)
    }

    fn push(&mut self, mut header: [u8; 512], content: &[u8]) -> Self {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        Self(core::mem::take(&mut self.0))
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(b'0', name, "", content)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn built(tar: &[u8], options: &WriterOptions) -> (Vec<u8>, Built) {
    let mut blob = Vec::new();
    let limits = Limits::default();
    let built = build(Cursor::new(tar), &mut blob, options, &limits).unwrap();
    assert_eq!(built.blob_digest, Digest::of(&blob));
    assert_eq!(built.blob_len, blob.len() as u64);
    let plain = inflate(&blob);
    assert_eq!(built.diff_id, Digest::of(&plain));
    assert_eq!(built.uncompressed_len, plain.len() as u64);
    (blob, built)
}

fn inflate(blob: &[u8]) -> Vec<u8> {
    let mut inflater = Inflater::new(1 << 30);
    let mut plain = Vec::new();
    inflater
        .push(blob, &mut |bytes| plain.extend_from_slice(bytes))
        .unwrap();
    inflater.finish().unwrap();
    plain
}

fn opened(blob: &[u8]) -> (StargzLayer, Vec<u8>) {
    let footer = parse_footer(blob, blob.len() as u64).unwrap();
    let start = usize::try_from(footer.toc_offset.0).unwrap();
    let limits = Limits::default();
    let json = inflate_toc(&blob[start..blob.len() - 51], &limits).unwrap();
    let layer = parse_toc(&json, footer.toc_offset, &limits).unwrap();
    (layer, json)
}

fn options(chunk_size: u32, prioritized: &[&str]) -> WriterOptions {
    WriterOptions {
        chunk_size,
        prioritized: prioritized
            .iter()
            .map(|path| path.as_bytes().to_vec())
            .collect(),
        ..WriterOptions::default()
    }
}

/// Names of the entries of an archive in order.
fn names(plain: &[u8]) -> Vec<String> {
    let mut parser = crate::tar::Parser::new(Limits::default());
    let mut bytes = plain;
    let mut names = Vec::new();
    while let Some(event) = parser.next_event(&mut bytes).unwrap() {
        if let crate::tar::Event::Entry(header) = event {
            names.push(String::from_utf8(header.path).unwrap());
        }
    }
    names
}

#[test]
fn the_worked_example() {
    let tar = Tar::default()
        .entry(b'5', "d/", "", b"")
        .file("d/hello", b"hi\n")
        .file("d/big", b"0123456789")
        .end();
    let (blob, built) = built(&tar, &options(4, &[]));

    // What lies in each member, by the offsets of the TOC and by inflating up to the next.
    let (layer, json) = opened(&blob);
    assert_eq!(built.toc_digest, layer.toc_digest);
    assert_eq!(layer.start_list, StartList::Nothing);
    let toc: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let rows = toc["entries"].as_array().unwrap();
    let field = |row: usize, key: &str| rows[row][key].as_u64();
    let mut starts: Vec<usize> = std::iter::once(0)
        .chain(rows.iter().filter_map(|row| row["offset"].as_u64()))
        .chain([built.toc_offset.0, built.blob_len - 51])
        .map(|offset| usize::try_from(offset).unwrap())
        .collect();
    let members: Vec<usize> = starts
        .windows(2)
        .map(|pair| inflate(&blob[pair[0]..pair[1]]).len())
        .collect();
    assert_eq!(members[..6], [512, 1536, 1024, 4, 4, 504]);
    assert_eq!(starts.remove(0), 0);

    let expected = [
        (".no.prefetch.landmark", "reg", Some(1), None, None),
        ("d/", "dir", None, None, None),
        ("d/hello", "reg", Some(3), None, None),
        ("d/big", "reg", Some(10), Some(4), None),
        ("d/big", "chunk", None, Some(4), Some(4)),
        ("d/big", "chunk", None, None, Some(8)),
    ];
    assert_eq!(rows.len(), expected.len());
    for (index, (name, kind, size, chunk_size, chunk_offset)) in expected.iter().enumerate() {
        assert_eq!(rows[index]["name"], *name);
        assert_eq!(rows[index]["type"], *kind);
        assert_eq!(field(index, "size"), *size);
        assert_eq!(field(index, "chunkSize"), *chunk_size);
        assert_eq!(field(index, "chunkOffset"), *chunk_offset);
        assert!(rows[index].get("modtime").is_none());
    }
    let whole = Digest::of(b"0123456789").to_string();
    assert_eq!(rows[3]["digest"], whole);
    assert_eq!(rows[3]["chunkDigest"], Digest::of(b"0123").to_string());
    assert_eq!(rows[0]["digest"], rows[0]["chunkDigest"]);

    let footer = &blob[blob.len() - 51..];
    assert_eq!(
        footer[..16],
        *b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0"
    );
    assert_eq!(footer[32..], *b"STARGZ\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");

    let hello = layer.tree.lookup(b"d/hello").unwrap();
    assert!(matches!(&layer.tree.inode(hello).kind, Kind::Regular(file) if file.size == 3));
    for chunk in layer.map.chunks() {
        let range = chunk.remote_range();
        let (start, end) = (
            range.start.try_into().unwrap(),
            range.end.try_into().unwrap(),
        );
        let range: core::ops::Range<usize> = start..end;
        decode_chunk(&blob[range], chunk, &mut Vec::new()).unwrap();
    }
}

#[test]
fn a_full_last_chunk_says_its_size() {
    let tar = Tar::default().file("f", b"01234567").end();
    let (blob, _) = built(&tar, &options(4, &[]));
    let (_, json) = opened(&blob);
    let toc: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(toc["entries"][2]["chunkSize"], 4);
}

#[test]
fn prioritised_files_bring_parents_and_targets() {
    let tar = Tar::default()
        .entry(b'5', "./", "", b"")
        .file("./z", b"z")
        .entry(b'5', "./a/", "", b"")
        .file("./a/target", b"t")
        .entry(b'5', "./b/", "", b"")
        .entry(b'1', "./b/link", "a/target", b"")
        .file("./b/late", b"l")
        .end();
    let list = ["/b/late", "nowhere", "b/link", "b/late"];
    let (blob, built) = built(&tar, &options(1024, &list));
    assert_eq!(
        names(&inflate(&blob)),
        [
            "./",
            "./b/",
            "./b/late",
            "./a/",
            "./a/target",
            "./b/link",
            ".prefetch.landmark",
            "./z",
            "stargz.index.json"
        ]
    );
    assert_eq!(built.missing, [b"nowhere"]);
    assert_eq!(built.not_lazy, None);
    let (layer, _) = opened(&blob);
    let end = built.start_list_end.unwrap();
    assert_eq!(layer.start_list, StartList::Until(end));
    assert!(end < built.toc_offset);

    // A list that names nothing of the layer is no start list.
    let (blob, built) = self::built(&tar, &options(1024, &["nowhere"]));
    assert_eq!(opened(&blob).0.start_list, StartList::Nothing);
    assert_eq!(built.start_list_end, None);
}

#[test]
fn converting_twice_changes_nothing() {
    let tar = Tar::default().file("a", b"1").file("b", b"22").end();
    let (first, _) = built(&tar, &options(1024, &["b"]));
    let (again, _) = built(&inflate(&first), &options(1024, &["b"]));
    assert_eq!(first, again);
}

#[test]
fn the_last_of_two_entries_stays() {
    let tar = Tar::default()
        .file("a", b"old")
        .file("b", b"b")
        .file("./a", b"new!")
        .end();
    let (blob, built) = built(&tar, &options(1024, &[]));
    assert_eq!(built.not_lazy, None);
    let plain = inflate(&blob);
    assert_eq!(
        names(&plain),
        [".no.prefetch.landmark", "b", "./a", "stargz.index.json"]
    );
    assert!(!plain.windows(3).any(|bytes| bytes == b"old"));
}

#[test]
fn what_would_change_the_tree_is_refused() {
    let limits = Limits::default();
    let refused = |tar: Vec<u8>, options: &WriterOptions| {
        build(Cursor::new(tar), io::sink(), options, &limits).unwrap_err()
    };
    let replaced_target = Tar::default()
        .file("a", b"old")
        .entry(b'1', "link", "a", b"")
        .file("a", b"new")
        .end();
    assert!(matches!(
        refused(replaced_target, &options(1024, &[])),
        WriteError::Order
    ));
    let other_type = Tar::default().entry(b'7', "c", "", b"").end();
    assert!(matches!(
        refused(other_type, &options(1024, &[])),
        WriteError::Type { flag: '7', .. }
    ));
    let sparse = Tar::default().entry(b'S', "s", "", b"").end();
    assert!(matches!(
        refused(sparse, &options(1024, &[])),
        WriteError::Sparse { .. }
    ));
    let mut cut = Tar::default().file("a", b"12345").end();
    cut.truncate(514);
    assert!(matches!(
        refused(cut, &options(1024, &[])),
        WriteError::Tar(TarError::Truncated { .. })
    ));
    let tar = Tar::default().end();
    assert!(matches!(
        refused(tar.clone(), &options(0, &[])),
        WriteError::Option {
            option: "chunk size",
            ..
        }
    ));
    let level = WriterOptions {
        level: 13,
        ..WriterOptions::default()
    };
    assert!(matches!(
        refused(tar, &level),
        WriteError::Option {
            option: "compression level",
            ..
        }
    ));
}

#[test]
fn links_in_a_circle_end() {
    let tar = Tar::default()
        .entry(b'1', "a", "b", b"")
        .entry(b'1', "b", "a", b"")
        .end();
    let (_, built) = built(&tar, &options(1024, &["a"]));
    assert!(matches!(
        built.not_lazy,
        Some(NotLazyReason::HardLinkTarget { .. })
    ));
}

#[test]
fn many_headers_end_a_member_early() {
    let mut tar = Tar::default().file("first", b"x");
    for index in 0..5000 {
        tar = tar.file(&format!("empty-{index}"), b"");
    }
    let tar = tar.file("last", b"y").end();
    let (blob, built) = built(&tar, &options(1024, &[]));
    let (layer, _) = opened(&blob);
    assert_eq!(layer.map.chunks().len(), 2);
    assert_eq!(layer.tree.inodes().len(), 5003);
    assert_eq!(built.not_lazy, None);
}
