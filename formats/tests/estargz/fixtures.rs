//! Layers that other tools packed, converted: the result is proven, or says why it is not lazy.
//!
//! The layers are data of the interop fixtures (`SNAPSHOTTERD_FIXTURES`, else `shared/fixtures` of
//! the workspace), which not every checkout has.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use formats::{
    gzip::Inflater,
    limits::Limits,
    oci::{Compression, Index, Manifest, blob_path},
    proof::{Prover, Verdict},
    stargz::{TocError, WriterOptions, inflate_toc, parse_footer, parse_toc},
};
use skip::skip;

use crate::{
    identity::write,
    tars::{rows, unpack_leniently},
};

#[test]
fn converted_layers_are_proven_or_say_why_not() {
    let dir = std::env::var_os("SNAPSHOTTERD_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures"),
        PathBuf::from,
    );
    if !dir.join("oci/index.json").exists() {
        skip("the interop fixtures are not here");
        return;
    }
    let (mut proven, mut not_lazy) = (0, Vec::new());
    for layout in ["oci", "edge", "stargz"] {
        let dir = dir.join(layout);
        for blob in gzip_layers(&dir) {
            let tar = inflate(&fs::read(&blob).unwrap());
            match convert(&tar) {
                None => proven += 1,
                Some(reason) => not_lazy.push(reason),
            }
        }
    }
    assert!(proven >= 8, "{proven}");
    // The bottom layer has a name that is not UTF-8, in whatever form it was packed.
    assert!(!not_lazy.is_empty());
    assert!(not_lazy.iter().all(|reason| reason.contains("UTF-8")));
}

/// Converts a layer and checks the result. Returns why it is not lazy.
fn convert(tar: &[u8]) -> Option<String> {
    let options = WriterOptions {
        level: 1,
        ..WriterOptions::default()
    };
    let (blob, built) = write(tar, &options);
    let plain = inflate(&blob);
    let exact = |seconds: i64, nanos: u32| seconds * 1_000_000_000 + i64::from(nanos);
    let before = unpack_leniently(tar);
    assert_eq!(rows(&before, exact), rows(&unpack_leniently(&plain), exact));

    let limits = Limits::default();
    let footer = parse_footer(&blob, blob.len() as u64).unwrap();
    let start = usize::try_from(footer.toc_offset.0).unwrap();
    let json = inflate_toc(&blob[start..blob.len() - 51], &limits).unwrap();
    match (parse_toc(&json, footer.toc_offset, &limits), built.not_lazy) {
        (Ok(layer), None) => {
            let mut prover = Prover::new(&layer, built.diff_id, limits);
            prover.push(&plain, &mut |_, _| {});
            assert_eq!(prover.finish(), Verdict::Proven);
            None
        }
        (Err(TocError::NotLazy(_)), Some(reason)) => Some(reason.to_string()),
        (read, said) => panic!("reader: {:?}, writer: {said:?}", read.err()),
    }
}

fn gzip_layers(dir: &Path) -> BTreeSet<PathBuf> {
    let index = Index::parse(&fs::read(dir.join("index.json")).unwrap(), None).unwrap();
    let mut layers = BTreeSet::new();
    for image in &index.manifests {
        let manifest = fs::read(dir.join(blob_path(&image.digest))).unwrap();
        let manifest = Manifest::parse(&manifest, None).unwrap();
        for layer in manifest.layers {
            let gzip = layer
                .layer_type()
                .is_ok_and(|kind| kind.compression == Compression::Gzip);
            let path = dir.join(blob_path(&layer.digest));
            if gzip && path.exists() {
                layers.insert(path);
            }
        }
    }
    layers
}

fn inflate(blob: &[u8]) -> Vec<u8> {
    let mut inflater = Inflater::new(1 << 32);
    let mut plain = Vec::new();
    inflater
        .push(blob, &mut |bytes| plain.extend_from_slice(bytes))
        .unwrap();
    inflater.finish().unwrap();
    plain
}
