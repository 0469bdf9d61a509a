//! The footer: an empty gzip member whose extra field says where the TOC is.

use core::ops::Range;

use crate::{tree::NotLazyReason, units::RemoteOffset};

/// Length of the longest footer: fetching this many last bytes of a blob is enough.
pub const MAX_FOOTER_LEN: u64 = ESTARGZ_LEN as u64;

const ESTARGZ_LEN: usize = 51;
const LEGACY_LEN: usize = 47;
const EXTERNAL_LEN: usize = 46;
/// gzip header with an extra field, no time, operating system unknown.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
/// A final empty stored block, CRC-32 0, length 0.
const EMPTY_BODY: [u8; 13] = [1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
const MAGIC: &[u8] = b"STARGZ";
const EXTERNAL_MAGIC: &[u8] = b"STARGZEXTERNALTOC";

/// Which footer a blob has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FooterKind {
    /// eStargz: the TOC is in the blob, its digest in the manifest.
    EStargz,
    /// Stargz of the first generation (CRFS).
    Legacy,
    /// The TOC is in another image.
    ExternalToc,
}

/// A footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Which one.
    pub kind: FooterKind,
    /// Where the TOC's gzip member starts; for [`FooterKind::ExternalToc`] where it would, which
    /// is where the footer starts.
    pub toc_offset: RemoteOffset,
    /// Length of the footer itself.
    pub footer_len: u64,
}

/// Why a blob has no footer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FooterError {
    /// Too few bytes for any footer.
    #[error("a blob of {blob_len} bytes has no room for a stargz footer (got its last {got})")]
    TooShort {
        /// Length of the blob.
        blob_len: u64,
        /// How many of its last bytes were given.
        got: usize,
    },
    /// The last bytes are no stargz footer: an ordinary layer.
    #[error("the blob does not end in a stargz footer")]
    NotStargz,
    /// There is a footer, but the offset in it is not written as it must be.
    #[error("the stargz footer's TOC offset {0:?} is not 16 lower-case hex digits")]
    OffsetSyntax(String),
    /// The TOC cannot be where the footer says.
    #[error(
        "the stargz footer puts the TOC at {toc_offset}, but the footer itself starts at {footer_offset}"
    )]
    OffsetRange {
        /// Where the TOC is said to be.
        toc_offset: u64,
        /// Where the footer starts.
        footer_offset: u64,
    },
}

impl Footer {
    /// The remote range of the TOC's member(s) in a blob of `blob_len` bytes.
    pub fn toc_range(&self, blob_len: u64) -> Range<u64> {
        self.toc_offset.0
            ..blob_len
                .saturating_sub(self.footer_len)
                .max(self.toc_offset.0)
    }

    /// Why a layer with this footer is not served lazily, if it is not.
    pub fn not_lazy(&self) -> Option<NotLazyReason> {
        match self.kind {
            FooterKind::EStargz => None,
            FooterKind::Legacy => Some(NotLazyReason::LegacyFormat),
            FooterKind::ExternalToc => Some(NotLazyReason::ExternalToc),
        }
    }
}

/// Reads the footer from `tail`, the last bytes of a blob of `blob_len` bytes: at least
/// [`MAX_FOOTER_LEN`] of them, or the whole blob.
pub fn parse_footer(tail: &[u8], blob_len: u64) -> Result<Footer, FooterError> {
    if tail.len() < EXTERNAL_LEN || (tail.len() as u64) > blob_len {
        return Err(FooterError::TooShort {
            blob_len,
            got: tail.len(),
        });
    }
    let footers: [(FooterKind, usize, &[u8]); 3] = [
        (FooterKind::EStargz, ESTARGZ_LEN, b"SG\x16\x00"),
        (FooterKind::Legacy, LEGACY_LEN, b""),
        (FooterKind::ExternalToc, EXTERNAL_LEN, b"SG\x11\x00"),
    ];
    for (kind, len, subfield) in footers {
        let Some(extra) = tail
            .len()
            .checked_sub(len)
            .and_then(|at| extra_field(&tail[at..]))
        else {
            continue;
        };
        let Some(value) = extra.strip_prefix(subfield) else {
            continue;
        };
        let footer_len = len as u64;
        let footer_offset = blob_len - footer_len;
        if kind == FooterKind::ExternalToc {
            if value == EXTERNAL_MAGIC {
                return Ok(Footer {
                    kind,
                    toc_offset: RemoteOffset(footer_offset),
                    footer_len,
                });
            }
            continue;
        }
        let Some(hex) = value.strip_suffix(MAGIC).filter(|hex| hex.len() == 16) else {
            continue;
        };
        let toc_offset =
            offset(hex).ok_or_else(|| FooterError::OffsetSyntax(hex.escape_ascii().to_string()))?;
        if toc_offset >= footer_offset {
            return Err(FooterError::OffsetRange {
                toc_offset,
                footer_offset,
            });
        }
        return Ok(Footer {
            kind,
            toc_offset: RemoteOffset(toc_offset),
            footer_len,
        });
    }
    Err(FooterError::NotStargz)
}

/// The extra field of an empty gzip member that is exactly `footer`.
fn extra_field(footer: &[u8]) -> Option<&[u8]> {
    let rest = footer.strip_prefix(&HEADER)?;
    let extra = rest.strip_suffix(&EMPTY_BODY)?;
    let (len, extra) = extra.split_at_checked(2)?;
    (usize::from(u16::from_le_bytes([len[0], len[1]])) == extra.len()).then_some(extra)
}

fn offset(hex: &[u8]) -> Option<u64> {
    hex.iter().try_fold(0_u64, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(subfield: &[u8], value: &[u8]) -> Vec<u8> {
        let extra = [subfield, value].concat();
        let len = u16::try_from(extra.len()).expect("short").to_le_bytes();
        [&HEADER[..], &len, &extra, &EMPTY_BODY].concat()
    }

    fn blob(footer: &[u8]) -> Vec<u8> {
        [&[0; 4096][..], footer].concat()
    }

    fn parse(blob: &[u8]) -> Result<Footer, FooterError> {
        parse_footer(&blob[blob.len().saturating_sub(51)..], blob.len() as u64)
    }

    #[test]
    fn the_three_kinds() {
        let estargz = blob(&footer(b"SG\x16\0", b"000000000000013eSTARGZ"));
        let found = parse(&estargz).expect("parses");
        assert_eq!(found.kind, FooterKind::EStargz);
        assert_eq!(found.toc_offset, RemoteOffset(0x13e));
        assert_eq!(found.toc_range(estargz.len() as u64), 0x13e..4096);
        assert_eq!(found.not_lazy(), None);

        let legacy = blob(&footer(b"", b"0000000000000fffSTARGZ"));
        assert_eq!(parse(&legacy).expect("parses").kind, FooterKind::Legacy);

        let external = blob(&footer(b"SG\x11\0", EXTERNAL_MAGIC));
        let found = parse(&external).expect("parses");
        assert_eq!(found.kind, FooterKind::ExternalToc);
        assert!(found.toc_range(external.len() as u64).is_empty());
        assert!(found.not_lazy().is_some());
    }

    #[test]
    fn hostile_footers() {
        for (value, expected) in [
            (&b"-000000000000001STARGZ"[..], "OffsetSyntax"),
            (b"+00000000000001eSTARGZ", "OffsetSyntax"),
            (b"000000000000013ESTARGZ", "OffsetSyntax"),
            (b"0000000000001000STARGZ", "OffsetRange"),
            (b"ffffffffffffffffSTARGZ", "OffsetRange"),
            (b"000000000000013eSTARGX", "NotStargz"),
        ] {
            let error = parse(&blob(&footer(b"SG\x16\0", value))).expect_err("hostile");
            assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        }
        for bytes in [&b""[..], &[0; 10], &[0; 45]] {
            assert!(matches!(
                parse_footer(bytes, bytes.len() as u64),
                Err(FooterError::TooShort { .. })
            ));
        }
        assert_eq!(parse(&[0; 60]), Err(FooterError::NotStargz));
        let whole = footer(b"SG\x16\0", b"0000000000000000STARGZ");
        assert!(matches!(
            parse(&whole),
            Err(FooterError::OffsetRange { .. })
        ));
        // More bytes than the blob has.
        assert!(parse_footer(&whole, 10).is_err());
    }
}
