//! Layers that other projects' tools wrote, served by the daemon.

use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use formats::oci::{Index, Manifest};
use suite::{
    host::{Came, oracle},
    listing::{Allowed, differences, list},
    machine,
    pushed::{PushedImage, cri_labels, layout_layers},
    skip,
};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    world::{ready, verdicts, within_egress_bound},
};

/// Part of the reason why a layer is not lazy; `None` for lazy ones.
type Expected = Option<&'static str>;

/// The bottom layer holds two names that are not UTF-8, which a TOC cannot carry.
const NAMES: Expected = Some("U+FFFD");

/// Image and what becomes of its layers, bottom first.
const IMAGES: [(&str, [Expected; 4]); 6] = [
    ("esgz-noopt", [NAMES, None, None, None]),
    ("esgz-landmark", [NAMES, None, None, None]),
    ("esgz-chunk4096", [NAMES, None, None, None]),
    ("esgz-min50k", [NAMES, None, None, None]),
    ("legacy-crfs", [Some("no TOC digest"); 4]),
    ("esgz-extoc", [Some("index of layer"); 4]),
];

#[test]
fn other_tools_layers_are_lazy_or_say_why_not() {
    let Some(fixtures) = machine::fixtures().filter(|dir| dir.join("stargz/index.json").exists())
    else {
        skip("no third-party images (SNAPSHOTTERD_FIXTURES)");
        return;
    };
    if !ready() {
        return;
    }
    let layout = fixtures.join("stargz");
    let truth = Truth::read(&fixtures.join("tree/tree.tsv"));
    let fixture = Fixture::new(CONFIG);
    let before = fixture.lab.log().mark();
    let mut lazy_layers = Vec::new();
    runtime().block_on(async {
        for (tag, expected) in IMAGES {
            let layers = layout_layers(&layout, &manifest(&layout, tag));
            let image = PushedImage::push(&fixture.lab, &format!("fixtures/{tag}"), "1", &layers);
            let host = fixture.host(tag).await;
            let (parent, came) = host.pull(&image, cri_labels).await;
            for (index, expected) in expected.iter().enumerate() {
                let digest = image.layers[index].digest();
                match expected {
                    None => {
                        assert_eq!(came[index], Came::Lazily, "{tag} layer {index}");
                        lazy_layers.push((digest, image.layers[index].descriptor.size));
                    }
                    Some(part) => {
                        assert_eq!(came[index], Came::Unpacked, "{tag} layer {index}");
                        let why = fixture.why_not(&image, index);
                        eprintln!("{tag} layer {index}: {why}");
                        assert!(why.contains(part), "{tag} layer {index}: {why}");
                        assert!(why.contains(&digest.to_string()), "{tag}: {why}");
                    }
                }
            }
            let (_, container) = fixture.container(&host, &parent, "c").await;
            let unpacked = fixture.work.sub("oracles").join(tag);
            oracle(&image, &unpacked);
            let found = truth.differences(&unpacked, container.path());
            assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
        }
    });
    for layer in verdicts(&fixture) {
        assert_eq!(layer["verdict"], "proven", "{layer}");
    }
    lazy_layers.sort();
    lazy_layers.dedup();
    assert!(lazy_layers.len() >= 10, "{lazy_layers:?}");
    within_egress_bound(&fixture.lab.log().totals_since(&before), &lazy_layers);
}

fn manifest(layout: &Path, tag: &str) -> Manifest {
    let index = std::fs::read(layout.join("index.json")).expect("the layout's index");
    let index = Index::parse(&index, None).expect("an index");
    let named = index.manifests.iter().find(|descriptor| {
        let name = descriptor
            .annotations
            .get(formats::oci::ANNOTATION_REF_NAME);
        name.is_some_and(|name| name == tag)
    });
    let digest = named.unwrap_or_else(|| panic!("no {tag}")).digest;
    let json = std::fs::read(layout.join(formats::oci::blob_path(&digest))).expect("a manifest");
    Manifest::parse(&json, None).expect("a manifest")
}

/// What the fixtures' own listing says beyond what an unpack into one directory shows.
struct Truth {
    /// Paths whose modification time a lazily served layer need not show as an unpack does:
    /// directories that some layer implies, and times with a fraction of a second.
    times: Allowed,
    /// Links of the inode in its own layer, which is what overlayfs shows.
    links: BTreeMap<PathBuf, u64>,
}

impl Truth {
    fn read(listing: &Path) -> Self {
        let text = std::fs::read_to_string(listing).expect("the fixtures' listing");
        let mut lines = text.lines();
        let header: Vec<&str> = lines.next().expect("a header").split('\t').collect();
        let column = |name: &str| {
            let found = header.iter().position(|field| *field == name);
            found.unwrap_or_else(|| panic!("no column {name} in {header:?}"))
        };
        let (mtime, links, flags) = (column("mtime"), column("nlink_layer"), column("flags"));
        let mut truth = Self {
            times: Allowed::default(),
            links: BTreeMap::new(),
        };
        for line in lines {
            let fields: Vec<_> = line.split('\t').collect();
            let path = unescape(fields[0]);
            let whole = fields[mtime]
                .split_once('.')
                .is_none_or(|(_, nanos)| nanos.bytes().all(|digit| digit == b'0'));
            let implied = fields
                .get(flags)
                .is_some_and(|flags| flags.contains("implicit"));
            if implied || !whole {
                truth.times.implied.push(path.clone());
            }
            if let Ok(links) = fields[links].parse() {
                truth.links.insert(path, links);
            }
        }
        truth
    }

    fn differences(&self, unpacked: &Path, lazy: &Path) -> Vec<String> {
        let mut expected = list(unpacked).expect("the unpacked tree");
        let mut lazy = list(lazy).expect("the lazy tree");
        for (path, row) in &mut expected {
            if let Some(links) = self.links.get(path).filter(|_| row.nlink > 0) {
                row.nlink = *links;
            }
        }
        // Which of the layers' indexes and landmarks show depends on which are unpacked.
        for name in [
            "stargz.index.json",
            ".prefetch.landmark",
            ".no.prefetch.landmark",
        ] {
            expected.remove(Path::new(name));
            lazy.remove(Path::new(name));
        }
        differences(&expected, &lazy, &self.times)
    }
}

fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.trim_start_matches('/');
    while let Some((before, after)) = rest.split_once("\\x") {
        bytes.extend_from_slice(before.as_bytes());
        bytes.push(u8::from_str_radix(&after[..2], 16).expect("two hex digits"));
        rest = &after[2..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    std::ffi::OsString::from_vec(bytes).into()
}
