//! Chunk addresses of regular files.
//!
//! A chunk is a power of two of blocks, at most 2^31 of them. All chunks of a file have the same
//! size, each has one address on the device or is a hole. A file whose bytes lie in one stretch
//! gets one chunk that covers it all.

use super::{
    layout::{BLOCK, BLOCK_BITS, CHUNK_BITS_MASK, CHUNK_INDEX_LEN, NULL_BLOCK},
    writer::InodeProblem,
};
use crate::tree::{Extent, Regular};

/// How a file is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// log2 of the blocks of a chunk.
    pub(super) bits: u32,
    /// Chunks of the file.
    pub(super) count: u64,
}

impl Shape {
    /// Chooses the largest chunks that have every extent of `file` begin and end at their borders,
    /// and checks the extents.
    pub(super) fn of(file: &Regular, device_len: u64) -> Result<Self, InodeProblem> {
        let mut borders = 0;
        let mut end = 0;
        for extent in merged(&file.extents) {
            let stop = extent.file_offset.checked_add(extent.len);
            let device_stop = extent.decoded.0.checked_add(extent.len);
            let (Some(stop), Some(device_stop)) = (stop, device_stop) else {
                return Err(InodeProblem::Extents);
            };
            if extent.len == 0 || extent.file_offset < end || stop > file.size {
                return Err(InodeProblem::Extents);
            }
            if device_stop > device_len {
                return Err(InodeProblem::BeyondDevice {
                    end: device_stop,
                    device_len,
                });
            }
            let inner_stop = if stop == file.size { 0 } else { stop };
            if (extent.file_offset | extent.decoded.0 | inner_stop) % BLOCK != 0 {
                return Err(InodeProblem::Unaligned {
                    offset: extent.file_offset,
                });
            }
            borders |= extent.file_offset | inner_stop;
            end = stop;
        }
        let blocks = file.size.div_ceil(BLOCK);
        let whole = blocks.next_power_of_two().trailing_zeros();
        let bits = whole
            .min((borders >> BLOCK_BITS).trailing_zeros())
            .min(u32::from(CHUNK_BITS_MASK));
        Ok(Self {
            bits,
            count: blocks.div_ceil(1 << bits),
        })
    }

    /// Bytes of the chunk array.
    pub(super) fn array_len(self) -> u64 {
        self.count.saturating_mul(CHUNK_INDEX_LEN)
    }

    /// Device block of every chunk in order; [`NULL_BLOCK`] is a hole.
    pub(super) fn addresses(self, file: &Regular) -> impl Iterator<Item = u32> {
        let mut extents = merged(&file.extents).peekable();
        (0..self.count).map(move |index| {
            let offset = index << (BLOCK_BITS + self.bits);
            while extents
                .next_if(|extent| extent.file_offset + extent.len <= offset)
                .is_some()
            {}
            match extents.peek() {
                Some(extent) if extent.file_offset <= offset => {
                    let at = extent.decoded.0 + (offset - extent.file_offset);
                    // The writer refuses devices whose last block does not fit into 32 bits.
                    u32::try_from(at >> BLOCK_BITS).unwrap_or(NULL_BLOCK)
                }
                _ => NULL_BLOCK,
            }
        })
    }
}

/// Joins extents that follow each other in the file and on the device.
pub(super) fn merged(extents: &[Extent]) -> impl Iterator<Item = Extent> {
    let mut rest = extents.iter().peekable();
    core::iter::from_fn(move || {
        let mut joined = *rest.next()?;
        while let Some(next) = rest.next_if(|next| follows(&joined, next)) {
            joined.len += next.len;
        }
        Some(joined)
    })
}

/// `true` if `next` continues `extent` in the file and on the device.
pub(super) fn follows(extent: &Extent, next: &Extent) -> bool {
    let ends = |start: u64| start.checked_add(extent.len);
    ends(extent.file_offset) == Some(next.file_offset)
        && ends(extent.decoded.0) == Some(next.decoded.0)
        && extent.len.checked_add(next.len).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::DecodedOffset;

    fn file(size: u64, extents: &[(u64, u64, u64)]) -> Regular {
        Regular {
            size,
            extents: extents
                .iter()
                .map(|(file_offset, len, decoded)| Extent {
                    file_offset: *file_offset,
                    len: *len,
                    decoded: DecodedOffset(*decoded),
                })
                .collect(),
        }
    }

    fn cut(file: &Regular) -> (u32, Vec<u32>) {
        let shape = Shape::of(file, 1 << 40).unwrap();
        (shape.bits, shape.addresses(file).collect())
    }

    #[test]
    fn chunks_are_as_large_as_the_extents_allow() {
        assert_eq!(cut(&file(1, &[(0, 1, 8192)])), (0, vec![2]));
        assert_eq!(cut(&file(4097, &[(0, 4097, 4096)])), (1, vec![1]));
        let pieces = file(12289, &[(0, 4096, 4096), (4096, 8193, 8192)]);
        assert_eq!(cut(&pieces), (2, vec![1]), "contiguous pieces are one");
        let swapped = file(12289, &[(0, 8192, 8192), (8192, 4097, 0)]);
        assert_eq!(cut(&swapped), (1, vec![2, 0]));
        let holes = file(1 << 20, &[(65536, 65536, 4096)]);
        let mut expected = vec![NULL_BLOCK; 16];
        expected[1] = 1;
        assert_eq!(cut(&holes), (4, expected));
        assert_eq!(cut(&file(1 << 40, &[])), (28, vec![NULL_BLOCK]));
        let largest = file(1 << 50, &[]);
        assert_eq!(cut(&largest), (31, vec![NULL_BLOCK; 128]));
    }

    #[test]
    fn impossible_extents_are_refused() {
        let problem = |file: Regular| Shape::of(&file, 1 << 20).unwrap_err();
        let extents = InodeProblem::Extents;
        assert_eq!(problem(file(10, &[(0, 11, 0)])), extents);
        assert_eq!(problem(file(10, &[(0, 0, 0)])), extents);
        assert_eq!(
            problem(file(9000, &[(4096, 4096, 0), (0, 4096, 8192)])),
            extents
        );
        assert_eq!(problem(file(u64::MAX, &[(4096, u64::MAX, 0)])), extents);
        assert_eq!(
            problem(file(10, &[(0, 10, 512)])),
            InodeProblem::Unaligned { offset: 0 }
        );
        assert_eq!(
            problem(file(9000, &[(0, 100, 0)])),
            InodeProblem::Unaligned { offset: 0 }
        );
        assert_eq!(
            problem(file(4097, &[(0, 4097, (1 << 20) - 4096)])),
            InodeProblem::BeyondDevice {
                end: (1 << 20) + 1,
                device_len: 1 << 20
            }
        );
    }
}
