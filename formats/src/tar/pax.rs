//! PAX extended headers: records `LENGTH KEY=VALUE\n`, LENGTH counting itself.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::TarError;
use crate::tree::{Mtime, Xattrs};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The records of one extended header that have a meaning here. Fields with an empty value are
/// absent: they leave the header's own field alone.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) user: Option<Vec<u8>>,
    pub(super) group: Option<Vec<u8>>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) mtime: Option<Mtime>,
    pub(super) xattrs: Xattrs,
    pub(super) libarchive_xattrs: Xattrs,
    pub(super) sparse: bool,
}

impl Records {
    /// Reads the body of the extended header at stream offset `offset`.
    pub(super) fn parse(offset: u64, mut body: &[u8]) -> Result<Self, TarError> {
        let mut records = Self::default();
        let mut sparse_name = None;
        while !body.is_empty() {
            let (key, value) = next_record(&mut body).ok_or(TarError::Pax {
                offset,
                why: "a record's length, separators or line end are wrong",
            })?;
            records.set(offset, key, value, &mut sparse_name)?;
        }
        if records.sparse && sparse_name.is_some() {
            records.path = sparse_name;
        }
        Ok(records)
    }

    fn set(
        &mut self,
        offset: u64,
        key: &[u8],
        value: &[u8],
        sparse_name: &mut Option<Vec<u8>>,
    ) -> Result<(), TarError> {
        let number = |field| TarError::Number { offset, field };
        let string = || {
            if value.contains(&0) {
                return Err(TarError::Pax {
                    offset,
                    why: "a name holds a NUL",
                });
            }
            Ok((!value.is_empty()).then(|| value.to_vec()))
        };
        match key {
            b"path" => self.path = string()?,
            b"linkpath" => self.link = string()?,
            b"uname" => self.user = string()?,
            b"gname" => self.group = string()?,
            b"uid" => self.uid = decimal(value).map_err(|()| number("uid"))?,
            b"gid" => self.gid = decimal(value).map_err(|()| number("gid"))?,
            b"size" => self.size = decimal(value).map_err(|()| number("size"))?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or_else(|| number("mtime"))?),
            b"GNU.sparse.name" => {
                self.sparse = true;
                *sparse_name = string()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    if let (Some(name), Ok(value)) = (percent_decoded(name), BASE64.decode(value)) {
                        self.libarchive_xattrs.insert(name, value);
                    }
                } else if key.starts_with(b"GNU.sparse.") {
                    self.sparse = true;
                }
            }
        }
        Ok(())
    }
}

/// Takes one record from the front of `body`.
fn next_record<'a>(body: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let space = body.iter().take(20).position(|byte| *byte == b' ')?;
    let length = core::str::from_utf8(&body[..space])
        .ok()?
        .parse::<usize>()
        .ok()?;
    if length <= space + 1 || length > body.len() || !body[0].is_ascii_digit() {
        return None;
    }
    let (record, rest) = body.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return None;
    }
    *body = rest;
    Some((key, value))
}

/// A decimal number; an empty value is none.
fn decimal<T: core::str::FromStr>(value: &[u8]) -> Result<Option<T>, ()> {
    if value.is_empty() {
        return Ok(None);
    }
    if !value[0].is_ascii_digit() {
        return Err(());
    }
    core::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .map(Some)
        .ok_or(())
}

/// Seconds with an optional fraction of any length, cut to nanoseconds; the sign covers both.
fn time(value: &[u8]) -> Option<Mtime> {
    let text = core::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(core::iter::repeat(b'0'))
        .take(9)
        .fold(0_u32, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if nanos > 0 && whole.starts_with('-') {
        return Some(Mtime {
            seconds: seconds.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        });
    }
    Some(Mtime { seconds, nanos })
}

fn percent_decoded(name: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte == b'%' {
            let hex = core::str::from_utf8(rest.get(..2)?).ok()?;
            out.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &rest[2..];
        } else {
            out.push(*byte);
        }
    }
    Some(out)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One record with its length.
    pub(in crate::tar) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
        let rest = [b" ", key, b"=", value, b"\n"].concat();
        let length = (rest.len()..rest.len() + 20)
            .find(|length| length.to_string().len() + rest.len() == *length)
            .expect("some length fits");
        [length.to_string().as_bytes(), &rest].concat()
    }

    #[test]
    fn times() {
        let at = |seconds, nanos| Some(Mtime { seconds, nanos });
        for (text, expected) in [
            ("0", at(0, 0)),
            ("1234567890.123456789123", at(1_234_567_890, 123_456_789)),
            ("1.5", at(1, 500_000_000)),
            ("-0.3", at(-1, 700_000_000)),
            ("-5", at(-5, 0)),
            ("-5.25", at(-6, 750_000_000)),
            ("7.", at(7, 0)),
            ("", None),
            ("1.x", None),
            ("x", None),
            (".5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn records() {
        let body = [
            record(b"path", b"a/b"),
            record(b"size", b""),
            record(b"SCHILY.xattr.user.bin", b"a\nb=\0c\xff"),
            record(b"SCHILY.xattr.user.e", b""),
            record(b"LIBARCHIVE.xattr.user.a%3Db", b"Zm8"),
        ]
        .concat();
        let records = Records::parse(0, &body).expect("parses");
        assert_eq!(records.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(records.size, None);
        assert_eq!(records.xattrs[&b"user.bin"[..]], b"a\nb=\0c\xff");
        assert_eq!(records.xattrs[&b"user.e"[..]], b"");
        assert_eq!(records.libarchive_xattrs[&b"user.a=b"[..]], b"fo");
        assert!(!records.sparse);
    }

    #[test]
    fn malformed_records() {
        for body in [
            &b"x"[..],
            b"5 a=b",
            b"6 a=b\n\n",
            b"7 a=b\n",
            b"5 ab\n\n",
            b"4 =\n\n",
            b"-6 a=b\n",
            b"99999999999999999999999 a=b\n",
            b"13 path=a\0b\n\n",
            b"8 uid=x\n",
            b"9 size=-1\n",
        ] {
            assert!(Records::parse(0, body).is_err(), "{}", body.escape_ascii());
        }
    }
}
