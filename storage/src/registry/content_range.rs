//! `Content-Range: bytes 0-99/1000`.

use std::ops::Range;

/// A part of a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    pub(super) range: Range<u64>,
    /// Length of the whole; `None` for `*`.
    pub(super) total: Option<u64>,
}

impl ContentRange {
    /// Parses the value of the header; `None` for anything but a non-empty satisfied byte range.
    pub(super) fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?.trim();
        let (unit, rest) = text.split_once([' ', '='])?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (range, total) = rest.split_once('/')?;
        let (first, last) = range.trim().split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        let end = last.checked_add(1)?;
        let total = match total.trim() {
            "*" => None,
            total => Some(number(total)?),
        };
        let is_valid = first < end && total.is_none_or(|total| end <= total);
        is_valid.then_some(Self {
            range: first..end,
            total,
        })
    }
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    // `parse` would accept a sign.
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Option<(u64, u64, Option<u64>)> {
        let parsed = ContentRange::parse(text.as_bytes())?;
        Some((parsed.range.start, parsed.range.end, parsed.total))
    }

    #[test]
    fn valid_and_invalid_values() {
        assert_eq!(parse("bytes 0-99/1000"), Some((0, 100, Some(1000))));
        assert_eq!(parse("Bytes 5-5/*"), Some((5, 6, None)));
        assert_eq!(parse(" bytes 1 - 2 / 3 "), Some((1, 3, Some(3))));
        assert_eq!(parse("bytes=0-1/2"), Some((0, 2, Some(2))));
        for bad in [
            "",
            "bytes",
            "bytes */1000",
            "bytes 0-99",
            "bytes 9-5/10",
            "bytes 0-10/10",
            "items 0-1/2",
            "bytes -1-5/9",
            "bytes +1-5/9",
            "bytes 0-18446744073709551615/*",
            "bytes a-b/c",
            "bytes 0-/5",
            "bytes 0-1/",
            "bytes 0-1/2/3",
            "bytes 99999999999999999999-1/2",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(ContentRange::parse(b"bytes \xff"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(value in proptest::collection::vec(any::<u8>(), 0..60)) {
            ContentRange::parse(&value);
        }

        #[test]
        fn ranges_round_trip(start in 0u64..1 << 50, len in 1u64..1 << 50, more in proptest::option::of(0u64..1 << 50)) {
            let range = start..start + len;
            let total = more.map(|more| range.end + more);
            let shown = total.map_or("*".to_owned(), |total| total.to_string());
            let header = format!("bytes {}-{}/{shown}", range.start, range.end - 1);
            prop_assert_eq!(ContentRange::parse(header.as_bytes()), Some(ContentRange { range, total }));
        }
    }
}
