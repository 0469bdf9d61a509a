//! Makes an eStargz layer of a tar archive.
//!
//! The archive is read twice: once to index it, once to emit its entries in their new order, so
//! memory holds the index, one chunk and the TOC, never the layer. Entries keep their bytes:
//! headers with all their extensions are copied as they are, and only their order changes.
//! Equal input and options give equal output.
//!
//! Every gzip member is compressed on its own and as a whole. One starts at the payload of every
//! regular file that is not empty, at every chunk inside of it, and at the TOC; a member that
//! grows past a chunk and a megabyte (by headers alone) ends early, which readers do not notice.

mod members;
mod order;
mod rows;
mod source;

use std::{
    collections::BTreeMap,
    io::{self, Read, Seek, Write},
};

use libdeflater::{CompressionLvl, Compressor};
use sha2::{Digest as _, Sha256};

use super::{LANDMARK_CONTENT, NO_PREFETCH_LANDMARK, NotLazyReason, PREFETCH_LANDMARK};
use crate::{
    digest::Digest,
    limits::Limits,
    oci::{ANNOTATION_TOC_DIGEST, ANNOTATION_UNCOMPRESSED_SIZE},
    tar::{EntryType, TarError},
    tree::{BuildError, TreePath},
    units::RemoteOffset,
};

use members::Members;
use order::Order;
use rows::{Payload, Rows};
use source::{Item, Source};

/// How a layer is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// Bytes of a file that are compressed and verified as one; default 4 MiB.
    pub chunk_size: u32,
    /// Compression level of libdeflate, 0 to 12; default 7. Its levels are not those of zlib or Go:
    /// from 5 on the result is smaller than that of upstream's writer at level 9, and 9 gains half
    /// a percent over 7 for twice the time.
    pub level: u8,
    /// Paths to put first, most urgent first. Their parent directories and the targets of hard
    /// links come before them; what the layer does not have is left out and reported.
    pub prioritized: Vec<Vec<u8>>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            chunk_size: 4 << 20,
            level: 7,
            prioritized: Vec::new(),
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// SHA-256 of the TOC's JSON.
    pub toc_digest: Digest,
    /// Where the TOC starts in the blob.
    pub toc_offset: RemoteOffset,
    /// SHA-256 of the uncompressed layer, for `rootfs.diff_ids`.
    pub diff_id: Digest,
    /// Length of the uncompressed layer in bytes.
    pub uncompressed_len: u64,
    /// SHA-256 of the blob.
    pub blob_digest: Digest,
    /// Length of the blob in bytes.
    pub blob_len: u64,
    /// Where the prefetch landmark lies: the start list is `[0, landmark)`. `None`: there is no
    /// start list.
    pub start_list_end: Option<RemoteOffset>,
    /// Prioritised paths that the layer does not have.
    pub missing: Vec<Vec<u8>>,
    /// Why readers will not serve this layer lazily, if they will not.
    pub not_lazy: Option<NotLazyReason>,
}

impl Built {
    /// The annotations that the layer's descriptor needs.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            (
                ANNOTATION_TOC_DIGEST.to_owned(),
                self.toc_digest.to_string(),
            ),
            (
                ANNOTATION_UNCOMPRESSED_SIZE.to_owned(),
                self.uncompressed_len.to_string(),
            ),
        ])
    }
}

/// Why no layer was written. What `out` got so far is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// An option is out of its range.
    #[error("{option} {value} is not in {allowed}")]
    Option {
        /// Which one.
        option: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        allowed: String,
    },
    /// The archive could not be read.
    #[error("reading the tar archive at {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The output could not be written.
    #[error("writing the layer at {offset}")]
    Write {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The archive is malformed.
    #[error("reading the tar archive")]
    Tar(#[from] TarError),
    /// A limit was passed.
    #[error(transparent)]
    Limit(BuildError),
    /// The archive has more entries than allowed.
    #[error("the tar archive has more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u32,
    },
    /// The TOC would be larger than readers accept.
    #[error("the TOC would be larger than {limit} bytes")]
    TocTooLarge {
        /// The limit.
        limit: u64,
    },
    /// An entry that eStargz has no type for.
    #[error("{path}: tar entries of type {flag:?} cannot be in an eStargz layer")]
    Type {
        /// The entry.
        path: TreePath,
        /// Its type flag.
        flag: char,
    },
    /// A sparse file: readers of eStargz would show its stored bytes.
    #[error("{path}: a sparse file cannot be in an eStargz layer")]
    Sparse {
        /// The entry.
        path: TreePath,
    },
    /// Dropping replaced entries or moving prioritised ones would make another tree.
    #[error(
        "the layer's entries replace each other in a way that eStargz cannot keep (a hard link to \
         a file that is replaced later, or hard links of different owners or modes)"
    )]
    Order,
}

/// Writes the eStargz form of the tar archive `tar` (uncompressed, from its first byte on) to
/// `out`. Landmarks and a TOC of an earlier conversion are left out; of entries with the same name
/// the last one stays. That the new archive unpacks to the same tree as the old one is checked
/// before anything is written.
pub fn build<R: Read + Seek, W: Write>(
    tar: R,
    out: W,
    options: &WriterOptions,
    limits: &Limits,
) -> Result<Built, WriteError> {
    let compressor = options.compressor(limits)?;
    let mut source = Source::new(tar);
    let items = source.index(limits)?;
    let order = Order::of(&items, &options.prioritized);
    let not_lazy = order.verify(&items, limits)?;

    let chunk_size = usize::try_from(options.chunk_size).unwrap_or(usize::MAX);
    let mut writer = Writer {
        chunk_size,
        members: Members::new(out, compressor, chunk_size.saturating_add(1 << 20)),
        rows: Rows::new(limits.max_index_bytes),
    };
    for index in &order.first {
        writer.item(&mut source, &items[*index])?;
    }
    let start_list_end = writer.landmark(!order.first.is_empty())?;
    for index in &order.rest {
        writer.item(&mut source, &items[*index])?;
    }
    let json = writer.rows.finish()?;
    let toc_digest = Digest::of(&json);
    let end = writer.members.finish(&json)?;
    Ok(Built {
        toc_digest,
        toc_offset: RemoteOffset(end.toc_offset),
        diff_id: end.diff_id,
        uncompressed_len: end.uncompressed_len,
        blob_digest: end.blob_digest,
        blob_len: end.blob_len,
        start_list_end,
        missing: order.missing,
        not_lazy,
    })
}

impl WriterOptions {
    fn compressor(&self, limits: &Limits) -> Result<Compressor, WriteError> {
        let max = limits.max_chunk_bytes;
        if !(1..=max).contains(&self.chunk_size) {
            return Err(WriteError::Option {
                option: "chunk size",
                value: u64::from(self.chunk_size),
                allowed: format!("1..={max}"),
            });
        }
        match CompressionLvl::new(i32::from(self.level)) {
            Ok(level) => Ok(Compressor::new(level)),
            Err(_) => Err(WriteError::Option {
                option: "compression level",
                value: u64::from(self.level),
                allowed: "0..=12".to_owned(),
            }),
        }
    }
}

struct Writer<W> {
    chunk_size: usize,
    members: Members<W>,
    rows: Rows,
}

impl<W: Write> Writer<W> {
    /// Emits an entry of the archive.
    fn item<R: Read + Seek>(
        &mut self,
        source: &mut Source<R>,
        item: &Item,
    ) -> Result<(), WriteError> {
        let header = &item.header;
        source.seek(header.offset)?;
        let mut left = header.payload_offset - header.offset;
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(64 << 10);
            self.members.append(len, |to| source.read_exact(to))?;
            left -= len as u64;
        }
        if header.kind != EntryType::Regular {
            return self.rows.push(header, None);
        }
        let payload = self.payload(header.size, &mut |to| source.read_exact(to))?;
        self.rows.push(header, Some(payload))
    }

    /// Emits `size` bytes that `read` gives, each chunk as a member of its own, and padding.
    fn payload(
        &mut self,
        size: u64,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), WriteError>,
    ) -> Result<Payload, WriteError> {
        let mut payload = Payload::new(self.chunk_size as u64);
        let mut whole = Sha256::new();
        let mut left = size;
        while left > 0 {
            let len = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.chunk_size);
            let offset = self.members.start()?;
            let bytes = self.members.append(len, &mut *read)?;
            let digest = Digest::of(bytes);
            if len as u64 == size {
                payload.whole = digest;
            } else {
                whole.update(bytes);
            }
            payload.chunks.push((offset, digest));
            left -= len as u64;
        }
        if payload.chunks.len() != 1 {
            payload.whole = Digest::finish(whole);
        }
        let padding = usize::try_from(size.wrapping_neg() % 512).unwrap_or_default();
        self.members.append(padding, |to| {
            to.fill(0);
            Ok(())
        })?;
        Ok(payload)
    }

    /// Emits the landmark. Returns where it lies if it ends a start list.
    fn landmark(&mut self, prefetch: bool) -> Result<Option<RemoteOffset>, WriteError> {
        let name = if prefetch {
            PREFETCH_LANDMARK
        } else {
            NO_PREFETCH_LANDMARK
        };
        let size = LANDMARK_CONTENT.len() as u64;
        let header = members::ustar_header(name, size);
        self.members.append(header.len(), |to| {
            to.copy_from_slice(&header);
            Ok(())
        })?;
        let payload = self.payload(size, &mut |to| {
            to.copy_from_slice(&LANDMARK_CONTENT);
            Ok(())
        })?;
        let offset = payload.chunks.first().map(|(offset, _)| *offset);
        self.rows.push_plain(name, size, payload)?;
        Ok(offset.filter(|_| prefetch).map(RemoteOffset))
    }
}

#[cfg(test)]
mod tests;
