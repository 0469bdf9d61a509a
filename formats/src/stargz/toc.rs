//! The TOC: from its gzip member to a [`StargzLayer`].

use core::fmt;

use serde::{
    Deserializer as _,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    TOC_TAR_NAME,
    entry::{RawEntry, Text},
};
use crate::{
    blobmap::BlobMap,
    digest::Digest,
    gzip::{GzipError, Inflater},
    limits::Limits,
    tar::{EntryType, Event, Parser, TarError},
    tree::{BuildError, LayerTree, NotLazyReason, TreePath},
    units::RemoteOffset,
};

mod reader;

use reader::Reader;

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
