//! What the files hold: bytes that do not compress, known without having been stored.

/// Bytes of a block.
pub(super) const BLOCK: u64 = 4096;
/// The same, as a length in memory.
pub(super) const BLOCK_LEN: usize = 4096;

/// Block `index` of file `name`. No two blocks are alike.
pub(super) fn block(name: &str, index: u64) -> Vec<u8> {
    let seed = name
        .bytes()
        .chain(index.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(BLOCK_LEN / 8).flatten().collect()
}

/// The whole of a file.
pub(super) fn file(name: &str, len: u64) -> impl std::io::Read {
    Content {
        name: name.to_owned(),
        len,
        at: 0,
        block: Vec::new(),
    }
}

struct Content {
    name: String,
    len: u64,
    at: u64,
    block: Vec<u8>,
}

impl std::io::Read for Content {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let inside = self.at % BLOCK;
        if inside == 0 && self.at < self.len {
            self.block = block(&self.name, self.at / BLOCK);
        }
        let left = (self.len - self.at).min(BLOCK - inside);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let from = usize::try_from(inside).unwrap_or(0);
        buf[..len].copy_from_slice(&self.block[from..from + len]);
        self.at += len as u64;
        Ok(len)
    }
}

/// `0..count` in an order without runs.
pub(super) fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for at in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = usize::try_from(state % (at as u64 + 1)).unwrap_or(0);
        order.swap(at, other);
    }
    order
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_file_is_its_blocks() {
        let mut whole = Vec::new();
        file("a", 10_000)
            .read_to_end(&mut whole)
            .expect("in memory");
        assert_eq!(whole.len(), 10_000);
        assert_eq!(whole[4096..8192], block("a", 1));
        assert_eq!(whole[8192..], block("a", 2)[..10_000 - 8192]);
        assert_ne!(block("a", 1), block("b", 1));
    }

    #[test]
    fn a_shuffle_loses_nothing() {
        let mut order = shuffled(1000, 3);
        assert_ne!(order, shuffled(1000, 4));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
