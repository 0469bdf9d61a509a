//! From the chunks of a TOC to the decoded address space.
//!
//! Files come in the order of their bytes in the blob, each at the next 4096-aligned decoded
//! offset, so decoded order is remote order and a sequential read of the blob fills the decoded
//! space from front to back.

use crate::{
    blobmap::{BlobMap, Chunk},
    digest::Digest,
    tree::{Extent, InodeId},
    units::{DecodedOffset, RemoteOffset},
};

/// Files start at multiples of this in the decoded address space.
const ALIGNMENT: u64 = 4096;

/// A chunk as the TOC has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawChunk {
    pub(super) remote: u64,
    pub(super) inner: u64,
    pub(super) file_offset: u64,
    pub(super) len: u32,
    pub(super) digest: Digest,
}

/// A non-empty regular file of the TOC: consecutive chunks that tile it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawFile {
    /// `None` for what has bytes in the blob but no place in the tree (landmarks, whiteouts).
    pub(super) inode: Option<InodeId>,
    /// Index of its entry in the TOC.
    pub(super) entry: u32,
    pub(super) size: u64,
    pub(super) first_chunk: usize,
    pub(super) chunk_count: usize,
}

/// Why chunks cannot be laid out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LayoutError {
    /// Index of the entry at fault in the TOC.
    pub(super) entry: u32,
    pub(super) inode: Option<InodeId>,
    /// A chunk starts before the one in front of it ends; otherwise the decoded address space is
    /// larger than the limit.
    pub(super) overlaps: bool,
}

impl LayoutError {
    fn new(file: &RawFile, overlaps: bool) -> Self {
        Self {
            entry: file.entry,
            inode: file.inode,
            overlaps,
        }
    }
}

pub(super) struct Layout {
    pub(super) map: BlobMap,
    pub(super) extents: Vec<(InodeId, Extent)>,
}

/// Lays `files` out; `end` is where the TOC starts, and every chunk starts before it.
pub(super) fn lay_out(
    mut files: Vec<RawFile>,
    raw: &[RawChunk],
    end: u64,
    max_decoded: u64,
) -> Result<Layout, LayoutError> {
    let position = |file: &RawFile| {
        let first = &raw[file.first_chunk];
        (first.remote, first.inner)
    };
    if !files.is_sorted_by_key(position) {
        files.sort_by_key(position);
    }

    let mut chunks = Vec::with_capacity(raw.len());
    let mut hidden = Vec::new();
    let mut extents = Vec::with_capacity(files.len());
    let mut decoded_end = 0_u64;
    // Where the chunk before ends: member and decoded offset inside it.
    let mut previous = (0, 0);
    for file in &files {
        let base = decoded_end;
        for chunk in &raw[file.first_chunk..file.first_chunk + file.chunk_count] {
            if (chunk.remote, chunk.inner) < previous {
                return Err(LayoutError::new(file, true));
            }
            previous = (
                chunk.remote,
                chunk.inner.saturating_add(u64::from(chunk.len)),
            );
            if file.inode.is_none() {
                hidden.push(chunk.remote);
                continue;
            }
            chunks.push(Chunk {
                decoded: DecodedOffset(base + chunk.file_offset),
                len: chunk.len,
                remote: RemoteOffset(chunk.remote),
                remote_end: RemoteOffset(end),
                inner: chunk.inner,
                digest: chunk.digest,
            });
        }
        let Some(inode) = file.inode else { continue };
        decoded_end = base
            .checked_add(file.size)
            .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
            .filter(|end| *end <= max_decoded)
            .ok_or_else(|| LayoutError::new(file, false))?;
        extents.push((
            inode,
            Extent {
                file_offset: 0,
                len: file.size,
                decoded: DecodedOffset(base),
            },
        ));
    }
    bound_members(&mut chunks, &hidden, end);
    // Sorted, without overlap and within `decoded_end` as they were made, so this only refuses a
    // number of chunks that is no u32.
    let map = BlobMap::new(chunks, decoded_end).ok_or(LayoutError {
        entry: 0,
        inode: None,
        overlaps: false,
    })?;
    Ok(Layout { map, extents })
}

/// Sets where the member of each chunk ends at the latest: at the next offset that anything in the
/// TOC starts at. `chunks` and `hidden` are sorted.
fn bound_members(chunks: &mut [Chunk], hidden: &[u64], end: u64) {
    let mut hidden = hidden.iter().rev().copied().peekable();
    // The nearest known start behind the chunk at hand, and the start of the chunk behind it.
    let mut next = end;
    let mut behind = end;
    for chunk in chunks.iter_mut().rev() {
        if chunk.remote.0 < behind {
            next = behind;
        }
        while let Some(start) = hidden.next_if(|start| *start > chunk.remote.0) {
            next = next.min(start);
        }
        behind = chunk.remote.0;
        chunk.remote_end = RemoteOffset(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(remote: u64, inner: u64, file_offset: u64, len: u32) -> RawChunk {
        RawChunk {
            remote,
            inner,
            file_offset,
            len,
            digest: Digest::of(b""),
        }
    }

    fn file(inode: Option<u32>, size: u64, first_chunk: usize, chunk_count: usize) -> RawFile {
        RawFile {
            inode: inode.map(InodeId),
            entry: 0,
            size,
            first_chunk,
            chunk_count,
        }
    }

    #[test]
    fn remote_order_and_member_ends() {
        let raw = [
            chunk(500, 0, 0, 10),
            chunk(100, 512, 0, 5000),
            chunk(200, 0, 5000, 1),
            chunk(300, 0, 0, 1),
            chunk(100, 9999, 0, 3),
        ];
        // The last file shares the member at 100 with the second and must come before 200.
        let files = vec![file(Some(1), 10, 0, 1), file(Some(2), 5000, 1, 1)];
        let layout = lay_out(files, &raw, 1000, 1 << 20).expect("lays out");
        assert_eq!(layout.map.decoded_len(), 8192 + 4096);
        assert_eq!(layout.extents[0].0, InodeId(2));
        assert_eq!(layout.map.chunks()[0].remote_range(), 100..500);
        assert_eq!(layout.map.chunks()[1].remote_range(), 500..1000);

        let files = vec![
            file(Some(1), 10, 0, 1),
            file(Some(2), 5001, 1, 2),
            file(None, 1, 3, 1),
        ];
        let layout = lay_out(files, &raw, 1000, 1 << 20).expect("lays out");
        let ranges: Vec<_> = layout
            .map
            .chunks()
            .iter()
            .map(Chunk::remote_range)
            .collect();
        assert_eq!(ranges, [100..200, 200..300, 500..1000]);

        let shared = vec![file(Some(1), 5000, 1, 1), file(Some(2), 3, 4, 1)];
        let layout = lay_out(shared, &raw, 1000, 1 << 20).expect("lays out");
        let ranges: Vec<_> = layout
            .map
            .chunks()
            .iter()
            .map(Chunk::remote_range)
            .collect();
        assert_eq!(ranges, [100..1000, 100..1000]);

        let tangled = vec![file(Some(1), 5001, 1, 2), file(Some(2), 3, 4, 1)];
        assert!(matches!(
            lay_out(tangled, &raw, 1000, 1 << 20),
            Err(LayoutError { overlaps: true, .. })
        ));
        let large = vec![file(Some(1), 5001, 1, 2)];
        assert!(matches!(
            lay_out(large, &raw, 1000, 4096),
            Err(LayoutError {
                overlaps: false,
                ..
            })
        ));
    }
}
