//! What was written is read back: the tree, every byte, and the tar archive around them.

use std::io::Cursor;

use formats::{
    digest::Digest,
    gzip::Inflater,
    limits::Limits,
    proof::{Prover, Verdict},
    stargz::{
        Built, StargzLayer, StartList, WriterOptions, build, decode_chunk, inflate_toc,
        parse_footer, parse_toc, toc_mtime,
    },
    tree::{Kind, Mtime},
};
use proptest::prelude::*;

use crate::tars::{archive, rows, tar, unpack};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_layer_is_read_back(
        (entries, prioritized) in archive(),
        chunk_size in prop_oneof![Just(4 << 20), 1..3000_u32],
        level in 0..=9_u8,
    ) {
        let tar = tar(&entries);
        let options = WriterOptions { chunk_size, level, prioritized };
        let (blob, built) = write(&tar, &options);
        prop_assert_eq!(&built.not_lazy, &None);
        prop_assert_eq!(&built.missing, &Vec::<Vec<u8>>::new());

        // The archive inside unpacks to the same tree and content.
        let plain = inflate(&blob);
        prop_assert_eq!(Digest::of(&plain), built.diff_id);
        let (tree, contents) = unpack(&tar);
        let (again, contents_again) = unpack(&plain);
        let exact = |seconds: i64, nanos: u32| seconds * 1_000_000_000 + i64::from(nanos);
        prop_assert_eq!(rows(&tree, exact), rows(&again, exact));
        prop_assert_eq!(&contents, &contents_again);

        // The TOC describes the same tree, with times rounded.
        let layer = open(&blob);
        prop_assert_eq!(layer.toc_digest, built.toc_digest);
        prop_assert_eq!(layer.toc_offset, built.toc_offset);
        let rounded = |seconds, nanos| toc_mtime(Mtime { seconds, nanos }).seconds;
        prop_assert_eq!(rows(&layer.tree, rounded), rows(&tree, rounded));
        let expected = built.start_list_end.map_or(StartList::Nothing, StartList::Until);
        prop_assert_eq!(layer.start_list, expected);
        prop_assert_eq!(built.start_list_end.is_some(), !options.prioritized.is_empty());

        // The prover agrees.
        let mut prover = Prover::new(&layer, built.diff_id, Limits::default());
        for piece in plain.chunks(1000) {
            prover.push(piece, &mut |_, _| {});
        }
        prop_assert_eq!(prover.finish(), Verdict::Proven);

        // Every byte comes out of its chunk.
        let data = decoded(&layer, &blob);
        for (path, content) in &contents {
            // Whiteouts are files in the archive only.
            let Some(id) = layer.tree.lookup(path) else { continue };
            let Kind::Regular(file) = &layer.tree.inode(id).kind else { continue };
            let mut read = Vec::new();
            for extent in &file.extents {
                let start = usize::try_from(extent.decoded.0).unwrap();
                read.extend_from_slice(&data[start..start + usize::try_from(extent.len).unwrap()]);
            }
            prop_assert_eq!(&read, content);
        }
        prop_assert_eq!(write(&plain, &options).0, blob, "a second conversion is the same");
    }
}

pub(crate) fn write(tar: &[u8], options: &WriterOptions) -> (Vec<u8>, Built) {
    let mut blob = Vec::new();
    let built = build(Cursor::new(tar), &mut blob, options, &Limits::default()).unwrap();
    assert_eq!(Digest::of(&blob), built.blob_digest);
    assert_eq!(blob.len() as u64, built.blob_len);
    (blob, built)
}

pub(crate) fn open(blob: &[u8]) -> StargzLayer {
    let limits = Limits::default();
    let footer = parse_footer(&blob[blob.len() - 51..], blob.len() as u64).unwrap();
    let range = footer.toc_range(blob.len() as u64);
    let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    let json = inflate_toc(&blob[range], &limits).unwrap();
    parse_toc(&json, footer.toc_offset, &limits).unwrap()
}

/// The decoded address space, every chunk verified.
fn decoded(layer: &StargzLayer, blob: &[u8]) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(layer.map.decoded_len()).unwrap()];
    let mut bytes = Vec::new();
    for chunk in layer.map.chunks() {
        let range = chunk.remote_range();
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        decode_chunk(&blob[range], chunk, &mut bytes).unwrap();
        let start = usize::try_from(chunk.decoded.0).unwrap();
        data[start..start + bytes.len()].copy_from_slice(&bytes);
    }
    data
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
