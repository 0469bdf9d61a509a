//! A streaming tar parser: bytes in, events out, no I/O.
//!
//! Reads V7, ustar, GNU and PAX archives as Go's `archive/tar` does, because that is what the
//! ordinary unpack of an image uses and therefore what the bytes of a layer *mean*: PAX records
//! beat the header, GNU long names beat PAX, empty PAX values are ignored for header fields, global
//! PAX headers have no effect, links and devices have no payload whatever their size says, and the
//! archive ends at two zero blocks or at the end of the stream on a block boundary.
//!
//! Sparse files are recognised and reported ([`Header::sparse`]), their payload is passed through
//! as stored.

use crate::{
    limits::Limits,
    tree::{Attrs, EntryKind, Mtime, Rdev, Xattrs},
};

mod header;
mod pax;

use header::{Block, RawHeader};
use pax::Records;

/// Size of a tar block; headers and payloads start at multiples of it.
pub const BLOCK: usize = 512;

/// What a step of the parser found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// An entry begins. Its payload follows, then [`Event::EntryEnd`].
    Entry(Box<Header>),
    /// Some payload bytes of the current entry, in order; never empty.
    Payload {
        /// Where in the payload they stand.
        position: u64,
        /// The bytes, borrowed from the input.
        bytes: &'a [u8],
    },
    /// The payload of the current entry is complete (also after an entry without payload).
    EntryEnd,
    /// The end-of-archive marker. Everything after it is ignored.
    End,
}

/// Type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryType {
    /// A regular file (`0`, NUL, and GNU sparse files).
    Regular,
    /// A hard link.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// Anything else, by its type flag.
    Other(u8),
}

/// One entry with its extension headers applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Stream offset of the first block that belongs to the entry, extension headers included.
    pub offset: u64,
    /// Stream offset of its payload (of the next entry where it has none).
    pub payload_offset: u64,
    /// The path as spelt.
    pub path: Vec<u8>,
    /// Target of a link as spelt.
    pub link: Vec<u8>,
    /// Its type.
    pub kind: EntryType,
    /// Mode as spelt; may hold type bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Name of the owner.
    pub user: Vec<u8>,
    /// Name of the group.
    pub group: Vec<u8>,
    /// Bytes of payload in the stream; 0 for types that have none.
    pub size: u64,
    /// Modification time.
    pub mtime: Mtime,
    /// Device number; 0:0 where the header has none.
    pub rdev: Rdev,
    /// `SCHILY.xattr.*` records.
    pub xattrs: Xattrs,
    /// `LIBARCHIVE.xattr.*` records that decode (percent-encoded names, base64 values). An ordinary
    /// unpack ignores them.
    pub libarchive_xattrs: Xattrs,
    /// A GNU sparse file (old format or PAX 0.0, 0.1, 1.0): the payload is not the file.
    pub sparse: bool,
}

impl Header {
    /// Owner, mode, time and `SCHILY` xattrs as a tree holds them.
    pub fn attrs(&self) -> Attrs {
        Attrs {
            // Masked to 12 bits, so the cast cannot lose anything.
            mode: u16::try_from(self.mode & 0o7777).unwrap_or_default(),
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            xattrs: self.xattrs.clone(),
        }
    }

    /// The type as a tree holds it; `None` for types a tree does not have.
    pub fn entry_kind(&self) -> Option<EntryKind<'_>> {
        Some(match self.kind {
            EntryType::Regular => EntryKind::Regular { size: self.size },
            EntryType::HardLink => EntryKind::HardLink(&self.link),
            EntryType::Symlink => EntryKind::Symlink(&self.link),
            EntryType::CharDevice => EntryKind::CharDevice(self.rdev),
            EntryType::BlockDevice => EntryKind::BlockDevice(self.rdev),
            EntryType::Directory => EntryKind::Directory,
            EntryType::Fifo => EntryKind::Fifo,
            EntryType::Other(_) => return None,
        })
    }
}

/// Why bytes are not a tar archive. Offsets are stream offsets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// A header's checksum does not match its bytes.
    #[error("tar header at {offset}: checksum is {actual}, the header says {expected}")]
    Checksum {
        /// Of the header.
        offset: u64,
        /// What the header says.
        expected: u64,
        /// The sum over its bytes.
        actual: u64,
    },
    /// A field cannot be read.
    #[error("tar header at {offset}: field {field} is not a number in range")]
    Number {
        /// Of the header.
        offset: u64,
        /// The field.
        field: &'static str,
    },
    /// A PAX extension header is malformed.
    #[error("PAX header at {offset}: {why}")]
    Pax {
        /// Of the extension header.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An extension header is larger than allowed.
    #[error("tar extension header at {offset}: {actual} bytes, the limit is {limit}")]
    ExtensionTooLarge {
        /// Of the extension header.
        offset: u64,
        /// Its size.
        actual: u64,
        /// The limit.
        limit: u64,
    },
    /// A single zero block that neither ends the archive nor the stream.
    #[error("tar archive at {offset}: a zero block is followed by data")]
    LoneZeroBlock {
        /// Of the zero block.
        offset: u64,
    },
    /// The stream ended inside something.
    #[error("tar archive ends at {offset}, inside {inside}")]
    Truncated {
        /// Where the stream ended.
        offset: u64,
        /// What was not complete.
        inside: &'static str,
    },
    /// More decoded bytes than allowed.
    #[error("tar entry at {offset}: its end passes the limit of {limit} bytes")]
    TooLarge {
        /// Of the entry.
        offset: u64,
        /// The limit.
        limit: u64,
    },
}

/// The parser. Feed it with [`Parser::next_event`] until that returns `None`, then give it the next
/// bytes; call [`Parser::finish`] when there are no more.
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    /// Stream offset of the next byte that `next_event` takes.
    offset: u64,
    block: Block,
    state: State,
    /// Extension headers seen since the last entry.
    pending: Pending,
}

#[derive(Debug)]
enum State {
    Header,
    /// Collecting an extension header.
    Extension {
        kind: Extension,
        offset: u64,
        remaining: u64,
        padding: u64,
        body: Vec<u8>,
    },
    /// Dropping what has no meaning: padding, global PAX headers.
    Skip {
        remaining: u64,
    },
    /// Further sparse maps between an old GNU sparse header and its payload.
    SparseMap(Box<Header>),
    Payload {
        position: u64,
        size: u64,
    },
    /// One zero block was seen at this offset.
    Zero {
        offset: u64,
    },
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extension {
    Pax,
    LongName,
    LongLink,
}

#[derive(Debug, Default)]
struct Pending {
    first_offset: Option<u64>,
    records: Option<Records>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Parser {
    /// A parser at stream offset 0.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            offset: 0,
            block: Block::default(),
            state: State::Header,
            pending: Pending::default(),
        }
    }

    /// Takes bytes from the front of `input` until an event is complete; `None` when all bytes are
    /// taken. After an error the parser is of no further use.
    pub fn next_event<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, TarError> {
        loop {
            match &mut self.state {
                State::Header => {
                    let start = self.offset - self.block.filled();
                    let Some(block) = self.block.fill(input, &mut self.offset) else {
                        return Ok(None);
                    };
                    if block.iter().all(|byte| *byte == 0) {
                        self.state = State::Zero { offset: start };
                        continue;
                    }
                    if let Some(header) = self.read_header(start, &block)? {
                        return Ok(Some(Event::Entry(header)));
                    }
                }
                State::Extension {
                    kind,
                    offset,
                    remaining,
                    padding,
                    body,
                } => {
                    let taken = take(input, *remaining, &mut self.offset);
                    body.extend_from_slice(taken);
                    *remaining -= taken.len() as u64;
                    if *remaining > 0 {
                        return Ok(None);
                    }
                    match kind {
                        Extension::Pax => {
                            self.pending.records = Some(Records::parse(*offset, body)?);
                        }
                        Extension::LongName => self.pending.long_name = Some(text(body)),
                        Extension::LongLink => self.pending.long_link = Some(text(body)),
                    }
                    self.state = State::Skip {
                        remaining: *padding,
                    };
                }
                State::Skip { remaining } => {
                    let taken = take(input, *remaining, &mut self.offset);
                    *remaining -= taken.len() as u64;
                    if *remaining > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header;
                }
                State::SparseMap(header) => {
                    let Some(block) = self.block.fill(input, &mut self.offset) else {
                        return Ok(None);
                    };
                    if block[504] == 0 {
                        header.payload_offset = self.offset;
                        let payload = State::Payload {
                            position: 0,
                            size: header.size,
                        };
                        if let State::SparseMap(header) =
                            core::mem::replace(&mut self.state, payload)
                        {
                            return Ok(Some(Event::Entry(header)));
                        }
                    }
                }
                State::Payload { position, size } => {
                    if position == size {
                        self.state = State::Skip {
                            remaining: padding(*size),
                        };
                        return Ok(Some(Event::EntryEnd));
                    }
                    let at = *position;
                    let bytes = take(input, *size - at, &mut self.offset);
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    *position += bytes.len() as u64;
                    return Ok(Some(Event::Payload {
                        position: at,
                        bytes,
                    }));
                }
                State::Zero { offset } => {
                    let first = *offset;
                    let Some(block) = self.block.fill(input, &mut self.offset) else {
                        return Ok(None);
                    };
                    if block.iter().any(|byte| *byte != 0) {
                        return Err(TarError::LoneZeroBlock { offset: first });
                    }
                    self.state = State::Ended;
                    return Ok(Some(Event::End));
                }
                State::Ended => {
                    self.offset = self.offset.saturating_add(input.len() as u64);
                    *input = &[];
                    return Ok(None);
                }
            }
        }
    }

    /// Says that the stream is over. An archive without end-of-archive blocks, or with one, is
    /// complete when it ends on a block boundary.
    pub fn finish(&self) -> Result<(), TarError> {
        let inside = match &self.state {
            State::Header | State::Zero { .. } if self.block.filled() > 0 => "a header",
            State::Header if self.pending.first_offset.is_some() => {
                "an entry whose extension headers are complete"
            }
            State::Header | State::Zero { .. } | State::Ended => return Ok(()),
            State::Extension { .. } => "an extension header",
            State::Skip { .. } => "padding",
            State::SparseMap(_) => "a sparse map",
            State::Payload { .. } => "a payload",
        };
        Err(TarError::Truncated {
            offset: self.offset,
            inside,
        })
    }

    /// Reads one non-zero header block and enters the state that follows it.
    fn read_header(
        &mut self,
        start: u64,
        block: &[u8; BLOCK],
    ) -> Result<Option<Box<Header>>, TarError> {
        let raw = RawHeader::new(start, block)?;
        let first_offset = *self.pending.first_offset.get_or_insert(start);
        let extension = match raw.flag() {
            b'x' => Extension::Pax,
            b'L' => Extension::LongName,
            b'K' => Extension::LongLink,
            b'g' => {
                let size = raw.size()?;
                self.state = State::Skip {
                    remaining: self.payload_span(start, size)?,
                };
                // A global header is no part of the next entry.
                if first_offset == start {
                    self.pending.first_offset = None;
                }
                return Ok(None);
            }
            _ => return self.read_entry(first_offset, &raw),
        };
        let size = raw.size()?;
        let limit = u64::from(self.limits.max_extension_bytes);
        if size > limit {
            return Err(TarError::ExtensionTooLarge {
                offset: start,
                actual: size,
                limit,
            });
        }
        self.state = State::Extension {
            kind: extension,
            offset: start,
            remaining: size,
            padding: padding(size),
            body: Vec::new(),
        };
        Ok(None)
    }

    fn read_entry(
        &mut self,
        first_offset: u64,
        raw: &RawHeader<'_>,
    ) -> Result<Option<Box<Header>>, TarError> {
        let pending = core::mem::take(&mut self.pending);
        let mut header = raw.header(pending.records.unwrap_or_default())?;
        if let Some(name) = pending.long_name.filter(|name| !name.is_empty()) {
            header.path = name;
        }
        if let Some(link) = pending.long_link.filter(|link| !link.is_empty()) {
            header.link = link;
        }
        // Archives of V7 times have directories as files whose name ends in a slash.
        if raw.flag() == 0 && header.path.ends_with(b"/") {
            header.kind = EntryType::Directory;
        }
        if !matches!(header.kind, EntryType::Regular | EntryType::Other(_)) {
            header.size = 0;
        }
        header.offset = first_offset;
        header.payload_offset = self.offset;
        self.payload_span(raw.offset(), header.size)?;
        let header = Box::new(header);
        if raw.has_further_sparse_maps() {
            // The entry is reported when its maps are read.
            self.state = State::SparseMap(header);
            return Ok(None);
        }
        self.state = State::Payload {
            position: 0,
            size: header.size,
        };
        Ok(Some(header))
    }

    /// `size` rounded up to whole blocks, checked against the limit on decoded bytes.
    fn payload_span(&self, start: u64, size: u64) -> Result<u64, TarError> {
        let limit = self.limits.max_decoded_bytes;
        size.checked_add(padding(size))
            .filter(|span| {
                self.offset
                    .checked_add(*span)
                    .is_some_and(|end| end <= limit)
            })
            .ok_or(TarError::TooLarge {
                offset: start,
                limit,
            })
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Bytes up to the first NUL.
fn text(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes[..end.unwrap_or(bytes.len())].to_vec()
}

/// Takes up to `wanted` bytes from the front of `input`.
fn take<'a>(input: &mut &'a [u8], wanted: u64, offset: &mut u64) -> &'a [u8] {
    let count = usize::try_from(wanted)
        .unwrap_or(usize::MAX)
        .min(input.len());
    let (taken, rest) = input.split_at(count);
    *input = rest;
    *offset += count as u64;
    taken
}

#[cfg(test)]
mod tests;
