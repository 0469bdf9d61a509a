//! Tar archives: a small writer and random archives.

use formats::{
    limits::Limits,
    tar::{EntryType, Event, Parser},
    tree::{Builder, Entry, Kind, LayerTree, TreePath},
};
use proptest::{collection::vec, prelude::*};
use std::collections::BTreeMap;

/// One entry as it goes into an archive.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spec {
    pub(crate) flag: u8,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) content: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) user: &'static str,
    pub(crate) seconds: u64,
    pub(crate) nanos: u32,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

/// An archive of `entries`.
pub(crate) fn tar(entries: &[Spec]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut pax = Vec::new();
        if entry.name.len() > 100 {
            record(&mut pax, "path", &entry.name);
        }
        if entry.link.len() > 100 {
            record(&mut pax, "linkpath", &entry.link);
        }
        if entry.nanos > 0 {
            let time = format!("{}.{:09}", entry.seconds, entry.nanos);
            record(&mut pax, "mtime", time.as_bytes());
        }
        for (name, value) in &entry.xattrs {
            record(&mut pax, &format!("SCHILY.xattr.{name}"), value);
        }
        if !pax.is_empty() {
            let header = Spec {
                flag: b'x',
                name: b"PaxHeaders/entry".to_vec(),
                ..Spec::default()
            };
            push(&mut out, &header, &pax);
        }
        push(&mut out, entry, &entry.content);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let len = (rest..rest + 20)
        .find(|len| rest + len.to_string().len() == *len)
        .unwrap();
    out.extend_from_slice(format!("{len} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn push(out: &mut Vec<u8>, entry: &Spec, content: &[u8]) {
    let mut block = [0; 512];
    let mut put = |at: usize, max: usize, bytes: &[u8]| {
        let len = bytes.len().min(max);
        block[at..at + len].copy_from_slice(&bytes[..len]);
    };
    put(0, 100, &entry.name);
    put(100, 7, format!("{:07o}", entry.mode).as_bytes());
    for (at, id) in [(108, entry.owner.0), (116, entry.owner.1)] {
        if id < 1 << 21 {
            put(at, 7, format!("{id:07o}").as_bytes());
        } else {
            put(at, 4, &[0x80, 0, 0, 0]);
            put(at + 4, 4, &id.to_be_bytes());
        }
    }
    put(124, 11, format!("{:011o}", content.len()).as_bytes());
    put(136, 11, format!("{:011o}", entry.seconds).as_bytes());
    put(156, 1, &[entry.flag]);
    put(157, 100, &entry.link);
    put(257, 8, b"ustar\x0000");
    put(265, 32, entry.user.as_bytes());
    put(329, 7, format!("{:07o}", entry.device.0).as_bytes());
    put(337, 7, format!("{:07o}", entry.device.1).as_bytes());
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&block);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// A random archive without entries that replace each other, and some of its paths.
pub(crate) fn archive() -> impl Strategy<Value = (Vec<Spec>, Vec<Vec<u8>>)> {
    let step = (any::<usize>(), name(), attrs(), what());
    (vec(step, 0..40), vec(any::<usize>(), 0..6)).prop_map(|(steps, picks)| {
        let mut entries: Vec<Spec> = Vec::new();
        let mut directories: Vec<Vec<u8>> = vec![b"".to_vec()];
        let mut files: Vec<Vec<u8>> = Vec::new();
        let mut taken = std::collections::HashSet::new();
        for (at, name, attrs, what) in steps {
            let parent = directories[at % directories.len()].clone();
            let mut entry = attrs;
            entry.name = [&parent[..], &name].concat();
            match what {
                What::Directory { listed } => {
                    entry.flag = b'5';
                    entry.name.push(b'/');
                    if !taken.insert(entry.name[..entry.name.len() - 1].to_vec()) {
                        continue;
                    }
                    directories.push(entry.name.clone());
                    if !listed {
                        continue;
                    }
                }
                What::Opaque => {
                    entry.name = [&parent[..], b".wh..wh..opq"].concat();
                    entry.flag = b'0';
                    if !taken.insert(entry.name.clone()) {
                        continue;
                    }
                }
                what => {
                    if !taken.insert(entry.name.clone()) {
                        continue;
                    }
                    match what {
                        What::File(content) => {
                            entry.flag = b'0';
                            entry.content = content;
                        }
                        What::Symlink(target) => {
                            entry.flag = b'2';
                            entry.link = target;
                        }
                        What::Device(flag, device) => {
                            entry.flag = flag;
                            entry.device = device;
                        }
                        What::Whiteout => {
                            let name = [&parent[..], b".wh.", &name].concat();
                            entry.name = name;
                            entry.flag = b'0';
                        }
                        What::Link(which) => {
                            let Some(target) = files.get(which % files.len().max(1)) else {
                                continue;
                            };
                            let target = target.clone();
                            // All links of a file have its attributes, as every archiver has it.
                            let of = entries.iter().find(|other| other.name == target);
                            let name = entry.name;
                            entry = of.unwrap().clone();
                            entry.name = name;
                            entry.content.clear();
                            entry.device = (0, 0);
                            entry.flag = b'1';
                            entry.link = target;
                        }
                        What::Directory { .. } | What::Opaque => unreachable!(),
                    }
                    if matches!(entry.flag, b'0' | b'3' | b'6') && !entry.name.contains(&b'.') {
                        files.push(entry.name.clone());
                    }
                }
            }
            entries.push(entry);
        }
        let picks = picks
            .into_iter()
            .filter_map(|pick| Some(entries.get(pick % entries.len().max(1))?.name.clone()))
            .collect();
        (entries, picks)
    })
}

#[derive(Clone, Debug)]
enum What {
    Directory { listed: bool },
    Opaque,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Device(u8, (u32, u32)),
    Whiteout,
    Link(usize),
}

fn what() -> impl Strategy<Value = What> {
    let target = prop_oneof!["[a-z/]{1,20}", "[a-z/]{120,200}"];
    prop_oneof![
        3 => prop::bool::weighted(0.8).prop_map(|listed| What::Directory { listed }),
        1 => Just(What::Opaque),
        6 => (0..5000_usize, any::<u8>()).prop_map(|(len, start)| {
            let byte = |at: usize| (at / 3).to_le_bytes()[0].wrapping_add(start);
            What::File((0..len).map(byte).collect())
        }),
        1 => target.prop_map(|target| What::Symlink(target.into_bytes())),
        1 => (prop_oneof![Just(b'3'), Just(b'4'), Just(b'6')], (1..200_u32, 0..70_000_u32))
            .prop_map(|(flag, device)| What::Device(flag, device)),
        1 => Just(What::Whiteout),
        2 => any::<usize>().prop_map(What::Link),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof!["[a-z]{1,8}", "[a-z]{90,200}", "[\u{e0}-\u{ff}]{1,5}"].prop_map(String::into_bytes)
}

fn attrs() -> impl Strategy<Value = Spec> {
    let owner = prop_oneof![Just((0, 0)), (any::<u32>(), any::<u32>())];
    let time = prop_oneof![
        Just((0, 0)),
        (0..3_u64, 0..1_000_000_000_u32),
        (0..4_000_000_000_u64, Just(0)),
    ];
    let xattr = ("user\\.[a-z]{1,5}", vec(any::<u8>(), 0..20));
    let user = prop_oneof![Just(""), Just("root"), Just("someone")];
    (0..=0o7777_u32, owner, user, time, vec(xattr, 0..2)).prop_map(
        |(mode, owner, user, (seconds, nanos), xattrs)| Spec {
            mode,
            owner,
            user,
            seconds,
            nanos,
            xattrs,
            ..Spec::default()
        },
    )
}

/// The tree of an archive, without the entries that do not apply.
pub(crate) fn unpack_leniently(tar: &[u8]) -> LayerTree {
    let mut parser = Parser::new(Limits::default());
    let mut builder = Builder::new(Limits::default());
    let mut bytes = tar;
    while let Some(event) = parser.next_event(&mut bytes).unwrap() {
        if let Event::Entry(header) = event {
            if is_hidden(&TreePath::clean(&header.path)) {
                continue;
            }
            let _ = builder.apply(Entry {
                path: &header.path,
                attrs: header.attrs(),
                kind: header.entry_kind().unwrap(),
            });
        }
    }
    builder.finish()
}

fn is_hidden(path: &TreePath) -> bool {
    let hidden = [
        ".prefetch.landmark",
        ".no.prefetch.landmark",
        "stargz.index.json",
    ];
    hidden.iter().any(|name| name.as_bytes() == path.as_bytes())
}

/// What an ordinary unpack makes of an archive: the tree, and the content of its regular files.
/// Landmarks and the TOC are left out.
pub(crate) fn unpack(tar: &[u8]) -> (LayerTree, BTreeMap<Vec<u8>, Vec<u8>>) {
    let limits = Limits::default();
    let mut parser = Parser::new(limits);
    let mut builder = Builder::new(limits);
    let mut contents = BTreeMap::new();
    let mut path: Option<Vec<u8>> = None;
    let mut bytes = tar;
    while let Some(event) = parser.next_event(&mut bytes).unwrap() {
        match event {
            Event::Entry(header) => {
                let cleaned = TreePath::clean(&header.path);
                path = None;
                if is_hidden(&cleaned) {
                    continue;
                }
                builder
                    .apply(Entry {
                        path: &header.path,
                        attrs: header.attrs(),
                        kind: header.entry_kind().unwrap(),
                    })
                    .unwrap();
                if header.kind == EntryType::Regular {
                    let name = cleaned.as_bytes().to_vec();
                    contents.insert(name.clone(), Vec::new());
                    path = Some(name);
                }
            }
            Event::Payload { bytes, .. } => {
                if let Some(path) = &path {
                    contents.get_mut(path).unwrap().extend_from_slice(bytes);
                }
            }
            Event::EntryEnd | Event::End => {}
        }
    }
    parser.finish().unwrap();
    (builder.finish(), contents)
}

/// A tree as rows without inode numbers and places: path, attributes, type. Files are shown by
/// their size, names of one inode by the first of them.
pub(crate) fn rows(tree: &LayerTree, round: impl Fn(i64, u32) -> i64) -> Vec<String> {
    let mut rows = Vec::new();
    let mut first = std::collections::HashMap::new();
    let mut queue = vec![(Vec::new(), formats::tree::InodeId::ROOT)];
    while let Some((path, id)) = queue.pop() {
        let inode = tree.inode(id);
        let kind = match &inode.kind {
            Kind::Directory(directory) => {
                for (name, child) in directory.entries.iter().rev() {
                    queue.push(([&path[..], b"/", name].concat(), *child));
                }
                format!(
                    "dir opaque={} implied={}",
                    directory.opaque, directory.implied
                )
            }
            Kind::Regular(file) => format!("file {}", file.size),
            other => format!("{other:?}"),
        };
        let same = first.entry(id).or_insert_with(|| path.clone());
        let attrs = &inode.attrs;
        rows.push(format!(
            "{} = {}: {kind} {:o} {} {} {} {:?} nlink={}",
            path.escape_ascii(),
            same.escape_ascii(),
            attrs.mode,
            attrs.uid,
            attrs.gid,
            round(attrs.mtime.seconds, attrs.mtime.nanos),
            attrs.xattrs,
            inode.nlink
        ));
    }
    rows
}
