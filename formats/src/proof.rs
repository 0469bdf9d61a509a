//! Proves a served layer from its own tar stream.
//!
//! A TOC says what the files of a layer are; the DiffID says which tar the layer is. Both can be
//! genuine by themselves and still not belong together, so a lazily served layer is only a *claim*
//! to be the layer of its DiffID. The [`Prover`] settles it in one pass over the decoded tar: the
//! stream must hash to the DiffID, and the tree that its entries make must be the served tree.
//!
//! *Equal* are two trees with the same names; types; permission bits; owners; modification times as
//! a TOC holds them ([`toc_mtime`]); link targets; numbers of devices; `SCHILY` xattrs; the same
//! names for the same inodes; the same opaque and implied directories; and, for every regular
//! file, chunks that tile it whose digests are those of the tar's payload. Not compared: where bytes
//! lie in the blob, chunk sizes, user names, access and change times, sizes of what is no file,
//! digests of empty files. Left out on both sides: the root entry, landmarks, and the tar entry
//! that holds the bound TOC itself.
//!
//! The same pass yields every verified chunk, so that whatever decodes the whole blob can fill a
//! cache from it.

use core::ops::Range;

use sha2::{Digest as _, Sha256};

use crate::{
    digest::Digest,
    limits::Limits,
    stargz::{LANDMARK_CONTENT, StargzLayer, TOC_TAR_NAME, is_landmark_name, toc_mtime},
    tar::{EntryType, Event, Header, Parser, TarError},
    tree::{BuildError, Builder, Entry, Kind, NotLazyReason, TreePath},
    units::ChunkIdx,
};

mod compare;

pub use compare::{Attribute, MAX_MISMATCHES, Mismatch};
use compare::{Mismatches, compare};

/// What the pass found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The tar is the one of the DiffID and makes exactly the served tree.
    Proven,
    /// It is not, or does not. At most [`MAX_MISMATCHES`] of the differences.
    Refuted(Vec<Mismatch>),
    /// The tar holds what a TOC cannot, so an honest image may differ from its TOC.
    Unprovable(Unprovable),
}

/// Why a layer can be neither proven nor refuted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unprovable {
    /// The tar holds what a TOC cannot represent.
    #[error("the layer's tar cannot be represented by a TOC")]
    NotLazy(#[from] NotLazyReason),
    /// The tar cannot be read.
    #[error("the layer's tar cannot be read")]
    Tar(#[from] TarError),
    /// The tar passes a limit.
    #[error("the layer's tar passes a limit")]
    Limit(BuildError),
}

/// Consumes the decoded tar of a layer in order and compares it with what is served.
#[derive(Debug)]
pub struct Prover<'a> {
    layer: &'a StargzLayer,
    diff_id: Digest,
    hasher: Sha256,
    /// `None` once the tar turned out to be unreadable; hashing goes on.
    parser: Option<Parser>,
    builder: Builder,
    current: Option<Current>,
    unprovable: Option<Unprovable>,
    mismatches: Mismatches,
    /// One flag per chunk of the layer: it was seen and had the right digest.
    verified: Vec<bool>,
    /// The part of the current chunk that arrived already.
    buffer: Vec<u8>,
}

/// The tar entry whose payload is passing by.
#[derive(Debug)]
struct Current {
    header: Box<Header>,
    path: TreePath,
    /// The chunks that the served file of this path still waits for.
    chunks: Range<usize>,
    special: Option<Special>,
}

/// Entries that may have no place in the tree, depending on their payload.
#[derive(Debug)]
enum Special {
    Landmark { is: bool },
    Toc(Sha256),
}

impl<'a> Prover<'a> {
    /// A prover for `layer`, served under the claim to be the layer of `diff_id`.
    pub fn new(layer: &'a StargzLayer, diff_id: Digest, limits: Limits) -> Self {
        Self {
            layer,
            diff_id,
            hasher: Sha256::new(),
            parser: Some(Parser::new(limits)),
            builder: Builder::new(limits),
            current: None,
            unprovable: None,
            mismatches: Mismatches::default(),
            verified: vec![false; layer.map.chunks().len()],
            buffer: Vec::new(),
        }
    }

    /// Takes the next bytes of the decoded tar. `sink` gets every chunk once, when its bytes have
    /// passed and matched their digest.
    pub fn push(&mut self, tar_bytes: &[u8], sink: &mut dyn FnMut(ChunkIdx, &[u8])) {
        self.hasher.update(tar_bytes);
        let mut rest = tar_bytes;
        while let Some(parser) = &mut self.parser {
            match parser.next_event(&mut rest) {
                Ok(Some(Event::Entry(header))) => self.begin(header),
                Ok(Some(Event::Payload { bytes, .. })) => self.payload(bytes, sink),
                Ok(Some(Event::EntryEnd)) => self.end(),
                Ok(Some(Event::End)) => {}
                Ok(None) => return,
                Err(error) => self.give_up(error.into()),
            }
        }
    }

    /// Whether the outcome can no longer be [`Verdict::Proven`], and why. The stream is still worth
    /// pushing: verified chunks keep coming as long as the tar can be read.
    pub fn doomed(&self) -> Option<&Unprovable> {
        self.unprovable.as_ref()
    }

    /// Says that the stream is over, and judges.
    pub fn finish(mut self) -> Verdict {
        let actual = Digest::finish(self.hasher.clone());
        if actual != self.diff_id {
            self.mismatches.push(
                &TreePath::default(),
                Attribute::DiffId,
                self.diff_id,
                actual,
            );
            return Verdict::Refuted(self.mismatches.into_vec());
        }
        self.content()
    }

    /// As [`Self::finish`], whatever DiffID was claimed: the one that the tar has, and whether it
    /// makes the served tree.
    pub fn judge(self) -> (Digest, Verdict) {
        (Digest::finish(self.hasher.clone()), self.content())
    }

    fn content(mut self) -> Verdict {
        if let Some(reason) = self.unprovable {
            return Verdict::Unprovable(reason);
        }
        if let Some(Err(error)) = self.parser.map(|parser| parser.finish()) {
            return Verdict::Unprovable(error.into());
        }
        if let Some(reason) = self.builder.irregular() {
            return Verdict::Unprovable(reason.clone().into());
        }
        compare(
            &self.layer.tree,
            &self.builder.finish(),
            &mut self.mismatches,
        );
        if self.mismatches.is_empty() && self.verified.contains(&false) {
            // Cannot happen while equal trees hold equal files, but a proof does not rest on that.
            self.mismatches.push(
                &TreePath::default(),
                Attribute::Content,
                "a chunk",
                "no bytes for it",
            );
        }
        if self.mismatches.is_empty() {
            Verdict::Proven
        } else {
            Verdict::Refuted(self.mismatches.into_vec())
        }
    }

    fn begin(&mut self, header: Box<Header>) {
        let path = TreePath::clean(&header.path);
        let special = match header.kind {
            EntryType::Regular if is_landmark_name(path.as_bytes()) => Some(Special::Landmark {
                is: header.size == LANDMARK_CONTENT.len() as u64,
            }),
            EntryType::Regular if path.as_bytes() == TOC_TAR_NAME.as_bytes() => {
                Some(Special::Toc(Sha256::new()))
            }
            _ => None,
        };
        let chunks = if header.sparse || header.size == 0 {
            0..0
        } else {
            self.served_chunks(&path)
        };
        self.buffer.clear();
        self.current = Some(Current {
            header,
            path,
            chunks,
            special,
        });
    }

    fn payload(&mut self, bytes: &[u8], sink: &mut dyn FnMut(ChunkIdx, &[u8])) {
        let Some(mut current) = self.current.take() else {
            return;
        };
        match &mut current.special {
            None => {}
            Some(Special::Landmark { is }) => *is &= bytes == LANDMARK_CONTENT,
            Some(Special::Toc(hasher)) => hasher.update(bytes),
        }
        let mut rest = bytes;
        while let Some(index) = current.chunks.clone().next() {
            let Some(chunk) = self.layer.map.chunks().get(index) else {
                break;
            };
            let missing = (chunk.len as usize).saturating_sub(self.buffer.len());
            if rest.len() < missing {
                self.buffer.extend_from_slice(rest);
                break;
            }
            let (tail, after) = rest.split_at(missing);
            rest = after;
            let mut buffer = core::mem::take(&mut self.buffer);
            let chunk = if buffer.is_empty() {
                tail
            } else {
                buffer.extend_from_slice(tail);
                &buffer[..]
            };
            self.check_chunk(index, chunk, &current.path, sink);
            buffer.clear();
            self.buffer = buffer;
            current.chunks.start += 1;
        }
        self.current = Some(current);
    }

    fn check_chunk(
        &mut self,
        index: usize,
        bytes: &[u8],
        path: &TreePath,
        sink: &mut dyn FnMut(ChunkIdx, &[u8]),
    ) {
        let expected = self.layer.map.chunks()[index].digest;
        let actual = Digest::of(bytes);
        if actual != expected {
            self.mismatches
                .push(path, Attribute::Content, expected, actual);
        } else if !core::mem::replace(&mut self.verified[index], true) {
            // A map has at most u32::MAX chunks.
            sink(ChunkIdx(u32::try_from(index).unwrap_or(u32::MAX)), bytes);
        }
    }

    fn end(&mut self) {
        let Some(current) = self.current.take() else {
            return;
        };
        let left_out = match current.special {
            None => false,
            Some(Special::Landmark { is }) => is,
            Some(Special::Toc(hasher)) => Digest::finish(hasher) == self.layer.toc_digest,
        };
        if left_out {
            return;
        }
        let header = &current.header;
        if header.sparse {
            self.builder
                .note_irregular(NotLazyReason::Sparse { path: current.path });
            return;
        }
        let Some(kind) = header.entry_kind() else {
            let kind = match header.kind {
                EntryType::Other(flag) => flag.escape_ascii().to_string(),
                _ => String::new(),
            };
            self.builder.note_irregular(NotLazyReason::UnknownType {
                path: current.path,
                kind,
            });
            return;
        };
        let mut attrs = header.attrs();
        attrs.mtime = toc_mtime(attrs.mtime);
        let applied = self.builder.apply(Entry {
            path: &header.path,
            attrs,
            kind,
        });
        // What an index cannot represent is remembered by the builder.
        if let Err(limit @ BuildError::Limit { .. }) = applied {
            self.unprovable.get_or_insert(Unprovable::Limit(limit));
        }
    }

    /// The chunks of the served regular file at a cleaned path.
    fn served_chunks(&self, path: &TreePath) -> Range<usize> {
        let found = self.layer.tree.lookup(path.as_bytes());
        let Some(Kind::Regular(file)) = found.map(|id| &self.layer.tree.inode(id).kind) else {
            return 0..0;
        };
        // A layer of this kind has one extent for each file.
        match &file.extents[..] {
            [extent] => {
                let start = extent.decoded.0;
                self.layer
                    .map
                    .overlapping(start..start.saturating_add(extent.len))
            }
            _ => 0..0,
        }
    }

    fn give_up(&mut self, reason: Unprovable) {
        self.parser = None;
        self.current = None;
        self.unprovable.get_or_insert(reason);
    }
}
