//! Times as a TOC holds them: RFC 3339 text, whole seconds.

use crate::tree::Mtime;

/// What a TOC keeps of a time: nothing (1970) if its floored second is 0, else the nearest second,
/// halves rounded up.
pub fn toc_mtime(mtime: Mtime) -> Mtime {
    let seconds = match mtime.seconds {
        0 => 0,
        seconds if mtime.nanos >= 500_000_000 => seconds.saturating_add(1),
        seconds => seconds,
    };
    Mtime { seconds, nanos: 0 }
}

/// Reads `YYYY-MM-DDTHH:MM:SS[.fraction](Z|+HH:MM|-HH:MM)`.
pub(super) fn parse_rfc3339(text: &str) -> Option<Mtime> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| {
        bytes.get(from..to)?.iter().try_fold(0_i64, |value, digit| {
            digit
                .is_ascii_digit()
                .then(|| value * 10 + i64::from(digit - b'0'))
        })
    };
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if separators
        .iter()
        .any(|(at, byte)| bytes.get(*at) != Some(byte))
    {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month)
        || !(1..=days_in(year, month)).contains(&day)
        || hour > 23
        || minute > 59
        || second > 59
    {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0_u32;
    if bytes.get(at) == Some(&b'.') {
        at += 1;
        let start = at;
        while let Some(digit) = bytes.get(at).filter(|byte| byte.is_ascii_digit()) {
            if at - start < 9 {
                nanos = nanos * 10 + u32::from(digit - b'0');
            }
            at += 1;
        }
        if at == start {
            return None;
        }
        for _ in (at - start).min(9)..9 {
            nanos *= 10;
        }
    }
    let offset = match bytes.get(at)? {
        b'Z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 && bytes[at + 3] == b':' => {
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3600 + minutes * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let seconds =
        days_since_1970(year, month, day) * 86400 + hour * 3600 + minute * 60 + second - offset;
    Some(Mtime { seconds, nanos })
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    // Count whole years before this one from year 0, then whole months, then days.
    let leaps_before = |year: i64| (year + 3) / 4 - (year + 99) / 100 + (year + 399) / 400;
    let years = year * 365 + leaps_before(year);
    let months: i64 = (1..month).map(|month| days_in(year, month)).sum();
    // 1970-01-01 is day 719528 of that count.
    years + months + day - 1 - 719_528
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2023-11-14T22:13:20Z", 1_700_000_000, 0),
            ("2100-01-01T00:00:00Z", 4_102_444_800, 0),
            ("2000-02-29T12:00:00Z", 951_825_600, 0),
            ("1969-12-31T23:59:59.25Z", -1, 250_000_000),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            (
                "2023-11-15T00:13:20.1234567899+02:00",
                1_700_000_000,
                123_456_789,
            ),
            ("2023-11-14T20:13:20-02:00", 1_700_000_000, 0),
        ] {
            assert_eq!(
                parse_rfc3339(text),
                Some(Mtime { seconds, nanos }),
                "{text}"
            );
        }
        for text in [
            "",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-02-29T00:00:00Z",
            "2023-13-01T00:00:00Z",
            "2023-00-01T00:00:00Z",
            "2023-01-01T24:00:00Z",
            "2023-01-01T00:00:60Z",
            "2023-01-01T00:00:00.Z",
            "2023-01-01T00:00:00Zx",
            "2023-01-01T00:00:00+0200",
            "+023-01-01T00:00:00Z",
            "2023-01-01 00:00:00Z",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }

    #[test]
    fn what_a_toc_keeps() {
        for (seconds, nanos, kept) in [
            (0, 999_999_999, 0),
            (-1, 700_000_000, 0),
            (-1, 0, -1),
            (-1, 500_000_000, 0),
            (1, 400_000_000, 1),
            (1_400_000_000, 700_000_000, 1_400_000_001),
            (i64::MAX, 999_999_999, i64::MAX),
        ] {
            let expected = Mtime {
                seconds: kept,
                nanos: 0,
            };
            assert_eq!(toc_mtime(Mtime { seconds, nanos }), expected);
        }
    }
}
