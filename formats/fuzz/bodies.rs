//! What the fuzz targets do with their input. Shared with the plain test that runs the same over
//! seeds, so nothing here knows a fuzzer.

use formats::{
    blobmap::{BlobMap, Chunk},
    digest::Digest,
    erofs,
    gzip::{GzipError, Inflater, decode_member},
    limits::Limits,
    oci::{Document, HostPlatform, ImageConfig, Index, Manifest, OciLayout},
    proof::{Prover, Verdict},
    stargz::{
        MAX_FOOTER_LEN, StargzLayer, StartList, decode_chunk, inflate_toc, parse_footer, parse_toc,
    },
    tar::{Event, Parser, TarError},
    tree::{Builder, Entry, InodeId, Kind, LayerTree},
    units::{DecodedOffset, RemoteOffset},
};

/// Small, so that passing them is cheap to find.
const LIMITS: Limits = Limits {
    max_index_bytes: 1 << 20,
    max_entries: 1000,
    max_path_bytes: 1000,
    max_depth: 64,
    max_chunk_bytes: 1 << 16,
    max_member_bytes: 1 << 20,
    max_xattr_bytes: 1000,
    max_extension_bytes: 1 << 14,
    max_decoded_bytes: 1 << 30,
};

/// A tar stream: the same events in any steps, and whatever its entries are, a sound tree.
pub(super) fn tar(data: &[u8]) {
    let (whole, result) = tar_events(data, usize::MAX);
    for step in [1, 513] {
        let (split, split_result) = tar_events(data, step);
        assert_eq!(split_result, result, "in steps of {step}");
        assert_eq!(split, whole, "in steps of {step}");
    }
    let mut builder = Builder::new(LIMITS);
    for event in &whole {
        if let Event::Entry(header) = event
            && let Some(kind) = header.entry_kind()
        {
            // What does not apply is left out; the tree stays sound.
            let _ = builder.apply(Entry {
                path: &header.path,
                attrs: header.attrs(),
                kind,
            });
        }
    }
    check_tree(&builder.finish());
}

/// The events of a stream, neighbouring payload pieces joined, and how it ended.
fn tar_events(data: &[u8], step: usize) -> (Vec<Event<'static>>, Result<(), TarError>) {
    let mut parser = Parser::new(LIMITS);
    let mut events = Vec::new();
    let mut sizes = 0_u64;
    for mut piece in data.chunks(step.min(data.len().max(1))) {
        loop {
            match parser.next_event(&mut piece) {
                Ok(None) => break,
                Ok(Some(Event::Payload { position, bytes })) => {
                    assert_eq!(position, sizes);
                    assert!(!bytes.is_empty());
                    sizes += bytes.len() as u64;
                }
                Ok(Some(Event::Entry(header))) => {
                    sizes = 0;
                    events.push(Event::Entry(header));
                }
                Ok(Some(Event::EntryEnd)) => events.push(Event::EntryEnd),
                Ok(Some(Event::End)) => events.push(Event::End),
                Err(error) => return (events, Err(error)),
            }
        }
        assert!(piece.is_empty());
    }
    (events, parser.finish())
}

/// The last bytes of a blob.
pub(super) fn footer(data: &[u8]) {
    let blob_len = data.len() as u64;
    if let Ok(footer) = parse_footer(data, blob_len) {
        let range = footer.toc_range(blob_len);
        assert!(range.start <= range.end && range.end <= blob_len);
        assert!(footer.footer_len <= MAX_FOOTER_LEN);
    }
    let tail = &data[data.len().saturating_sub(51)..];
    assert_eq!(parse_footer(tail, blob_len), parse_footer(data, blob_len));
    let _ = parse_footer(data, u64::MAX);
}

/// A TOC: as JSON, and as the member that holds one.
pub(super) fn toc(data: &[u8]) {
    if let Ok(json) = inflate_toc(data, &LIMITS) {
        toc_json(&json);
    }
    toc_json(data);
}

fn toc_json(json: &[u8]) {
    let toc_offset = RemoteOffset(1 << 20);
    let Ok(layer) = parse_toc(json, toc_offset, &LIMITS) else {
        return;
    };
    assert_eq!(layer.toc_digest, Digest::of(json));
    check_tree(&layer.tree);
    check_map(&layer);
    if let StartList::Until(end) = layer.start_list {
        assert!(end < toc_offset);
    }
    if let Ok(image) = erofs::write(&layer.tree, layer.map.decoded_len()) {
        let image = erofs::Image::open(&image).expect("an image of ours");
        image.tree(&LIMITS).expect("an image of ours");
    }
}

/// Files tile their chunks, chunks follow each other in both spaces and end in front of the TOC.
fn check_map(layer: &StargzLayer) {
    let (mut decoded, mut remote) = (0, (0, 0));
    for chunk in layer.map.chunks() {
        assert!(chunk.decoded.0 >= decoded);
        decoded = chunk.decoded_range().end;
        assert!((chunk.remote.0, chunk.inner) >= remote);
        remote = (chunk.remote.0, chunk.inner + u64::from(chunk.len));
        assert!(chunk.remote < chunk.remote_end && chunk.remote_end <= layer.toc_offset);
        assert!(chunk.len > 0 && chunk.len <= LIMITS.max_chunk_bytes);
    }
    assert!(decoded <= layer.map.decoded_len());
    for inode in layer.tree.inodes() {
        let Kind::Regular(file) = &inode.kind else {
            continue;
        };
        let covered: u64 = file.extents.iter().map(|extent| extent.len).sum();
        assert_eq!(covered, file.size);
        for extent in &file.extents {
            assert_eq!(extent.decoded.0 % 4096, 0);
            let range = extent.decoded.0..extent.decoded.0 + extent.len;
            let chunks = layer.map.overlapping(range);
            let tiled: u64 = layer.map.chunks()[chunks]
                .iter()
                .map(|chunk| u64::from(chunk.len))
                .sum();
            assert_eq!(tiled, extent.len);
        }
    }
}

/// Every inode can be reached, by as many names as it says, and no name is one that cannot be.
fn check_tree(tree: &LayerTree) {
    let mut names = vec![0_u32; tree.inodes().len()];
    let mut queue = vec![(InodeId::ROOT, 0)];
    names[0] = 2;
    while let Some((id, depth)) = queue.pop() {
        assert!(depth <= LIMITS.max_depth);
        let directory = tree.directory(id).expect("only directories are queued");
        for (name, child) in &directory.entries {
            assert!(!name.is_empty() && name.len() <= 255);
            assert!(!name.contains(&b'/') && !name.contains(&0));
            assert!(name != b"." && name != b".." && !name.starts_with(b".wh."));
            if tree.directory(*child).is_some() {
                names[child.index()] += 2;
                names[id.index()] += 1;
                queue.push((*child, depth + 1));
            } else {
                names[child.index()] += 1;
            }
        }
    }
    for (inode, names) in tree.inodes().iter().zip(names) {
        assert_eq!(inode.nlink, names);
        assert!(inode.attrs.mode <= 0o7777);
        assert!(inode.attrs.mtime.nanos < 1_000_000_000 && inode.attrs.mtime.seconds >= 0);
    }
}

/// A gzip stream: the same bytes in any steps, bounded, and any stretch of it.
pub(super) fn gzip(data: &[u8]) {
    let (whole, result) = inflate(data, usize::MAX, 1 << 16);
    for (step, room) in [(1, 4096), (7, 3)] {
        let (split, split_result) = inflate(data, step, room);
        if result.is_ok() || split_result.is_ok() {
            assert_eq!(split_result, result);
            assert_eq!(split, whole);
        }
    }
    if result.is_ok() {
        let skip = whole.len() / 3;
        let mut out = vec![0; (whole.len() - skip) / 2];
        decode_member(data, skip as u64, &mut out).expect("a stretch of a good stream");
        assert_eq!(out, whole[skip..skip + out.len()]);
    }
}

fn inflate(data: &[u8], step: usize, room: usize) -> (Vec<u8>, Result<(), GzipError>) {
    let mut inflater = Inflater::new(1 << 18);
    let mut out = Vec::new();
    let mut buffer = vec![0; room];
    for mut piece in data.chunks(step.min(data.len().max(1))) {
        loop {
            let progress = match inflater.inflate(piece, &mut buffer) {
                Ok(progress) => progress,
                Err(error) => return (out, Err(error)),
            };
            piece = &piece[progress.consumed..];
            out.extend_from_slice(&buffer[..progress.produced]);
            if progress.produced == 0 && piece.is_empty() {
                break;
            }
        }
    }
    assert_eq!(inflater.produced(), out.len() as u64);
    (out, inflater.finish())
}

/// A chunk: two bytes of inner offset, two of length, then the compressed bytes.
pub(super) fn chunk(data: &[u8]) {
    let Some((head, compressed)) = data.split_first_chunk::<4>() else {
        return;
    };
    let inner = u64::from(u16::from_le_bytes([head[0], head[1]]));
    let len = u32::from(u16::from_le_bytes([head[2], head[3]])) + 1;
    let mut expected = vec![0; len as usize];
    let digest = match decode_member(compressed, inner, &mut expected) {
        Ok(()) => Digest::of(&expected),
        Err(_) => Digest::of(b""),
    };
    let chunk = Chunk {
        decoded: DecodedOffset(0),
        len,
        remote: RemoteOffset(0),
        remote_end: RemoteOffset(compressed.len() as u64),
        inner,
        digest,
    };
    let mut out = vec![1, 2, 3];
    match decode_chunk(compressed, &chunk, &mut out) {
        Ok(()) => assert_eq!(out, expected),
        Err(_) => assert!(out.is_empty()),
    }
    let wrong = Chunk {
        digest: Digest::of(b"something else"),
        ..chunk
    };
    assert!(decode_chunk(compressed, &wrong, &mut out).is_err());
    assert!(out.is_empty());
}

/// A tar against an empty layer: proven only if it makes an empty tree.
pub(super) fn proof(data: &[u8]) {
    let layer = StargzLayer {
        tree: LayerTree::empty(),
        map: BlobMap::default(),
        start_list: StartList::None,
        toc_offset: RemoteOffset(0),
        toc_digest: Digest::of(b"{}"),
    };
    let mut prover = Prover::new(&layer, Digest::of(data), LIMITS);
    for piece in data.chunks(700) {
        prover.push(piece, &mut |_, _| panic!("the layer has no chunks"));
    }
    let doomed = prover.doomed().is_some();
    let verdict = prover.finish();
    assert!(!doomed || matches!(verdict, Verdict::Unprovable(_)));
    let mut prover = Prover::new(&layer, Digest::of(b"another tar"), LIMITS);
    prover.push(data, &mut |_, _| {});
    if data != b"another tar" {
        assert!(matches!(prover.finish(), Verdict::Refuted(_)));
    }
}

/// An EROFS image.
pub(super) fn erofs(data: &[u8]) {
    let mut data = data.to_vec();
    if let Some(features) = data.get_mut(1024 + 8) {
        // Without the checksum, damage reaches what lies behind it.
        *features &= !1;
    }
    let Ok(image) = erofs::Image::open(&data) else {
        return;
    };
    let _ = (image.uuid(), image.inode_count());
    let Ok(tree) = image.tree(&LIMITS) else {
        return;
    };
    // Whatever was read can be walked, and either written again or refused.
    for id in 0..tree.inodes().len() {
        let id = InodeId(u32::try_from(id).expect("bounded by the limits"));
        let _ = tree.directory(id);
    }
    let _ = tree.implied_directories();
    let device_len = image.device_len().unwrap_or(0).max(1 << 40);
    if let Ok(again) = erofs::write(&tree, device_len) {
        let again = erofs::Image::open(&again).expect("what we write opens");
        let read = again.tree(&LIMITS).expect("what we write is read");
        assert_eq!(read.inodes().len(), tree.inodes().len());
    }
}

/// An image document: what was read is written and read again.
pub(super) fn oci(data: &[u8]) {
    match Document::parse(data, None) {
        Ok(Document::Manifest(manifest)) => {
            let again = Manifest::parse(&manifest.to_json(), None).expect("what we write is read");
            assert_eq!(again, manifest);
            for layer in &manifest.layers {
                let _ = (layer.layer_type(), layer.toc_digest());
            }
        }
        Ok(Document::Index(index)) => {
            let again = Index::parse(&index.to_json(), None).expect("what we write is read");
            assert_eq!(again, index);
            let _ = index.choose(&HostPlatform::current());
        }
        Err(_) => {}
    }
    if let Ok(config) = ImageConfig::parse(data) {
        let again = ImageConfig::parse(&config.to_json()).expect("what we write is read");
        assert_eq!(again, config);
    }
    let _ = OciLayout::parse(data);
}
