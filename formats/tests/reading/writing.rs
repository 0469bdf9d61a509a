//! What the crate's own writer makes of a tar, read back: the same tree, proven by its own stream.

use std::io::Cursor;

use formats::{
    digest::Digest,
    limits::Limits,
    proof::Verdict,
    stargz::{Built, StartList, TocError, WriteError, WriterOptions, build},
};
use proptest::prelude::*;

use crate::{
    fixtures::{ImageLayout, root},
    generate::models,
    listing::{Listing, of_tree},
    proving::judge,
    upstream::{as_toc, content, decode_all, inflate, list_tar, open},
};

fn write(tar: &[u8], options: &WriterOptions) -> Result<(Vec<u8>, Built), WriteError> {
    let mut blob = Vec::new();
    let built = build(Cursor::new(tar), &mut blob, options, &Limits::default())?;
    Ok((blob, built))
}

/// The rows of a tar as a TOC can hold them, without what a conversion leaves out.
fn expected(tar: &[u8]) -> Listing {
    let mut rows = as_toc(list_tar(tar).0);
    rows.retain(|path, _| !path.ends_with(".prefetch.landmark"));
    rows
}

/// Reads `blob` back: the listing of its tree, after everything that its writer said was checked.
fn read_back(blob: &[u8], built: &Built) -> Result<Listing, TocError> {
    let tar = inflate(blob);
    assert_eq!(built.blob_digest, Digest::of(blob));
    assert_eq!(built.blob_len, blob.len() as u64);
    assert_eq!(built.diff_id, Digest::of(&tar));
    assert_eq!(built.uncompressed_len, tar.len() as u64);
    let opened = open(blob);
    assert_eq!(
        built.not_lazy.is_some(),
        opened.is_err(),
        "{:?}",
        built.not_lazy
    );
    let layer = opened?;
    assert_eq!(layer.toc_digest, built.toc_digest);
    assert_eq!(layer.toc_offset, built.toc_offset);
    assert_eq!(
        layer.start_list,
        built
            .start_list_end
            .map_or(StartList::Nothing, StartList::Until)
    );
    assert_eq!(judge(&layer, &tar, 4096), Verdict::Proven);
    let decoded = decode_all(&layer, blob);
    Ok(of_tree(&layer.tree, &|id| {
        content(&layer.tree, &decoded, id)
    }))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn writer_then_reader_is_identity(
        model in models(),
        chunk_size in prop_oneof![Just(4096_u32), Just(4 << 20)],
        picked in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let body = model.build_stored().body;
        let tar = [&body[..], &[0; 1024]].concat();
        let options = WriterOptions {
            chunk_size,
            level: 1,
            prioritized: picked
                .iter()
                .map(|index| index.get(&model.items).path.clone().into_bytes())
                .collect(),
        };
        match write(&tar, &options) {
            Ok((blob, built)) => {
                let rows = read_back(&blob, &built).expect("lazy");
                prop_assert_eq!(rows, expected(&tar));
            }
            // Moving an entry in front of others may change what hard links leave behind.
            Err(WriteError::Order) => prop_assert!(!options.prioritized.is_empty()),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn plain_layers_are_converted() {
    let Some(root) = root() else { return };
    for (index, source) in ImageLayout::open(&root, "oci")
        .layers("plain")
        .iter()
        .enumerate()
    {
        let tar = inflate(&source.blob);
        let (blob, built) = write(&tar, &WriterOptions::default()).expect("converts");
        match read_back(&blob, &built) {
            Ok(rows) => assert_eq!(rows, expected(&tar)),
            Err(TocError::NotLazy(_)) => assert_eq!(index, 0),
            Err(error) => panic!("layer {}: {error}", index + 1),
        }
    }
}
