//! Presence maps on disk.
//!
//! A map file is one 4 KiB header page and the bits as little-endian 64-bit words:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `SDPMAP01` |
//! | 8 | 4 | kind, LE: 1 = blocks of `wire`, 2 = chunks of `data` |
//! | 12 | 4 | unit in bytes, LE: 4096 for blocks, 0 for chunks |
//! | 16 | 8 | number of bits, LE |
//! | 24 | 8 | length of the file the map speaks of, LE |
//! | 32 | 32 | identity of the layer |
//! | 64 | 32 | digest of the chunk table (zeros for blocks) |
//! | 96 | 32 | SHA-256 of bytes 0..96 |
//! | 4096 | | bits |
//!
//! The header is a function of what the caller knows, so a map is trusted only if its header page
//! is byte for byte the expected one; otherwise the cache starts empty. The bits need no checksum
//! against torn writes: they only ever turn from 0 to 1 on disk, after the data they speak of is
//! durable, so any mixture of an older and a newer version of a page is true as well.

use std::{io, path::PathBuf};

use formats::digest::Digest;

use super::{
    bits::{Bits, index},
    files::{self, Tracked, sync_parent},
};

const MAGIC: &[u8; 8] = b"SDPMAP01";
const PAGE: usize = 4096;
const WORDS_PER_PAGE: usize = PAGE / 8;

/// What a map speaks of.
#[derive(Clone, Debug)]
pub(crate) struct MapSpec {
    pub(crate) kind: u32,
    pub(crate) unit: u32,
    pub(crate) bits: u64,
    pub(crate) subject_len: u64,
    pub(crate) identity: Digest,
    pub(crate) table: [u8; 32],
}

impl MapSpec {
    fn header(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&self.kind.to_le_bytes());
        page[12..16].copy_from_slice(&self.unit.to_le_bytes());
        page[16..24].copy_from_slice(&self.bits.to_le_bytes());
        page[24..32].copy_from_slice(&self.subject_len.to_le_bytes());
        page[32..64].copy_from_slice(self.identity.as_bytes());
        page[64..96].copy_from_slice(&self.table);
        let sum = Digest::of(&page[..96]);
        page[96..128].copy_from_slice(sum.as_bytes());
        page
    }

    fn file_len(&self) -> u64 {
        PAGE as u64 + self.bits.div_ceil(64) * 8
    }
}

/// The durable side of one presence map.
#[derive(Debug)]
pub(crate) struct MapFile {
    path: PathBuf,
    spec: MapSpec,
    /// What the file holds; `None` before the file was written for the first time.
    durable: Option<(Tracked, Vec<u64>)>,
}

impl MapFile {
    /// Opens the map at `path`. Without a file, or with a file that is not exactly this map, the
    /// bits are all clear; a wrong file is removed durably, because the data it spoke of is about
    /// to be overwritten.
    pub(crate) fn open(path: PathBuf, spec: MapSpec) -> io::Result<(Self, Bits)> {
        let found = match std::fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let empty = Bits::new(spec.bits);
        let Some(bytes) = found else {
            let map = Self {
                path,
                spec,
                durable: None,
            };
            return Ok((map, empty));
        };
        if bytes.len() as u64 != spec.file_len() || bytes[..PAGE] != spec.header() {
            tracing::warn!(path = %path.display(), "presence map is foreign or damaged: starting empty");
            files::remove(&path)?;
            sync_parent(&path)?;
            let map = Self {
                path,
                spec,
                durable: None,
            };
            return Ok((map, empty));
        }
        let words: Vec<u64> = bytes[PAGE..]
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
            .collect();
        let bits = Bits::from_words(spec.bits, words.iter().copied());
        let file = files::open(&path)?;
        let map = Self {
            path,
            spec,
            durable: Some((file, words)),
        };
        Ok((map, bits))
    }

    /// What is durable.
    pub(crate) fn words(&self) -> &[u64] {
        self.durable.as_ref().map_or(&[], |(_, words)| words)
    }

    /// Makes `words` durable. The data that newly set bits speak of must be durable already.
    pub(crate) fn store(&mut self, words: &[u64]) -> io::Result<()> {
        let (file, durable) = match &mut self.durable {
            Some(durable) => durable,
            none => {
                let file = files::create(&self.path)?;
                file.set_len(self.spec.file_len())?;
                file.write_all_at(&self.spec.header(), 0)?;
                // All of it, so that a disk that fills up later has room for every bit.
                let words = vec![0_u64; index(self.spec.bits.div_ceil(64))];
                for (number, page) in words.chunks(WORDS_PER_PAGE).enumerate() {
                    let zeros = &[0; PAGE][..page.len() * 8];
                    file.write_all_at(zeros, (PAGE + number * PAGE) as u64)?;
                }
                file.sync()?;
                sync_parent(&self.path)?;
                none.insert((file, words))
            }
        };
        let mut wrote = Vec::new();
        let pages = words
            .chunks(WORDS_PER_PAGE)
            .zip(durable.chunks_mut(WORDS_PER_PAGE));
        for (number, (new, old)) in pages.enumerate() {
            if new == old {
                continue;
            }
            let bytes: Vec<u8> = new.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all_at(&bytes, (PAGE + number * PAGE) as u64)?;
            wrote.push((new, old));
        }
        if !wrote.is_empty() {
            file.sync()?;
        }
        for (new, old) in wrote {
            old.copy_from_slice(new);
        }
        Ok(())
    }

    /// Removes the file durably: afterwards the data may be overwritten. The next
    /// [`Self::store`] makes a new one.
    pub(crate) fn remove(&mut self) -> io::Result<()> {
        self.durable = None;
        if files::remove(&self.path)? {
            sync_parent(&self.path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(identity: &[u8], bits: u64) -> MapSpec {
        MapSpec {
            kind: 1,
            unit: 4096,
            bits,
            subject_len: bits * 4096,
            identity: Digest::of(identity),
            table: [0; 32],
        }
    }

    #[test]
    fn keeps_bits_for_its_own_identity_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wire.map");
        let (mut map, bits) = MapFile::open(path.clone(), spec(b"a", 100_000)).unwrap();
        assert_eq!(bits.count(), 0);
        bits.set_range(7..9_000);
        bits.set(99_999);
        map.store(&bits.words().collect::<Vec<_>>()).unwrap();

        let (_, again) = MapFile::open(path.clone(), spec(b"a", 100_000)).unwrap();
        assert!(again.all(7..9_000) && again.get(99_999));
        assert_eq!(again.count(), bits.count());

        let (_, other) = MapFile::open(path.clone(), spec(b"b", 100_000)).unwrap();
        assert_eq!(other.count(), 0);
        assert!(!path.exists(), "a foreign map is gone at once");
    }

    #[test]
    fn damage_anywhere_in_the_header_means_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wire.map");
        for damage in [0, 9, 17, 40, 70, 100, 4095] {
            let (mut map, bits) = MapFile::open(path.clone(), spec(b"a", 64)).unwrap();
            bits.set(3);
            map.store(&bits.words().collect::<Vec<_>>()).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[damage] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            let (_, again) = MapFile::open(path.clone(), spec(b"a", 64)).unwrap();
            assert_eq!(again.count(), 0, "byte {damage}");
        }
    }

    #[test]
    fn a_short_map_means_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wire.map");
        let (mut map, bits) = MapFile::open(path.clone(), spec(b"a", 640)).unwrap();
        bits.set(600);
        map.store(&bits.words().collect::<Vec<_>>()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 8]).unwrap();
        let (_, again) = MapFile::open(path, spec(b"a", 640)).unwrap();
        assert_eq!(again.count(), 0);
    }
}
