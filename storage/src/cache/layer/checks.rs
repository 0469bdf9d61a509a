//! What is checked before a cache is opened.

use std::io;

use formats::{blobmap::BlobMap, digest::Digest};

use super::{MEMBER_MAX, OpenError};
use crate::cache::{bits::index, store::Store, wire::Wire};

/// The cache searches by remote position, so an index in another order would make readers wait
/// for ever.
pub(super) fn check_map(map: &BlobMap, blob_len: u64) -> Result<(), OpenError> {
    let (mut start, mut end, mut inner) = (0, 0, 0);
    for (number, chunk) in map.chunks().iter().enumerate() {
        let range = chunk.remote_range();
        let disorder =
            range.start < start || range.end < end || range.start == start && chunk.inner < inner;
        if disorder || range.is_empty() || range.end > blob_len {
            return Err(OpenError::BadMap {
                chunk: number,
                range,
                blob_len,
            });
        }
        (start, end) = (range.start, range.end);
        inner = chunk.inner.saturating_add(u64::from(chunk.len));
        if inner > MEMBER_MAX {
            return Err(OpenError::TooDeep {
                chunk: number,
                needed: inner,
                limit: MEMBER_MAX,
            });
        }
    }
    Ok(())
}

/// What `data` means: another layout of the same layer must not be taken for this one.
pub(super) fn table_digest(map: &BlobMap) -> [u8; 32] {
    use sha2::Digest as _;
    let mut hasher = sha2::Sha256::new();
    for chunk in map.chunks() {
        hasher.update(chunk.decoded.0.to_le_bytes());
        hasher.update(chunk.len.to_le_bytes());
        hasher.update(chunk.digest.as_bytes());
    }
    hasher.finalize().into()
}

/// Clears the bits of chunks whose bytes on disk do not have their digest.
pub(super) fn verify_present(store: &Store, map: &BlobMap, wire: &Wire) -> io::Result<()> {
    let mut buf = Vec::new();
    let mut wrong = false;
    for (number, chunk) in map.chunks().iter().enumerate() {
        let bit = number as u64;
        if !store.bits.get(bit) {
            continue;
        }
        buf.resize(index(u64::from(chunk.len)), 0);
        store.read(&mut buf, chunk.decoded.0)?;
        let actual = Digest::of(&buf);
        if actual != chunk.digest {
            store.bits.clear_range(bit..bit + 1);
            wrong = true;
            wire.counters.event(format!(
                "{}: chunk {number} at {} on disk has digest {actual} instead of {}: fetching it again",
                wire.name, chunk.decoded, chunk.digest
            ));
        }
    }
    if wrong {
        // The bits leave the disk before the bytes are written anew.
        store.flush(true, || {})?;
    }
    Ok(())
}
