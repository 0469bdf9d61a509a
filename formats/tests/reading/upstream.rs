//! Layers made by stargz-snapshotter's tools, and plain ones, against the ground truth.

use formats::{
    gzip::Inflater,
    limits::Limits,
    proof::{Prover, Unprovable, Verdict},
    stargz::{
        FooterKind, MAX_FOOTER_LEN, NotLazyReason, StargzLayer, StartList, TocError, decode_chunk,
        inflate_toc, parse_footer, parse_toc, toc_mtime,
    },
    tar::{Event, Parser},
    tree::{Applied, Builder, Entry, Extent, InodeId, Kind, LayerTree, Mtime},
    units::{ChunkIdx, DecodedOffset},
};

use crate::{
    fixtures::{ImageLayout, Layer, root},
    listing::{Listing, assert_same, of_tree, truth},
};

fn limits() -> Limits {
    Limits::default()
}

/// Reads a layer from its blob as a daemon does from ranges of it.
pub(crate) fn open(blob: &[u8]) -> Result<StargzLayer, TocError> {
    let blob_len = blob.len() as u64;
    let tail = &blob[blob
        .len()
        .saturating_sub(usize::try_from(MAX_FOOTER_LEN).expect("small"))..];
    let footer = parse_footer(tail, blob_len).expect("a footer");
    assert_eq!(footer.kind, FooterKind::EStargz);
    let range = footer.toc_range(blob_len);
    let member = slice(blob, range);
    let json = inflate_toc(member, &limits())?;
    parse_toc(&json, footer.toc_offset, &limits())
}

/// All decoded bytes of the layer, every chunk decoded from exactly the range it names.
pub(crate) fn decode_all(layer: &StargzLayer, blob: &[u8]) -> Vec<u8> {
    let mut decoded = vec![0; usize::try_from(layer.map.decoded_len()).expect("fits")];
    let mut out = Vec::new();
    for chunk in layer.map.chunks() {
        let range = chunk.remote_range();
        let bytes = slice(blob, range);
        decode_chunk(bytes, chunk, &mut out).expect("a chunk");
        let at = usize::try_from(chunk.decoded.0).expect("fits");
        decoded[at..at + out.len()].copy_from_slice(&out);
    }
    decoded
}

fn slice(blob: &[u8], range: core::ops::Range<u64>) -> &[u8] {
    let fits = |offset| usize::try_from(offset).expect("fits");
    &blob[fits(range.start)..fits(range.end)]
}

pub(crate) fn inflate(blob: &[u8]) -> Vec<u8> {
    let mut inflater = Inflater::new(1 << 32);
    let mut out = Vec::new();
    inflater
        .push(blob, &mut |bytes| out.extend_from_slice(bytes))
        .expect("inflates");
    inflater.finish().expect("ends between members");
    out
}

pub(crate) fn content(tree: &LayerTree, decoded: &[u8], id: InodeId) -> Vec<u8> {
    let Kind::Regular(file) = &tree.inode(id).kind else {
        panic!("not a file");
    };
    let mut bytes = vec![0; usize::try_from(file.size).expect("fits")];
    for extent in &file.extents {
        let from = usize::try_from(extent.decoded.0).expect("fits");
        let to = usize::try_from(extent.file_offset).expect("fits");
        let len = usize::try_from(extent.len).expect("fits");
        bytes[to..to + len].copy_from_slice(&decoded[from..from + len]);
    }
    bytes
}

/// The truth as a TOC can hold it: times in whole seconds.
pub(crate) fn as_toc(mut rows: Listing) -> Listing {
    for row in rows.values_mut() {
        if let Some((seconds, nanos)) = row.mtime.split_once('.') {
            let kept = toc_mtime(Mtime {
                seconds: seconds.parse().expect("seconds"),
                nanos: nanos.parse().expect("nanos"),
            });
            row.mtime = format!("{}.{:09}", kept.seconds, kept.nanos);
        }
    }
    rows
}

fn prove(layer: &StargzLayer, source: &Layer) -> (Verdict, usize) {
    let mut prover = Prover::new(layer, source.diff_id, limits());
    let mut seen = vec![false; layer.map.chunks().len()];
    let mut sink = |index: ChunkIdx, bytes: &[u8]| {
        let chunk = layer.map.chunk(index).expect("a chunk of the layer");
        assert_eq!(bytes.len() as u64, u64::from(chunk.len));
        assert!(!seen[index.index()], "given twice");
        seen[index.index()] = true;
    };
    let mut inflater = Inflater::new(1 << 32);
    inflater
        .push(&source.blob, &mut |bytes| prover.push(bytes, &mut sink))
        .expect("inflates");
    let verdict = prover.finish();
    (verdict, seen.iter().filter(|seen| **seen).count())
}

#[test]
fn layers_made_by_ctr_remote() {
    let Some(root) = root() else { return };
    let images = ImageLayout::open(&root, "stargz");
    for tag in [
        "esgz-noopt",
        "esgz-landmark",
        "esgz-min50k",
        "esgz-chunk4096",
    ] {
        for (index, source) in images.layers(tag).iter().enumerate() {
            let what = format!("{tag} layer {}", index + 1);
            let opened = open(&source.blob);
            if index == 0 {
                // Its names hold bytes that are no UTF-8.
                assert!(
                    matches!(
                        opened,
                        Err(TocError::NotLazy(NotLazyReason::NotText { .. }))
                    ),
                    "{what}: {opened:?}"
                );
                continue;
            }
            let layer = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(Some(layer.toc_digest), source.toc_digest, "{what}");

            let decoded = decode_all(&layer, &source.blob);
            let expected = as_toc(truth(&root.join(format!("tree/layer-l{}.tsv", index + 1))));
            let actual = of_tree(&layer.tree, &|id| content(&layer.tree, &decoded, id));
            assert_same(&what, &expected, &actual);

            let (verdict, chunks) = prove(&layer, source);
            assert_eq!(verdict, Verdict::Proven, "{what}");
            assert_eq!(chunks, layer.map.chunks().len(), "{what}");
        }
    }
}

#[test]
fn start_lists_and_shared_members() {
    let Some(root) = root() else { return };
    let images = ImageLayout::open(&root, "stargz");
    for source in &images.layers("esgz-noopt")[1..] {
        assert_eq!(
            open(&source.blob).expect("opens").start_list,
            StartList::Nothing
        );
    }
    let lists: Vec<StartList> = images.layers("esgz-landmark")[1..]
        .iter()
        .map(|source| open(&source.blob).expect("opens").start_list)
        .collect();
    assert!(
        lists
            .iter()
            .any(|list| matches!(list, StartList::Until(end) if end.0 > 0)),
        "{lists:?}"
    );
    let shared = images.layers("esgz-min50k")[1..].iter().any(|source| {
        let layer = open(&source.blob).expect("opens");
        layer
            .map
            .chunks()
            .windows(2)
            .any(|pair| pair[0].remote == pair[1].remote && pair[1].inner > pair[0].inner)
    });
    assert!(shared, "min50k puts several files in a member");
}

#[test]
fn layers_that_are_not_lazy() {
    let Some(root) = root() else { return };
    let images = ImageLayout::open(&root, "stargz");
    for (tag, kind) in [
        ("legacy-crfs", FooterKind::Legacy),
        ("esgz-extoc", FooterKind::ExternalToc),
        ("esgz-keepdiff", FooterKind::ExternalToc),
    ] {
        for source in images.layers(tag) {
            let footer = parse_footer(&source.blob, source.blob.len() as u64).expect("a footer");
            assert_eq!(footer.kind, kind, "{tag}");
            assert!(footer.not_lazy().is_some());
        }
    }
    // The TOC of a legacy layer has digests of whole files at most.
    let legacy = &images.layers("legacy-crfs")[0].blob;
    let footer = parse_footer(legacy, legacy.len() as u64).expect("a footer");
    let range = footer.toc_range(legacy.len() as u64);
    let member = &legacy[usize::try_from(range.start).expect("fits")..];
    let json = inflate_toc(member, &limits()).expect("a TOC");
    assert!(matches!(
        parse_toc(&json, footer.toc_offset, &limits()),
        Err(TocError::NotLazy(_))
    ));
    let oci = ImageLayout::open(&root, "oci");
    for source in oci.layers("plain") {
        assert!(parse_footer(&source.blob, source.blob.len() as u64).is_err());
    }
}

/// Builds the tree of a plain tar and lists it with the payloads of its files.
pub(crate) fn list_tar(tar: &[u8]) -> (Listing, Option<NotLazyReason>) {
    let mut parser = Parser::new(limits());
    let mut builder = Builder::new(limits());
    let mut rest = tar;
    while let Some(event) = parser.next_event(&mut rest).expect("parses") {
        match event {
            Event::Entry(header) => {
                let applied = builder
                    .apply(Entry {
                        path: &header.path,
                        attrs: header.attrs(),
                        kind: header.entry_kind().expect("a known type"),
                    })
                    .expect("applies");
                // The tar itself is the address space.
                if let (Applied::Inode(id), 1..) = (applied, header.size) {
                    let extent = Extent {
                        file_offset: 0,
                        len: header.size,
                        decoded: DecodedOffset(header.payload_offset),
                    };
                    builder.set_extents(id, vec![extent]);
                }
            }
            Event::Payload { .. } | Event::EntryEnd | Event::End => {}
        }
    }
    parser.finish().expect("a complete archive");
    let irregular = builder.irregular().cloned();
    let tree = builder.finish();
    let rows = of_tree(&tree, &|id| content(&tree, tar, id));
    (rows, irregular)
}

#[test]
fn plain_tars_make_the_true_tree() {
    let Some(root) = root() else { return };
    for (index, source) in ImageLayout::open(&root, "oci")
        .layers("plain")
        .iter()
        .enumerate()
    {
        let what = format!("plain layer {}", index + 1);
        let (rows, irregular) = list_tar(&inflate(&source.blob));
        assert_same(
            &what,
            &truth(&root.join(format!("tree/layer-l{}.tsv", index + 1))),
            &rows,
        );
        assert_eq!(irregular.is_some(), index == 0, "{what}: {irregular:?}");
    }
}

#[test]
fn gzip_in_several_members() {
    let Some(root) = root() else { return };
    let oci = ImageLayout::open(&root, "oci");
    let plain = oci.layers("plain");
    for (mixed, plain) in oci.layers("mixed").iter().zip(&plain) {
        if mixed.blob.starts_with(&[0x1f, 0x8b]) {
            assert_eq!(mixed.diff_id, plain.diff_id);
            let tar = inflate(&mixed.blob);
            assert_eq!(formats::digest::Digest::of(&tar), plain.diff_id);
        }
    }
}

#[test]
fn edges_of_the_tar_format() {
    let Some(root) = root() else { return };
    let layers = ImageLayout::open(&root, "edge").layers("plain");
    let [first, second] = &layers[..] else {
        panic!("two layers");
    };
    let (mut rows, irregular) = list_tar(&inflate(&first.blob));
    assert_eq!(irregular, None);
    let (more, irregular) = list_tar(&inflate(&second.blob));
    assert!(matches!(irregular, Some(NotLazyReason::Duplicate { .. })));
    rows.extend(more);
    assert_same("edge", &truth(&root.join("tree/edge.tsv")), &rows);
}

/// A TOC with a name that was no UTF-8 is not lazy; were it served all the same, its own tar would
/// not refute it but say that nothing can be proven.
#[test]
fn a_tar_with_other_text_is_unprovable() {
    let Some(root) = root() else { return };
    let layers = ImageLayout::open(&root, "stargz").layers("esgz-noopt");
    let served = open(&layers[1].blob).expect("opens");
    let (verdict, _) = prove(&served, &layers[0]);
    assert!(
        matches!(
            verdict,
            Verdict::Unprovable(Unprovable::NotLazy(NotLazyReason::NotText { .. }))
        ),
        "{verdict:?}"
    );
    let (verdict, _) = prove(&served, &layers[2]);
    assert!(matches!(verdict, Verdict::Refuted(_)), "{verdict:?}");
}

/// Every tag is named by some test, so that new fixtures are not forgotten.
#[test]
fn all_fixtures_are_covered() {
    let Some(root) = root() else { return };
    let tags = ImageLayout::open(&root, "stargz").tags();
    let known = [
        "esgz-chunk4096",
        "esgz-extoc",
        "esgz-extoc-esgztoc",
        "esgz-keepdiff",
        "esgz-keepdiff-esgztoc",
        "esgz-landmark",
        "esgz-min50k",
        "esgz-noopt",
        "legacy-crfs",
    ];
    assert!(tags.iter().all(|tag| known.contains(&&**tag)), "{tags:?}");
}
