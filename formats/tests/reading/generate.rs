//! A small eStargz writer of the tests' own, so that the reader is not only checked against this
//! crate's writer: models of layers, their tar, their blob with its TOC.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use formats::{digest::Digest, tree::Mtime};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// What an entry is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ItemKind {
    Dir,
    File(Vec<u8>),
    Symlink(String),
    Link(String),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// One entry of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) path: String,
    pub(crate) kind: ItemKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Mtime,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

/// A layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) items: Vec<Item>,
    pub(crate) chunk_size: usize,
    /// Put all payloads of up to this many bytes into the member at hand.
    pub(crate) share_members_below: usize,
}

/// A layer as bytes.
pub(crate) struct Built {
    /// The tar without the entry of the TOC and without end blocks.
    pub(crate) body: Vec<u8>,
    pub(crate) toc: Vec<u8>,
    pub(crate) blob: Vec<u8>,
}

impl Item {
    pub(crate) fn new(path: &str, kind: ItemKind) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Mtime {
                seconds: 1_700_000_000,
                nanos: 0,
            },
            xattrs: Vec::new(),
        }
    }

    fn flag(&self) -> u8 {
        match &self.kind {
            ItemKind::File(_) => b'0',
            ItemKind::Link(_) => b'1',
            ItemKind::Symlink(_) => b'2',
            ItemKind::Char(..) => b'3',
            ItemKind::Block(..) => b'4',
            ItemKind::Dir => b'5',
            ItemKind::Fifo => b'6',
        }
    }

    fn payload(&self) -> &[u8] {
        match &self.kind {
            ItemKind::File(bytes) => bytes,
            _ => &[],
        }
    }

    /// Its headers: a PAX one where something does not fit, and its own.
    fn headers(&self) -> Vec<u8> {
        let mut records = Vec::new();
        if self.path.len() > 100 {
            records.extend(record(b"path", self.path.as_bytes()));
        }
        if self.mtime.nanos > 0 || self.mtime.seconds < 0 {
            records.extend(record(b"mtime", decimal(self.mtime).as_bytes()));
        }
        for (key, value) in &self.xattrs {
            records.extend(record(format!("SCHILY.xattr.{key}").as_bytes(), value));
        }
        let mut out = Vec::new();
        if !records.is_empty() {
            out.extend(block("pax", b'x', records.len(), |_| {}));
            out.extend(padded(records));
        }
        let short: String = self.path.chars().take(100).collect();
        out.extend(block(&short, self.flag(), self.payload().len(), |block| {
            put(block, 100, &format!("{:07o}", self.mode));
            put(block, 108, &format!("{:07o}", self.uid));
            put(block, 116, &format!("{:07o}", self.gid));
            put(block, 136, &format!("{:011o}", self.mtime.seconds.max(0)));
            match &self.kind {
                ItemKind::Symlink(target) | ItemKind::Link(target) => put(block, 157, target),
                ItemKind::Char(major, minor) | ItemKind::Block(major, minor) => {
                    put(block, 329, &format!("{major:07o}"));
                    put(block, 337, &format!("{minor:07o}"));
                }
                _ => {}
            }
        }));
        out
    }

    fn toc_entry(&self) -> Map<String, Value> {
        let kind = match &self.kind {
            ItemKind::Dir => "dir",
            ItemKind::File(_) => "reg",
            ItemKind::Symlink(_) => "symlink",
            ItemKind::Link(_) => "hardlink",
            ItemKind::Char(..) => "char",
            ItemKind::Block(..) => "block",
            ItemKind::Fifo => "fifo",
        };
        let mut entry = Map::new();
        let mut set = |key: &str, value: Value| {
            entry.insert(key.to_owned(), value);
        };
        set("name", json!(self.path));
        set("type", json!(kind));
        set("mode", json!(self.mode));
        set("uid", json!(self.uid));
        set("gid", json!(self.gid));
        let kept = formats::stargz::toc_mtime(self.mtime).seconds;
        if kept != 0 {
            set("modtime", json!(rfc3339(kept)));
        }
        match &self.kind {
            ItemKind::Symlink(target) | ItemKind::Link(target) => {
                set("linkName", json!(target));
            }
            ItemKind::Char(major, minor) | ItemKind::Block(major, minor) => {
                set("devMajor", json!(major));
                set("devMinor", json!(minor));
            }
            ItemKind::File(bytes) => {
                set("size", json!(bytes.len()));
                set("digest", json!(Digest::of(bytes).to_string()));
            }
            _ => {}
        }
        if !self.xattrs.is_empty() {
            let xattrs: Map<String, Value> = self
                .xattrs
                .iter()
                .map(|(key, value)| (key.clone(), json!(base64(value))))
                .collect();
            set("xattrs", Value::Object(xattrs));
        }
        entry
    }
}

impl Model {
    pub(crate) fn build(&self) -> Built {
        self.build_from(Members::default())
    }

    /// The same layer without compression: its blob has the shape, but cannot be decoded.
    pub(crate) fn build_stored(&self) -> Built {
        self.build_from(Members {
            stored: true,
            ..Members::default()
        })
    }

    fn build_from(&self, mut members: Members) -> Built {
        let mut body = Vec::new();
        let mut entries = Vec::new();
        let put = |members: &mut Members, body: &mut Vec<u8>, bytes: &[u8]| {
            members.current.extend_from_slice(bytes);
            body.extend_from_slice(bytes);
        };
        for item in &self.items {
            put(&mut members, &mut body, &item.headers());
            let payload = item.payload();
            let mut entry = item.toc_entry();
            for (index, chunk) in payload.chunks(self.chunk_size).enumerate() {
                let alone = payload.len() > self.share_members_below;
                if alone {
                    members.start();
                }
                if index > 0 {
                    entry.insert("name".into(), json!(item.path));
                    entry.insert("type".into(), json!("chunk"));
                    entry.insert("chunkOffset".into(), json!(index * self.chunk_size));
                }
                entry.insert("offset".into(), json!(members.blob.len()));
                if !alone {
                    entry.insert("innerOffset".into(), json!(members.current.len()));
                }
                if payload.len() > self.chunk_size && chunk.len() == self.chunk_size {
                    entry.insert("chunkSize".into(), json!(chunk.len()));
                }
                entry.insert("chunkDigest".into(), json!(Digest::of(chunk).to_string()));
                entries.push(Value::Object(core::mem::take(&mut entry)));
                put(&mut members, &mut body, chunk);
            }
            if !entry.is_empty() {
                entries.push(Value::Object(entry));
            }
            let padding = vec![0; payload.len().next_multiple_of(512) - payload.len()];
            put(&mut members, &mut body, &padding);
        }
        let toc = json!({"version": 1, "entries": entries})
            .to_string()
            .into_bytes();
        members.start();
        let toc_offset = members.blob.len();
        members.current = ending(&toc);
        members.start();
        let mut blob = members.blob;
        blob.extend_from_slice(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
        blob.extend_from_slice(format!("{toc_offset:016x}STARGZ").as_bytes());
        blob.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
        Built { body, toc, blob }
    }
}

impl Built {
    /// The whole tar, with `toc` as the TOC in it.
    pub(crate) fn tar_with(&self, toc: &[u8]) -> Vec<u8> {
        [&self.body[..], &ending(toc)].concat()
    }
}

/// The entry of a TOC and the end of the archive.
fn ending(toc: &[u8]) -> Vec<u8> {
    let mut out = block("stargz.index.json", b'0', toc.len(), |_| {});
    out.extend(padded(toc.to_vec()));
    out.extend([0; 1024]);
    out
}

#[derive(Default)]
struct Members {
    stored: bool,
    blob: Vec<u8>,
    current: Vec<u8>,
}

impl Members {
    /// Ends the member at hand; the next one starts here.
    fn start(&mut self) {
        if self.current.is_empty() {
            return;
        }
        if self.stored {
            self.blob.append(&mut self.current);
            return;
        }
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&self.current).expect("writes to memory");
        self.blob
            .extend(encoder.finish().expect("writes to memory"));
        self.current.clear();
    }
}

fn block(name: &str, flag: u8, size: usize, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut block = vec![0; 512];
    put(&mut block, 0, name);
    put(&mut block, 124, &format!("{size:011o}"));
    put(&mut block, 257, "ustar\0");
    put(&mut block, 263, "00");
    block[156] = flag;
    change(&mut block);
    put(&mut block, 148, "        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block, 148, &format!("{sum:06o}\0"));
    block
}

fn put(block: &mut [u8], at: usize, text: &str) {
    block[at..at + text.len()].copy_from_slice(text.as_bytes());
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key, b"=", value, b"\n"].concat();
    let length = (rest.len()..rest.len() + 20)
        .find(|length| length.to_string().len() + rest.len() == *length)
        .expect("some length fits");
    [length.to_string().as_bytes(), &rest].concat()
}

fn decimal(time: Mtime) -> String {
    if time.seconds < 0 && time.nanos > 0 {
        let (whole, nanos) = (-(time.seconds + 1), 1_000_000_000 - time.nanos);
        return format!("-{whole}.{nanos:09}");
    }
    format!("{}.{:09}", time.seconds, time.nanos)
}

fn rfc3339(seconds: i64) -> String {
    let days = seconds.div_euclid(86400);
    let rest = seconds.rem_euclid(86400);
    let (mut year, mut day) = (1970, days);
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = |year| if leap(year) { 366 } else { 365 };
    while day < 0 {
        year -= 1;
        day += length(year);
    }
    while day >= length(year) {
        day -= length(year);
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!(
        "{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}Z",
        day + 1,
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Any layer that a TOC can hold: every path once, links to earlier files, parents with and
/// without entries, whiteouts, opaque directories, a landmark.
pub(crate) fn models() -> impl Strategy<Value = Model> {
    let item = (
        0..9_u8,
        any::<prop::sample::Index>(),
        0..0o10000_u32,
        prop_oneof![Just(0), 0..70000_u32],
        prop_oneof![Just(0), 0..70000_u32],
        times(),
        prop::collection::vec(
            (
                "user\\.[a-z]{1,3}",
                prop::collection::vec(any::<u8>(), 0..5),
            ),
            0..3,
        ),
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            prop::collection::vec(any::<u8>(), 500..5000)
        ],
    );
    (
        prop::collection::vec(item, 1..12),
        prop_oneof![Just(7_usize), Just(512), Just(4096)],
        prop_oneof![Just(0_usize), Just(1000)],
        any::<bool>(),
    )
        .prop_map(|(raw, chunk_size, share_members_below, landmark)| {
            let mut directories = vec![String::new()];
            let mut files: Vec<String> = Vec::new();
            let mut items = Vec::new();
            if landmark {
                items.push(Item::new(".prefetch.landmark", ItemKind::File(vec![0x0f])));
            }
            for (index, (kind, pick, mode, uid, gid, mtime, xattrs, bytes)) in
                raw.into_iter().enumerate()
            {
                let parent = pick.get(&directories).clone();
                // Every third parent has no entry of its own.
                let parent = if pick.index(3) == 0 {
                    format!("{parent}implied{index}/")
                } else {
                    parent
                };
                let long = if pick.index(5) == 0 {
                    "n".repeat(120)
                } else {
                    String::new()
                };
                let path = format!("{parent}item{index}{long}");
                let kind = match kind {
                    0 | 1 => ItemKind::Dir,
                    2 | 3 => ItemKind::File(bytes),
                    4 => ItemKind::Symlink(format!("target{index}")),
                    5 if files.is_empty() => ItemKind::Fifo,
                    5 => ItemKind::Link(pick.get(&files).clone()),
                    6 => ItemKind::Char(u32::from(mode % 7 == 0), 3),
                    7 => ItemKind::Block(8, mode % 16),
                    _ => {
                        let name = if pick.index(2) == 0 {
                            ".wh..wh..opq".to_owned()
                        } else {
                            format!(".wh.gone{index}")
                        };
                        let path = format!("{parent}{name}");
                        if !items.iter().any(|item: &Item| item.path == path) {
                            items.push(Item::new(&path, ItemKind::File(Vec::new())));
                        }
                        continue;
                    }
                };
                match &kind {
                    ItemKind::Dir => directories.push(format!("{path}/")),
                    // Link targets are short enough for a header.
                    ItemKind::File(_) if path.len() <= 100 => files.push(path.clone()),
                    _ => {}
                }
                let mut unique: Vec<(String, Vec<u8>)> = Vec::new();
                for (key, value) in xattrs {
                    if !unique.iter().any(|(known, _)| *known == key) {
                        unique.push((key, value));
                    }
                }
                items.push(Item {
                    path,
                    kind,
                    mode,
                    uid,
                    gid,
                    mtime,
                    xattrs: unique,
                });
            }
            Model {
                items,
                chunk_size,
                share_members_below,
            }
        })
}

fn times() -> impl Strategy<Value = Mtime> {
    let seconds = prop_oneof![
        Just(0_i64),
        Just(1),
        Just(-1),
        0..4_102_444_800_i64,
        -1000..0_i64
    ];
    let nanos = prop_oneof![
        Just(0_u32),
        Just(499_999_999),
        Just(500_000_000),
        Just(700_000_000)
    ];
    (seconds, nanos).prop_map(|(seconds, nanos)| Mtime { seconds, nanos })
}
