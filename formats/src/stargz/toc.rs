//! The TOC: from its gzip member to a [`StargzLayer`].

use core::fmt;

use serde::{
    Deserializer as _,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    LANDMARK_CONTENT, NO_PREFETCH_LANDMARK, TOC_TAR_NAME,
    entry::{RawEntry, Text},
    landmark::is_landmark_name,
    layout::{LayoutError, RawChunk, RawFile, lay_out},
    time::{parse_rfc3339, toc_mtime},
};
use crate::{
    blobmap::BlobMap,
    digest::Digest,
    gzip::{GzipError, Inflater},
    limits::Limits,
    tar::{EntryType, Event, Parser, TarError},
    tree::{
        Applied, Attrs, BuildError, Builder, Entry, EntryKind, InodeId, LayerTree, Mtime,
        NotLazyReason, Rdev, TreePath,
    },
    units::RemoteOffset,
};

/// The only version of the TOC there is.
const VERSION: i64 = 1;

/// An eStargz layer as its TOC describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StargzLayer {
    /// Its tree. Landmarks are left out.
    pub tree: LayerTree,
    /// Where the bytes of its files come from.
    pub map: BlobMap,
    /// What is worth fetching before the first start.
    pub start_list: StartList,
    /// Where the TOC starts in the blob: the end of everything a chunk may need.
    pub toc_offset: RemoteOffset,
    /// SHA-256 of the TOC's JSON: what a manifest binds, and with the layer's digest its identity.
    pub toc_digest: Digest,
}

/// The stretch of the blob that is worth fetching before the first start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartList {
    /// The layer does not say.
    None,
    /// The layer says that nothing is.
    Nothing,
    /// `[0, offset)`.
    Until(RemoteOffset),
}

/// Why a TOC gives no layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// The TOC is in order, but the layer cannot be served from it alone.
    #[error(transparent)]
    NotLazy(#[from] NotLazyReason),
    /// The TOC's member does not inflate.
    #[error("TOC member")]
    Gzip(#[from] GzipError),
    /// What the member holds is no tar archive.
    #[error("TOC member")]
    Tar(#[from] TarError),
    /// What the member holds is not a TOC.
    #[error("TOC member: {why}")]
    Container {
        /// What is wrong.
        why: &'static str,
    },
    /// The TOC is larger than allowed.
    #[error("TOC of {actual} bytes, the limit is {limit}")]
    TooLarge {
        /// Its size.
        actual: u64,
        /// The limit.
        limit: u64,
    },
    /// The TOC is not the JSON it must be.
    #[error("TOC: {message}")]
    Json {
        /// What is wrong, with line and column.
        message: String,
    },
    /// The TOC is of a version that is not known.
    #[error("TOC version {found}, only version 1 is known")]
    Version {
        /// Its version.
        found: i64,
    },
    /// The TOC has more entries than allowed.
    #[error("TOC has more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u32,
    },
    /// An entry contradicts itself or the ones before it.
    #[error("TOC entry {index} ({path}): {why}")]
    Entry {
        /// Index of the entry.
        index: u32,
        /// Its path as far as it is known.
        path: TreePath,
        /// What is wrong.
        why: &'static str,
    },
    /// An entry passes a limit.
    #[error("TOC entry {index}")]
    Limit {
        /// Index of the entry.
        index: u32,
        /// Which limit.
        source: BuildError,
    },
}

/// Takes the TOC's JSON out of `member`, the bytes of the blob between
/// [`Footer::toc_offset`](super::Footer::toc_offset) and the footer: gzip of a tar archive whose
/// first entry is `stargz.index.json`.
pub fn inflate_toc(member: &[u8], limits: &Limits) -> Result<Vec<u8>, TocError> {
    // Room for the JSON and the tar around it; the JSON itself is checked by its header.
    let mut inflater = Inflater::new(limits.max_index_bytes.saturating_add(1 << 20));
    let mut parser = Parser::new(*limits);
    let mut buffer = vec![0; 64 << 10];
    let mut rest = member;
    let mut json = None;
    loop {
        let progress = inflater.inflate(rest, &mut buffer)?;
        rest = &rest[progress.consumed..];
        let mut bytes = &buffer[..progress.produced];
        while let Some(event) = parser.next_event(&mut bytes)? {
            match (event, &mut json) {
                (Event::Entry(header), json @ None) => {
                    let path = TreePath::clean(&header.path);
                    if path.as_bytes() != TOC_TAR_NAME.as_bytes()
                        || header.kind != EntryType::Regular
                        || header.sparse
                    {
                        let why = "its first tar entry is not a file named stargz.index.json";
                        return Err(TocError::Container { why });
                    }
                    check_size(header.size, limits)?;
                    *json = Some(Vec::new());
                }
                (Event::Payload { bytes, .. }, Some(json)) => json.extend_from_slice(bytes),
                (Event::EntryEnd, json) => return Ok(json.take().unwrap_or_default()),
                _ => {}
            }
        }
        if progress.produced == 0 && rest.is_empty() {
            let why = "it ends before its stargz.index.json does";
            return Err(TocError::Container { why });
        }
    }
}

/// Reads a TOC. `json` is exactly what [`inflate_toc`] gave; that it is the TOC that a manifest
/// binds is for the caller to check, by [`StargzLayer::toc_digest`] or before parsing.
/// `toc_offset` is where the TOC starts in the blob.
pub fn parse_toc(
    json: &[u8],
    toc_offset: RemoteOffset,
    limits: &Limits,
) -> Result<StargzLayer, TocError> {
    check_size(json.len() as u64, limits)?;
    let mut reader = Reader::new(toc_offset, limits);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = deserializer
        .deserialize_map(TocVisitor(&mut reader))
        .and_then(|()| deserializer.end());
    if let Err(error) = parsed {
        return Err(reader.failed.take().unwrap_or_else(|| TocError::Json {
            message: error.to_string(),
        }));
    }
    reader.finish(Digest::of(json))
}

fn check_size(actual: u64, limits: &Limits) -> Result<(), TocError> {
    let limit = limits.max_index_bytes;
    if actual > limit {
        return Err(TocError::TooLarge { actual, limit });
    }
    Ok(())
}

/// Entries are applied while the JSON is parsed, so that only one is in memory as JSON.
struct Reader<'l> {
    builder: Builder,
    limits: &'l Limits,
    toc_offset: RemoteOffset,
    version: i64,
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
    failed: Option<TocError>,
}

#[derive(Clone, Copy)]
struct OpenFile {
    /// Where the next chunk must start.
    next: u64,
    file: RawFile,
}

impl<'l> Reader<'l> {
    fn new(toc_offset: RemoteOffset, limits: &'l Limits) -> Self {
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

    fn apply(&mut self, entry: RawEntry<'_>) -> Result<(), TocError> {
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

    fn finish(mut self, toc_digest: Digest) -> Result<StargzLayer, TocError> {
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

/// The TOC's outer object.
struct TocVisitor<'r, 'l>(&'r mut Reader<'l>);

impl<'de> Visitor<'de> for TocVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut version, mut entries) = (false, false);
        while let Some(key) = map.next_key::<Text<'de>>()? {
            let seen = match key.as_str() {
                "version" => {
                    self.0.version = map.next_value()?;
                    &mut version
                }
                "entries" => {
                    if entries {
                        return Err(A::Error::custom("duplicate field `entries`"));
                    }
                    map.next_value_seed(EntriesSeed(self.0))?;
                    &mut entries
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if core::mem::replace(seen, true) {
                return Err(A::Error::custom("duplicate field `version`"));
            }
        }
        Ok(())
    }
}

/// The array of entries.
struct EntriesSeed<'r, 'l>(&'r mut Reader<'l>);

impl<'de> DeserializeSeed<'de> for EntriesSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for EntriesSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of TOC entries")
    }

    /// An empty layer, as Go writes it.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while let Some(entry) = sequence.next_element::<RawEntry<'de>>()? {
            if let Err(error) = self.0.apply(entry) {
                self.0.failed = Some(error);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
