//! The output: gzip members, hashed on both sides.

use std::io::Write;

use libdeflater::Compressor;
use sha2::{Digest as _, Sha256};

use super::WriteError;
use crate::{digest::Digest, stargz::TOC_TAR_NAME};

/// Collects one member at a time, compresses it and writes it out.
pub(super) struct Members<W> {
    out: W,
    compressor: Compressor,
    /// Uncompressed bytes of the member at hand.
    member: Vec<u8>,
    compressed: Vec<u8>,
    /// A member with this many bytes takes no more.
    cap: usize,
    blob: Sha256,
    blob_len: u64,
    diff: Sha256,
    uncompressed_len: u64,
}

/// How the blob ended.
pub(super) struct End {
    pub(super) toc_offset: u64,
    pub(super) diff_id: Digest,
    pub(super) uncompressed_len: u64,
    pub(super) blob_digest: Digest,
    pub(super) blob_len: u64,
}

impl<W: Write> Members<W> {
    pub(super) fn new(out: W, compressor: Compressor, cap: usize) -> Self {
        Self {
            out,
            compressor,
            member: Vec::new(),
            compressed: Vec::new(),
            cap,
            blob: Sha256::new(),
            blob_len: 0,
            diff: Sha256::new(),
            uncompressed_len: 0,
        }
    }

    /// Ends the member at hand. Returns where the next one starts.
    pub(super) fn start(&mut self) -> Result<u64, WriteError> {
        if !self.member.is_empty() {
            let bound = self.compressor.gzip_compress_bound(self.member.len());
            if self.compressed.len() < bound {
                self.compressed.resize(bound, 0);
            }
            #[expect(
                clippy::expect_used,
                reason = "it only fails for want of room, and said itself how much it needs"
            )]
            let len = self
                .compressor
                .gzip_compress(&self.member, &mut self.compressed)
                .expect("the bound is enough");
            self.diff.update(&self.member);
            self.uncompressed_len += self.member.len() as u64;
            self.member.clear();
            self.write(len)?;
        }
        Ok(self.blob_len)
    }

    /// Adds `len` bytes that `fill` gives to the member at hand, and returns them. A member that
    /// is full ends before.
    pub(super) fn append(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), WriteError>,
    ) -> Result<&[u8], WriteError> {
        if self.member.len() + len > self.cap {
            self.start()?;
        }
        let from = self.member.len();
        self.member.resize(from + len, 0);
        let to = &mut self.member[from..];
        fill(to)?;
        Ok(to)
    }

    /// Writes the TOC and the footer.
    pub(super) fn finish(mut self, json: &[u8]) -> Result<End, WriteError> {
        let toc_offset = self.start()?;
        let header = ustar_header(TOC_TAR_NAME, json.len() as u64);
        self.member.extend_from_slice(&header);
        self.member.extend_from_slice(json);
        let padded = self.member.len().next_multiple_of(512);
        // Two zero blocks end the archive.
        self.member.resize(padded + 1024, 0);
        self.start()?;
        let footer = footer(toc_offset);
        self.compressed.clear();
        self.compressed.extend_from_slice(&footer);
        self.write(footer.len())?;
        self.out.flush().map_err(|source| WriteError::Write {
            offset: self.blob_len,
            source,
        })?;
        Ok(End {
            toc_offset,
            diff_id: Digest::finish(self.diff),
            uncompressed_len: self.uncompressed_len,
            blob_digest: Digest::finish(self.blob),
            blob_len: self.blob_len,
        })
    }

    /// Writes the first `len` bytes of `compressed`.
    fn write(&mut self, len: usize) -> Result<(), WriteError> {
        let bytes = &self.compressed[..len];
        self.blob.update(bytes);
        self.out
            .write_all(bytes)
            .map_err(|source| WriteError::Write {
                offset: self.blob_len,
                source,
            })?;
        self.blob_len += len as u64;
        Ok(())
    }
}

/// The footer of a blob whose TOC starts at `toc_offset`: an empty gzip member of 51 bytes. Written
/// by hand, because compressors differ in how they end an empty member.
fn footer(toc_offset: u64) -> Vec<u8> {
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
    footer.extend_from_slice(&26_u16.to_le_bytes());
    footer.extend_from_slice(b"SG");
    footer.extend_from_slice(&22_u16.to_le_bytes());
    footer.extend_from_slice(format!("{toc_offset:016x}STARGZ").as_bytes());
    // A final empty stored block, CRC-32 and length 0.
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

/// The header of a regular file without mode, owner or time, as landmarks and the TOC have it.
pub(super) fn ustar_header(name: &str, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    for at in [100, 108, 116, 329, 337] {
        // Mode, uid, gid, device numbers.
        put(at, b"0000000");
    }
    if size < 1 << 33 {
        put(124, format!("{size:011o}").as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}
