//! One 512-byte tar header block: V7, ustar, star and GNU.
//!
//! | offset | length | field | |
//! |---|---|---|---|
//! | 0 | 100 | name | |
//! | 100, 108, 116 | 8 | mode, uid, gid | octal text or base-256 |
//! | 124 | 12 | size | |
//! | 136 | 12 | mtime | |
//! | 148 | 8 | checksum | sum of all bytes, this field as spaces |
//! | 156 | 1 | type flag | |
//! | 157 | 100 | link target | |
//! | 257 | 6 | magic | `ustar\0`, or `ustar ` with version ` \0` for GNU |
//! | 265, 297 | 32 | user and group name | not in V7 |
//! | 329, 337 | 8 | device major, minor | not in V7 |
//! | 345 | 155 | path prefix | ustar; 131 bytes in star |
//! | 345 | 12 | access time | GNU, as is change time at 357 |
//! | 482 | 1 | more sparse maps follow | GNU sparse |

use super::{BLOCK, EntryType, Header, TarError, pax::Records, text};
use crate::tree::{Mtime, Rdev, Xattrs};

/// A block that arrives in pieces.
#[derive(Debug)]
pub(super) struct Block {
    bytes: [u8; BLOCK],
    filled: usize,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            bytes: [0; BLOCK],
            filled: 0,
        }
    }
}

impl Block {
    /// Bytes of the current block that arrived already.
    pub(super) fn filled(&self) -> u64 {
        self.filled as u64
    }

    /// Takes bytes from `input` until the block is complete, and gives it.
    pub(super) fn fill(&mut self, input: &mut &[u8], offset: &mut u64) -> Option<[u8; BLOCK]> {
        let taken = super::take(input, (BLOCK - self.filled) as u64, offset);
        self.bytes[self.filled..self.filled + taken.len()].copy_from_slice(taken);
        self.filled += taken.len();
        if self.filled < BLOCK {
            return None;
        }
        self.filled = 0;
        Some(self.bytes)
    }
}

/// A header block whose checksum is right.
#[derive(Debug)]
pub(super) struct RawHeader<'a> {
    offset: u64,
    block: &'a [u8; BLOCK],
    dialect: Dialect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'a> RawHeader<'a> {
    pub(super) fn new(offset: u64, block: &'a [u8; BLOCK]) -> Result<Self, TarError> {
        let dialect = match (&block[257..263], &block[263..265], &block[508..512]) {
            (b"ustar\0", _, b"tar\0") => Dialect::Star,
            (b"ustar\0", _, _) => Dialect::Ustar,
            (b"ustar ", b" \0", _) => Dialect::Gnu,
            _ => Dialect::V7,
        };
        let header = Self {
            offset,
            block,
            dialect,
        };
        let expected = header.number(148..156, "checksum", octal)?;
        // Some old archivers summed signed bytes.
        let mut unsigned = 0_i64;
        let mut signed = 0_i64;
        for (index, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&index) {
                b' '
            } else {
                *byte
            };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if expected != unsigned && expected != signed {
            return Err(TarError::Checksum {
                offset,
                expected: expected.cast_unsigned(),
                actual: unsigned.cast_unsigned(),
            });
        }
        Ok(header)
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn flag(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        let size = self.number(124..136, "size", numeric)?;
        u64::try_from(size).map_err(|_| self.out_of_range("size"))
    }

    pub(super) fn has_further_sparse_maps(&self) -> bool {
        self.flag() == b'S' && self.block[482] != 0
    }

    /// The entry, with the records of its PAX header applied.
    pub(super) fn header(&self, records: Records) -> Result<Header, TarError> {
        let field = |range: core::ops::Range<usize>| text(&self.block[range]);
        let kind = match self.flag() {
            0 | b'0' | b'S' => EntryType::Regular,
            b'1' => EntryType::HardLink,
            b'2' => EntryType::Symlink,
            b'3' => EntryType::CharDevice,
            b'4' => EntryType::BlockDevice,
            b'5' => EntryType::Directory,
            b'6' => EntryType::Fifo,
            other => EntryType::Other(other),
        };
        let mut path = field(0..100);
        let prefix = self.prefix();
        if !prefix.is_empty() {
            path = [&prefix[..], b"/", &path].concat();
        }
        let (user, group, rdev) = if self.dialect == Dialect::V7 {
            (Vec::new(), Vec::new(), Rdev::default())
        } else {
            let rdev = Rdev {
                major: self.u32_field(329..337, "device major")?,
                minor: self.u32_field(337..345, "device minor")?,
            };
            (field(265..297), field(297..329), rdev)
        };
        let mode = self.number(100..108, "mode", numeric)?;
        let seconds = self.number(136..148, "mtime", numeric)?;
        let mut header = Header {
            offset: self.offset,
            payload_offset: self.offset,
            path,
            link: field(157..257),
            kind,
            // Only the lower bits have a meaning; writers put all sorts of things above them.
            mode: u32::try_from(mode & 0o7_777_777).unwrap_or_default(),
            uid: 0,
            gid: 0,
            user,
            group,
            size: 0,
            mtime: Mtime { seconds, nanos: 0 },
            rdev,
            xattrs: Xattrs::new(),
            libarchive_xattrs: Xattrs::new(),
            sparse: self.flag() == b'S',
        };
        // A PAX record stands in for a field that cannot hold the value, so the field is not read.
        header.uid = match records.uid {
            Some(uid) => uid,
            None => self.u32_field(108..116, "uid")?,
        };
        header.gid = match records.gid {
            Some(gid) => gid,
            None => self.u32_field(116..124, "gid")?,
        };
        header.size = match records.size {
            Some(size) => size,
            None => self.size()?,
        };
        if let Some(mtime) = records.mtime {
            header.mtime = mtime;
        }
        replace(&mut header.path, records.path);
        replace(&mut header.link, records.link);
        replace(&mut header.user, records.user);
        replace(&mut header.group, records.group);
        header.xattrs = records.xattrs;
        header.libarchive_xattrs = records.libarchive_xattrs;
        header.sparse |= records.sparse;
        Ok(header)
    }

    fn prefix(&self) -> Vec<u8> {
        match self.dialect {
            Dialect::V7 => Vec::new(),
            Dialect::Ustar => text(&self.block[345..500]),
            Dialect::Star => text(&self.block[345..476]),
            Dialect::Gnu => {
                // GNU keeps times here. Go before 1.9 wrote a path prefix into GNU headers; it is
                // recognised by not being a time.
                let is_time = |field: &[u8]| field.first() == Some(&0) || numeric(field).is_some();
                if is_time(&self.block[345..357]) && is_time(&self.block[357..369]) {
                    return Vec::new();
                }
                let prefix = text(&self.block[345..500]);
                if prefix.is_ascii() {
                    prefix
                } else {
                    Vec::new()
                }
            }
        }
    }

    fn u32_field(
        &self,
        range: core::ops::Range<usize>,
        field: &'static str,
    ) -> Result<u32, TarError> {
        let number = self.number(range, field, numeric)?;
        u32::try_from(number).map_err(|_| self.out_of_range(field))
    }

    fn number(
        &self,
        range: core::ops::Range<usize>,
        field: &'static str,
        parse: fn(&[u8]) -> Option<i64>,
    ) -> Result<i64, TarError> {
        parse(&self.block[range]).ok_or_else(|| self.out_of_range(field))
    }

    fn out_of_range(&self, field: &'static str) -> TarError {
        TarError::Number {
            offset: self.offset,
            field,
        }
    }
}

/// Octal text, or base-256 when the first bit is set: two's complement, big endian, the first bit
/// being only the mark.
fn numeric(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    let negative = first & 0x40 != 0;
    let start = if negative {
        -0x40 | i64::from(first & 0x3f)
    } else {
        i64::from(first & 0x3f)
    };
    rest.iter().try_fold(start, |value, byte| {
        value.checked_mul(256)?.checked_add(i64::from(*byte))
    })
}

/// Octal text between spaces and NULs; nothing at all is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte));
    let Some(start) = start else { return Some(0) };
    let end = field.iter().rposition(|byte| !blank(byte))? + 1;
    let digits = field[start..end].split(|byte| *byte == 0).next()?;
    digits.iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

fn replace(field: &mut Vec<u8>, record: Option<Vec<u8>>) {
    if let Some(value) = record {
        *field = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b" 644 \0\0\0", Some(0o644)),
            (b"        ", Some(0)),
            (b"\0\0\0\0", Some(0)),
            (b"0000008\0", None),
            (b"12 34\0", None),
            (b"\x80\0\0\0\0\0\0\x2a", Some(42)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe",
                Some(-2),
            ),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ] {
            assert_eq!(numeric(field), value, "{}", field.escape_ascii());
        }
    }
}
