//! Applying the entries of a TOC.

use super::{StargzLayer, StartList, TocError};
use crate::{
    digest::Digest,
    limits::Limits,
    stargz::{
        LANDMARK_CONTENT, NO_PREFETCH_LANDMARK,
        entry::RawEntry,
        landmark::is_landmark_name,
        layout::{LayoutError, RawChunk, RawFile, lay_out},
        time::{parse_rfc3339, toc_mtime},
    },
    tree::{
        Applied, Attrs, BuildError, Builder, Entry, EntryKind, InodeId, Mtime, NotLazyReason, Rdev,
        TreePath,
    },
    units::RemoteOffset,
};

/// The only version of the TOC there is.
const VERSION: i64 = 1;

/// Entries are applied while the JSON is parsed, so that only one is in memory as JSON.
pub(super) struct Reader<'l> {
    builder: Builder,
    limits: &'l Limits,
    toc_offset: RemoteOffset,
    pub(super) version: i64,
    index: u32,
    files: Vec<RawFile>,
    chunks: Vec<RawChunk>,
    /// The regular file that `chunk` entries add to.
    open: Option<OpenFile>,
    /// Its name as spelt; kept for its allocation.
    open_name: Vec<u8>,
    has_chunk_entries: bool,
    /// The first file whose only digest is that of the whole file.
    whole_digest: Option<TreePath>,
    start_list: StartList,
    pub(super) failed: Option<TocError>,
}

#[derive(Clone, Copy)]
struct OpenFile {
    /// Where the next chunk must start.
    next: u64,
    file: RawFile,
}

impl<'l> Reader<'l> {
    pub(super) fn new(toc_offset: RemoteOffset, limits: &'l Limits) -> Self {
        Self {
            builder: Builder::new(*limits),
            limits,
            toc_offset,
            version: 0,
            index: 0,
            files: Vec::new(),
            chunks: Vec::new(),
            open: None,
            open_name: Vec::new(),
            has_chunk_entries: false,
            whole_digest: None,
            start_list: StartList::None,
            failed: None,
        }
    }

    pub(super) fn apply(&mut self, entry: RawEntry<'_>) -> Result<(), TocError> {
        if self.index >= self.limits.max_entries {
            return Err(TocError::TooManyEntries {
                limit: self.limits.max_entries,
            });
        }
        if entry.kind.as_str() == "chunk" {
            self.has_chunk_entries = true;
            self.apply_chunk(&entry)?;
        } else {
            self.close_file()?;
            self.apply_entry(entry)?;
        }
        self.index += 1;
        Ok(())
    }

    fn apply_entry(&mut self, mut entry: RawEntry<'_>) -> Result<(), TocError> {
        let xattrs = core::mem::take(&mut entry.xattrs.0);
        let path = || TreePath::clean(entry.name.as_bytes());
        let fault = |why| TocError::Entry {
            index: self.index,
            path: path(),
            why,
        };
        let mtime = match entry.modtime.as_str() {
            "" => Mtime::default(),
            text => toc_mtime(
                parse_rfc3339(text).ok_or_else(|| fault("modtime is not an RFC 3339 time"))?,
            ),
        };
        let owner = |id: i64| {
            u32::try_from(id).map_err(|_| fault("uid or gid is not an unsigned 32-bit number"))
        };
        let device = |number: i64| {
            u32::try_from(number).map_err(|_| fault("a device number is negative or too large"))
        };
        let rdev = || {
            Ok::<_, TocError>(Rdev {
                major: device(entry.dev_major)?,
                minor: device(entry.dev_minor)?,
            })
        };
        let size = u64::try_from(entry.size).map_err(|_| fault("size is negative"))?;
        let kind = match entry.kind.as_str() {
            "dir" => EntryKind::Directory,
            "reg" => EntryKind::Regular { size },
            "symlink" => EntryKind::Symlink(entry.link_name.as_bytes()),
            "hardlink" => EntryKind::HardLink(entry.link_name.as_bytes()),
            "char" => EntryKind::CharDevice(rdev()?),
            "block" => EntryKind::BlockDevice(rdev()?),
            "fifo" => EntryKind::Fifo,
            other => {
                return Err(NotLazyReason::UnknownType {
                    path: path(),
                    kind: other.chars().take(32).collect(),
                }
                .into());
            }
        };
        let is_file = matches!(kind, EntryKind::Regular { .. }) && size > 0;
        if is_file && is_landmark(&entry, size) {
            return self.apply_landmark(&entry);
        }
        let attrs = Attrs {
            // The mask leaves 12 bits.
            mode: u16::try_from(entry.mode & 0o7777).unwrap_or_default(),
            uid: owner(entry.uid)?,
            gid: owner(entry.gid)?,
            mtime,
            xattrs,
        };
        let applied = self
            .builder
            .apply_strict(Entry {
                path: entry.name.as_bytes(),
                attrs,
                kind,
            })
            .map_err(|error| match error {
                BuildError::NotLazy(reason) => TocError::NotLazy(reason),
                limit @ BuildError::Limit { .. } => TocError::Limit {
                    index: self.index,
                    source: limit,
                },
            })?;
        if is_file {
            let inode = match applied {
                Applied::Inode(id) => Some(id),
                Applied::Link(_) | Applied::Whiteout | Applied::Ignored => None,
            };
            self.open_file(&entry, size, inode)?;
        }
        Ok(())
    }

    fn apply_landmark(&mut self, entry: &RawEntry<'_>) -> Result<(), TocError> {
        self.open_file(entry, 1, None)?;
        let name = TreePath::clean(entry.name.as_bytes());
        // "No prefetch" wins over the other one wherever both stand, as upstream reads it.
        if name.as_bytes() == NO_PREFETCH_LANDMARK.as_bytes() {
            self.start_list = StartList::Nothing;
        } else if self.start_list != StartList::Nothing {
            // Checked by `open_file`.
            let offset = u64::try_from(entry.offset).unwrap_or_default();
            self.start_list = StartList::Until(RemoteOffset(offset));
        }
        Ok(())
    }

    fn open_file(
        &mut self,
        entry: &RawEntry<'_>,
        size: u64,
        inode: Option<InodeId>,
    ) -> Result<(), TocError> {
        self.open_name.clear();
        self.open_name.extend_from_slice(entry.name.as_bytes());
        if entry.chunk_offset != 0 {
            return Err(self.fault("the first chunk of a file has a chunkOffset"));
        }
        let mut open = OpenFile {
            next: 0,
            file: RawFile {
                inode,
                entry: self.index,
                size,
                first_chunk: self.chunks.len(),
                chunk_count: 0,
            },
        };
        self.push_chunk(entry, &mut open)?;
        self.open = Some(open);
        Ok(())
    }

    fn apply_chunk(&mut self, entry: &RawEntry<'_>) -> Result<(), TocError> {
        let Some(mut open) = self.open.take() else {
            self.open_name.clear();
            return Err(self.fault("a chunk does not follow a non-empty regular file"));
        };
        if u64::try_from(entry.chunk_offset) != Ok(open.next) {
            return Err(self.fault("a chunk does not start where the last one ends"));
        }
        self.push_chunk(entry, &mut open)?;
        self.open = Some(open);
        Ok(())
    }

    /// Adds the chunk that `entry` describes, which starts at `open.next`.
    fn push_chunk(&mut self, entry: &RawEntry<'_>, open: &mut OpenFile) -> Result<(), TocError> {
        let fault = |why| Err(self.fault(why));
        let left = open.file.size - open.next;
        let len = match u64::try_from(entry.chunk_size) {
            Ok(0) => left,
            Ok(len) if len <= left => len,
            Ok(_) => return fault("a chunk ends behind its file"),
            Err(_) => return fault("chunkSize is negative"),
        };
        if len == 0 {
            return fault("a chunk starts at the end of its file");
        }
        let Ok(remote) = u64::try_from(entry.offset) else {
            return fault("offset is negative");
        };
        if remote >= self.toc_offset.0 {
            return fault("offset is not in front of the TOC");
        }
        let Ok(inner) = u64::try_from(entry.inner_offset) else {
            return fault("innerOffset is negative");
        };
        let too_large = |len, limit| NotLazyReason::ChunkTooLarge {
            path: self.open_path(),
            file_offset: open.next,
            len,
            limit,
        };
        let limit = u64::from(self.limits.max_chunk_bytes);
        let short = u32::try_from(len)
            .ok()
            .filter(|_| len <= limit)
            .ok_or_else(|| too_large(len, limit))?;
        let limit = self.limits.max_member_bytes;
        let member_end = inner.saturating_add(len);
        if member_end > limit {
            return Err(too_large(member_end, limit).into());
        }
        let digest = match (entry.chunk_digest.as_str(), entry.digest.as_str()) {
            // Nobody reads what has no place in the tree.
            ("", _) if open.file.inode.is_none() => Digest::from_bytes([0; 32]),
            ("", whole) if open.next == 0 && len == open.file.size && !whole.is_empty() => {
                if self.whole_digest.is_none() {
                    self.whole_digest = Some(self.open_path());
                }
                self.parse_digest(whole, open.next)?
            }
            ("", _) => {
                return Err(NotLazyReason::NoChunkDigest {
                    path: self.open_path(),
                    file_offset: open.next,
                }
                .into());
            }
            (_, _) if open.file.inode.is_none() => Digest::from_bytes([0; 32]),
            (chunk, _) => self.parse_digest(chunk, open.next)?,
        };
        self.chunks.push(RawChunk {
            remote,
            inner,
            file_offset: open.next,
            len: short,
            digest,
        });
        open.next += len;
        open.file.chunk_count += 1;
        Ok(())
    }

    /// Checks that the chunks of the last regular file cover it.
    fn close_file(&mut self) -> Result<(), TocError> {
        if let Some(open) = self.open.take() {
            if open.next != open.file.size {
                return Err(self.fault("its chunks do not add up to its size"));
            }
            self.files.push(open.file);
        }
        Ok(())
    }

    pub(super) fn finish(mut self, toc_digest: Digest) -> Result<StargzLayer, TocError> {
        self.close_file()?;
        if self.version != VERSION {
            return Err(TocError::Version {
                found: self.version,
            });
        }
        if let Some(path) = self.whole_digest.filter(|_| self.has_chunk_entries) {
            return Err(NotLazyReason::NoChunkDigest {
                path,
                file_offset: 0,
            }
            .into());
        }
        let layout = match lay_out(
            self.files,
            &self.chunks,
            self.toc_offset.0,
            self.limits.max_decoded_bytes,
        ) {
            Ok(layout) => layout,
            Err(LayoutError {
                entry,
                inode,
                overlaps,
            }) => {
                let tree = self.builder.finish();
                return Err(TocError::Entry {
                    index: entry,
                    path: inode.and_then(|id| tree.path(id)).unwrap_or_default(),
                    why: if overlaps {
                        "its chunks overlap those of another file, or their order is not that of \
                         their bytes in the blob"
                    } else {
                        "the layer is larger than the limit on decoded bytes"
                    },
                });
            }
        };
        for (inode, extent) in layout.extents {
            self.builder.set_extents(inode, vec![extent]);
        }
        Ok(StargzLayer {
            tree: self.builder.finish(),
            map: layout.map,
            start_list: self.start_list,
            toc_offset: self.toc_offset,
            toc_digest,
        })
    }

    /// A fault of the regular file at hand.
    fn fault(&self, why: &'static str) -> TocError {
        TocError::Entry {
            index: self.index,
            path: self.open_path(),
            why,
        }
    }

    fn open_path(&self) -> TreePath {
        TreePath::clean(&self.open_name)
    }

    fn parse_digest(&self, text: &str, file_offset: u64) -> Result<Digest, TocError> {
        text.parse().map_err(|_| {
            NotLazyReason::UnsupportedDigest {
                path: self.open_path(),
                file_offset,
            }
            .into()
        })
    }
}

fn is_landmark(entry: &RawEntry<'_>, size: u64) -> bool {
    let digest = match entry.chunk_digest.as_str() {
        "" => entry.digest.as_str(),
        chunk => chunk,
    };
    size == LANDMARK_CONTENT.len() as u64
        && is_landmark_name(TreePath::clean(entry.name.as_bytes()).as_bytes())
        && digest.parse() == Ok(Digest::of(&LANDMARK_CONTENT))
}
