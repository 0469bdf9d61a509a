//! Generated layers: their blobs read back, and their own tars prove them.

use formats::{
    digest::Digest,
    limits::Limits,
    proof::{Attribute, Prover, Unprovable, Verdict},
    stargz::{NotLazyReason, StargzLayer, parse_footer, parse_toc},
    tree::Kind,
    units::ChunkIdx,
};
use proptest::prelude::*;

use crate::{
    generate::{Built, Item, ItemKind, Model, models},
    upstream::{decode_all, inflate, open},
};

/// Parses the TOC of a built layer.
pub(crate) fn served(built: &Built) -> StargzLayer {
    let footer = parse_footer(&built.blob, built.blob.len() as u64).expect("a footer");
    parse_toc(&built.toc, footer.toc_offset, &Limits::default())
        .unwrap_or_else(|error| panic!("{error}"))
}

/// The verdict over `tar`, pushed in steps of `step` bytes, claimed under its own digest.
pub(crate) fn judge(layer: &StargzLayer, tar: &[u8], step: usize) -> Verdict {
    let mut prover = Prover::new(layer, Digest::of(tar), Limits::default());
    for piece in tar.chunks(step) {
        prover.push(piece, &mut |_, _| {});
    }
    prover.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_is_read_back_and_proven(model in models(), step in 1..2000_usize) {
        let built = model.build();
        let layer = open(&built.blob).expect("opens");
        let tar = built.tar_with(&built.toc);
        prop_assert_eq!(&inflate(&built.blob), &tar);
        prop_assert_eq!(layer.toc_digest, Digest::of(&built.toc));

        // Every file has the bytes of its item.
        let decoded = decode_all(&layer, &built.blob);
        for item in &model.items {
            let found = layer.tree.lookup(item.path.as_bytes());
            if let (ItemKind::File(bytes), Some(id)) = (&item.kind, found) {
                let Kind::Regular(file) = &layer.tree.inode(id).kind else {
                    panic!("{}: not a file", item.path);
                };
                prop_assert_eq!(file.size, bytes.len() as u64);
                if let [extent] = file.extents[..] {
                    prop_assert_eq!(extent.decoded.0 % 4096, 0);
                    let at = usize::try_from(extent.decoded.0).expect("fits");
                    prop_assert_eq!(&decoded[at..at + bytes.len()], &bytes[..]);
                } else {
                    prop_assert!(bytes.is_empty());
                }
            }
        }

        // The pass gives every chunk once, with the bytes that decoding gives.
        let mut prover = Prover::new(&layer, Digest::of(&tar), Limits::default());
        let mut filled = vec![0; decoded.len()];
        let mut count = 0;
        let mut sink = |index: ChunkIdx, bytes: &[u8]| {
            let at = usize::try_from(layer.map.chunk(index).expect("known").decoded.0).expect("fits");
            filled[at..at + bytes.len()].copy_from_slice(bytes);
            count += 1;
        };
        for piece in tar.chunks(step) {
            prover.push(piece, &mut sink);
        }
        prop_assert_eq!(prover.finish(), Verdict::Proven);
        prop_assert_eq!(count, layer.map.chunks().len());
        prop_assert_eq!(filled, decoded);
    }

    /// A tar that is not the one of the DiffID is refuted whatever else it is.
    #[test]
    fn another_diff_id_is_refuted(model in models(), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let built = model.build();
        let layer = served(&built);
        let mut tar = built.tar_with(&built.toc);
        let diff_id = Digest::of(&tar);
        let at = at.index(tar.len());
        tar[at] ^= 1 << bit;
        let mut prover = Prover::new(&layer, diff_id, Limits::default());
        prover.push(&tar, &mut |_, _| {});
        let Verdict::Refuted(mismatches) = prover.finish() else {
            panic!("not refuted");
        };
        prop_assert!(mismatches.iter().any(|mismatch| mismatch.attribute == Attribute::DiffId));
    }
}

fn model(items: Vec<Item>) -> Model {
    Model {
        items,
        chunk_size: 4096,
        share_members_below: 0,
    }
}

#[test]
fn what_the_tar_alone_holds_is_unprovable() {
    let file = |path: &str| Item::new(path, ItemKind::File(b"bytes".to_vec()));
    let plain = model(vec![file("a"), file("b")]).build();
    let layer = served(&plain);
    let twice = model(vec![file("a"), file("b"), file("a")]).build();
    assert!(matches!(
        judge(&layer, &twice.tar_with(&plain.toc), 512),
        Verdict::Unprovable(Unprovable::NotLazy(NotLazyReason::Duplicate { .. }))
    ));
    let mut sparse = file("b");
    sparse.xattrs.clear();
    let mut built = model(vec![file("a"), sparse]).build();
    // Turn the second entry into an old GNU sparse file.
    let header = built.body.len() - 1024;
    built.body[header + 156] = b'S';
    reseal(&mut built.body[header..header + 512]);
    assert!(matches!(
        judge(&layer, &built.tar_with(&plain.toc), 512),
        Verdict::Unprovable(Unprovable::NotLazy(NotLazyReason::Sparse { .. }))
    ));
    built.body[header + 156] = b'7';
    reseal(&mut built.body[header..header + 512]);
    assert!(matches!(
        judge(&layer, &built.tar_with(&plain.toc), 512),
        Verdict::Unprovable(Unprovable::NotLazy(NotLazyReason::UnknownType { .. }))
    ));
    let torn = &plain.tar_with(&plain.toc)[..700];
    assert!(matches!(
        judge(&layer, torn, 512),
        Verdict::Unprovable(Unprovable::Tar(_))
    ));
    let mut damaged = plain.tar_with(&plain.toc);
    damaged[1024] = b'!';
    assert!(matches!(
        judge(&layer, &damaged, 512),
        Verdict::Unprovable(Unprovable::Tar(_))
    ));
}

fn reseal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

/// What a TOC does not hold, or holds differently, is no disagreement.
#[test]
fn honest_differences_are_none() {
    let mut rounded = Item::new("rounded", ItemKind::File(b"x".to_vec()));
    rounded.mtime.nanos = 700_000_000;
    let mut early = Item::new("early", ItemKind::Dir);
    early.mtime.seconds = -1;
    early.mtime.nanos = 700_000_000;
    let mut root = Item::new("./", ItemKind::Dir);
    root.mode = 0o700;
    let built = model(vec![
        root,
        Item::new(".no.prefetch.landmark", ItemKind::File(vec![0x0f])),
        rounded,
        early,
        Item::new("empty", ItemKind::File(Vec::new())),
        Item::new("gone/.wh.x", ItemKind::File(Vec::new())),
    ])
    .build();
    let layer = served(&built);
    assert_eq!(
        judge(&layer, &built.tar_with(&built.toc), 100),
        Verdict::Proven
    );
    // Without end blocks, without the TOC (as where it is stored elsewhere).
    assert_eq!(judge(&layer, &built.body, 100), Verdict::Proven);
    // Another file of the TOC's name is not the TOC.
    assert!(matches!(
        judge(&layer, &built.tar_with(b"{}"), 100),
        Verdict::Refuted(_)
    ));
}
