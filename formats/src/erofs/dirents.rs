//! Directory blocks.
//!
//! A block holds its entries' fixed parts, then their names in the same order. Entries are sorted
//! by name over the whole directory, `.` and `..` among them. The first entry's name offset tells
//! how many there are; the last name ends at the end of the directory or at a NUL.

use super::layout::{BLOCK, BLOCK_LEN, DIRENT_LEN, u16_at, u64_at};

/// One entry to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a, T> {
    pub(super) name: &'a [u8],
    pub(super) target: T,
}

/// How a directory's entries spread over blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Index of the first entry of every block.
    pub(super) starts: Vec<usize>,
    /// Bytes used of the last block.
    pub(super) last_len: usize,
}

impl Blocks {
    /// Fills blocks in order. `entries` is sorted and not empty; names are at most 255 bytes.
    pub(super) fn fill<T>(entries: &[Entry<'_, T>]) -> Self {
        let mut starts = vec![0];
        let mut used = 0;
        for (index, entry) in entries.iter().enumerate() {
            let len = DIRENT_LEN + entry.name.len();
            if used + len > BLOCK_LEN {
                starts.push(index);
                used = 0;
            }
            used += len;
        }
        Self {
            starts,
            last_len: used,
        }
    }

    /// Size of the directory in bytes.
    pub(super) fn size(&self) -> u64 {
        (self.starts.len() as u64 - 1) * BLOCK + self.last_len as u64
    }

    /// Range of the entries of block `index`.
    pub(super) fn entries(&self, index: usize, total: usize) -> core::ops::Range<usize> {
        let end = self.starts.get(index + 1).copied().unwrap_or(total);
        self.starts[index]..end
    }
}

/// Writes one block's entries to the start of `out`. `resolve` gives number and type.
pub(super) fn encode<T: Copy>(
    entries: &[Entry<'_, T>],
    out: &mut [u8],
    mut resolve: impl FnMut(T) -> (u64, u8),
) {
    let mut name_at = entries.len() * DIRENT_LEN;
    for (entry, at) in entries.iter().zip((0..).step_by(DIRENT_LEN)) {
        let (nid, file_type) = resolve(entry.target);
        out[at..at + 8].copy_from_slice(&nid.to_le_bytes());
        // Offsets stay below the block length, 4096.
        let offset = u16::try_from(name_at).unwrap_or(u16::MAX);
        out[at + 8..at + 10].copy_from_slice(&offset.to_le_bytes());
        out[at + 10] = file_type;
        let name_end = name_at + entry.name.len();
        out[name_at..name_end].copy_from_slice(entry.name);
        name_at = name_end;
    }
}

/// An entry as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Takes one block apart. Yields `None` where it is not well-formed, and ends there.
pub(super) fn decode(block: &[u8]) -> impl Iterator<Item = Option<Read<'_>>> {
    let names_at = usize::from(u16_at(block, 8).unwrap_or(0));
    let valid =
        names_at >= DIRENT_LEN && names_at.is_multiple_of(DIRENT_LEN) && names_at < block.len();
    let count = if valid { names_at / DIRENT_LEN } else { 1 };
    let mut failed = false;
    (0..count).map_while(move |index| {
        if failed {
            return None;
        }
        let read = if valid {
            decode_one(block, index, count)
        } else {
            None
        };
        failed = read.is_none();
        Some(read)
    })
}

fn decode_one(block: &[u8], index: usize, count: usize) -> Option<Read<'_>> {
    let at = index * DIRENT_LEN;
    let start = usize::from(u16_at(block, at + 8)?);
    let name = if index + 1 < count {
        let end = usize::from(u16_at(block, at + DIRENT_LEN + 8)?);
        block.get(start..end)?
    } else {
        let rest = block.get(start..)?;
        let end = rest.iter().position(|byte| *byte == 0);
        &rest[..end.unwrap_or(rest.len())]
    };
    if name.is_empty() || start < count * DIRENT_LEN {
        return None;
    }
    Some(Read {
        name,
        nid: u64_at(block, at)?,
        file_type: block[at + 10],
    })
}
