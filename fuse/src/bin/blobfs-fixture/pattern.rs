//! Bytes that tell where they came from: no two words of any two nodes are alike by design, so a
//! zero, a stale or a misplaced byte shows.

/// Fills `out` with node `node`'s bytes from `offset` on.
pub(crate) fn fill(node: u64, offset: u64, out: &mut [u8]) {
    let mut at = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let word = word(node, at / 8).to_le_bytes();
        let skip = usize::try_from(at % 8).unwrap_or(0);
        let n = rest.len().min(8 - skip);
        rest[..n].copy_from_slice(&word[skip..skip + n]);
        at += n as u64;
        rest = &mut rest[n..];
    }
}

/// The offset (from `offset`) of the first byte that is not the node's.
pub(crate) fn mismatch(node: u64, offset: u64, bytes: &[u8]) -> Option<usize> {
    let mut expected = vec![0; bytes.len()];
    fill(node, offset, &mut expected);
    if expected == bytes {
        return None;
    }
    expected.iter().zip(bytes).position(|(a, b)| a != b)
}

fn word(node: u64, index: u64) -> u64 {
    let mut z = node
        .wrapping_mul(0xd134_2543_de82_ef95)
        .wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) | 1
}
