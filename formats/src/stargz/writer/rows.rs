//! The TOC's JSON, row by row.

use std::collections::{BTreeMap, HashMap};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;

use super::WriteError;
use crate::{
    digest::Digest,
    stargz::toc_mtime,
    tar::{EntryType, Header},
};

/// What a regular file's payload became.
pub(super) struct Payload {
    /// SHA-256 of all of it.
    pub(super) whole: Digest,
    /// Where the member of each chunk starts, and its SHA-256.
    pub(super) chunks: Vec<(u64, Digest)>,
    chunk_size: u64,
}

impl Payload {
    pub(super) fn new(chunk_size: u64) -> Self {
        Self {
            whole: Digest::from_bytes([0; 32]),
            chunks: Vec::new(),
            chunk_size,
        }
    }
}

/// An entry of the TOC, in the order in which upstream writes its fields.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    modtime: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_name: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    mode: u64,
    #[serde(skip_serializing_if = "is_zero")]
    uid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group_name: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_minor: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_digest: Option<Digest>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape that serde calls"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The JSON so far.
pub(super) struct Rows {
    json: Vec<u8>,
    limit: u64,
    /// The name last written for an id: others are left out.
    users: HashMap<u32, Vec<u8>>,
    groups: HashMap<u32, Vec<u8>>,
}

impl Rows {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            json: br#"{"version":1,"entries":["#.to_vec(),
            limit,
            users: HashMap::new(),
            groups: HashMap::new(),
        }
    }

    /// Adds an entry of the archive. `payload` is that of a regular file.
    pub(super) fn push(
        &mut self,
        header: &Header,
        payload: Option<Payload>,
    ) -> Result<(), WriteError> {
        let name = text(&header.path);
        let user = changed(&mut self.users, header.uid, &header.user);
        let group = changed(&mut self.groups, header.gid, &header.group);
        let link = text(&header.link);
        let is_device = matches!(header.kind, EntryType::CharDevice | EntryType::BlockDevice);
        let is_link = matches!(header.kind, EntryType::HardLink | EntryType::Symlink);
        let row = Row {
            name: &name,
            kind: kind(header.kind),
            size: header.size,
            // The floored second decides whether a time is written at all.
            modtime: (header.mtime.seconds != 0)
                .then(|| rfc3339(toc_mtime(header.mtime).seconds))
                .flatten(),
            link_name: is_link.then_some(&*link),
            mode: u64::from(header.mode),
            uid: u64::from(header.uid),
            gid: u64::from(header.gid),
            user_name: user.as_deref(),
            group_name: group.as_deref(),
            dev_major: if is_device {
                header.rdev.major.into()
            } else {
                0
            },
            dev_minor: if is_device {
                header.rdev.minor.into()
            } else {
                0
            },
            xattrs: header
                .xattrs
                .iter()
                .map(|(name, value)| (text(name), STANDARD.encode(value)))
                .collect(),
            ..Row::default()
        };
        self.push_rows(row, payload)
    }

    /// Adds a regular file that has neither owner, mode nor time.
    pub(super) fn push_plain(
        &mut self,
        name: &str,
        size: u64,
        payload: Payload,
    ) -> Result<(), WriteError> {
        let row = Row {
            name,
            kind: "reg",
            size,
            ..Row::default()
        };
        self.push_rows(row, Some(payload))
    }

    fn push_rows(&mut self, mut row: Row<'_>, payload: Option<Payload>) -> Result<(), WriteError> {
        let Some(payload) = payload else {
            return self.write(&row);
        };
        row.digest = Some(payload.whole);
        let (name, size) = (row.name, row.size);
        let mut chunk_offset = 0;
        for (offset, digest) in payload.chunks {
            row.offset = offset;
            row.chunk_offset = chunk_offset;
            // The last chunk's size follows from the file's, except where it is a full one.
            if size - chunk_offset >= payload.chunk_size {
                row.chunk_size = payload.chunk_size;
            }
            row.chunk_digest = Some(digest);
            self.write(&row)?;
            chunk_offset += payload.chunk_size;
            row = Row {
                name,
                kind: "chunk",
                ..Row::default()
            };
        }
        if size == 0 {
            self.write(&row)?;
        }
        Ok(())
    }

    fn write(&mut self, row: &Row<'_>) -> Result<(), WriteError> {
        if !self.json.ends_with(b"[") {
            self.json.push(b',');
        }
        #[expect(
            clippy::expect_used,
            reason = "strings and numbers serialise, and a Vec takes them all"
        )]
        serde_json::to_writer(&mut self.json, row).expect("a row serialises");
        self.check()
    }

    fn check(&self) -> Result<(), WriteError> {
        if self.json.len() as u64 > self.limit {
            return Err(WriteError::TocTooLarge { limit: self.limit });
        }
        Ok(())
    }

    /// The whole TOC.
    pub(super) fn finish(&mut self) -> Result<Vec<u8>, WriteError> {
        self.json.extend_from_slice(b"]}");
        self.check()?;
        Ok(core::mem::take(&mut self.json))
    }
}

fn kind(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Regular => "reg",
        EntryType::HardLink => "hardlink",
        EntryType::Symlink => "symlink",
        EntryType::CharDevice => "char",
        EntryType::BlockDevice => "block",
        EntryType::Directory => "dir",
        // `Source` lets no other types in.
        EntryType::Fifo | EntryType::Other(_) => "fifo",
    }
}

/// The name if it is not the one that was last written for this id.
fn changed(names: &mut HashMap<u32, Vec<u8>>, id: u32, name: &[u8]) -> Option<String> {
    if name.is_empty() || names.get(&id).is_some_and(|last| last == name) {
        return None;
    }
    names.insert(id, name.to_vec());
    Some(text(name))
}

/// Bytes as JSON text. What is not UTF-8 becomes U+FFFD, byte by byte as Go does it.
fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for _ in chunk.invalid() {
            text.push('\u{fffd}');
        }
    }
    text
}

/// A second since 1970 as `YYYY-MM-DDTHH:MM:SSZ`; `None` outside of the years 0 to 9999, which no
/// reader would accept.
fn rfc3339(seconds: i64) -> Option<String> {
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Years that begin in March have their leap day last. 719,468 days lie between the first of
    // March of year 0 and 1970; 400 years have 146,097 days.
    let days = days.checked_add(719_468)?;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year + i64::from(month >= 10);
    let month = if month < 10 { month + 3 } else { month - 9 };
    (0..=9999).contains(&year).then(|| {
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stargz::time::parse_rfc3339;

    #[test]
    fn times_are_read_back() {
        for seconds in [
            0,
            -1,
            1,
            951_782_399,
            951_782_400,
            951_868_800,
            1_700_000_000,
            4_107_542_399,
            -62_135_596_800,
            -2_208_988_800,
            253_402_300_799,
        ] {
            let text = rfc3339(seconds).unwrap();
            let read = parse_rfc3339(&text).unwrap();
            assert_eq!((read.seconds, read.nanos), (seconds, 0), "{text}");
        }
        for day in (-800_000..2_900_000_i64).step_by(7) {
            let seconds = day * 86400 + 86399;
            if let Some(text) = rfc3339(seconds) {
                assert_eq!(parse_rfc3339(&text).unwrap().seconds, seconds, "{text}");
            }
        }
        assert_eq!(rfc3339(253_402_300_800), None);
        assert_eq!(rfc3339(i64::MIN), None);
        assert_eq!(rfc3339(i64::MAX), None);
    }

    #[test]
    fn what_is_not_utf8_is_replaced_byte_by_byte() {
        assert_eq!(text(b"a\xe2\x82b\xff"), "a\u{fffd}\u{fffd}b\u{fffd}");
        assert_eq!(text("\u{fc}".as_bytes()), "\u{fc}");
    }

    #[test]
    fn names_are_written_when_they_change() {
        let mut names = HashMap::new();
        assert_eq!(changed(&mut names, 0, b""), None);
        assert_eq!(changed(&mut names, 0, b"root").as_deref(), Some("root"));
        assert_eq!(changed(&mut names, 0, b"root"), None);
        assert_eq!(changed(&mut names, 1, b"root").as_deref(), Some("root"));
        assert_eq!(changed(&mut names, 0, b"toor").as_deref(), Some("toor"));
    }
}
