//! The `Range` header (RFC 9110, 14.2) against a blob of known size.

use std::ops::Range;

/// More ranges than this in one header are ignored, as the RFC lets a server do.
const MAX_RANGES: usize = 4096;

/// What part of a blob a request is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// All of it, status 200.
    Whole,
    /// One stretch, status 206.
    One(Range<u64>),
    /// Several stretches as `multipart/byteranges`, status 206.
    Many(Vec<Range<u64>>),
    /// Status 416.
    Unsatisfiable,
}

impl Selection {
    /// What `header` selects from a blob of `size` bytes.
    ///
    /// Ends are clamped. Another unit than bytes is ignored; bytes that cannot be parsed, that run
    /// backwards or of which none exists are unsatisfiable. Ranges that add up to more than the
    /// blob get the whole blob, as docker-registry answers them.
    pub(crate) fn parse(header: Option<&str>, size: u64) -> Self {
        let Some(header) = header else {
            return Self::Whole;
        };
        let Some(list) = header
            .trim()
            .split_once('=')
            .filter(|(unit, _)| unit.trim().eq_ignore_ascii_case("bytes"))
            .map(|(_, list)| list)
        else {
            return Self::Whole;
        };
        let mut ranges = Vec::new();
        let mut specs = 0_usize;
        for spec in list.split(',').map(str::trim).filter(|s| !s.is_empty()) {
            specs += 1;
            match parse_one(spec, size) {
                Spec::Malformed => return Self::Unsatisfiable,
                Spec::Outside => {}
                Spec::Range(range) => ranges.push(range),
            }
        }
        let total = ranges.iter().fold(0_u64, |sum, range| {
            sum.saturating_add(range.end - range.start)
        });
        match ranges.len() {
            0 => Self::Unsatisfiable,
            1 => Self::One(ranges.remove(0)),
            _ if specs > MAX_RANGES || total > size => Self::Whole,
            _ => Self::Many(ranges),
        }
    }

    /// Whether any selected byte lies in `span`.
    pub(crate) fn touches(&self, span: &Range<u64>, size: u64) -> bool {
        let overlaps = |range: &Range<u64>| range.start < span.end && span.start < range.end;
        match self {
            Self::Whole => overlaps(&(0..size)),
            Self::One(range) => overlaps(range),
            Self::Many(ranges) => ranges.iter().any(overlaps),
            Self::Unsatisfiable => false,
        }
    }
}

enum Spec {
    Malformed,
    Outside,
    Range(Range<u64>),
}

fn parse_one(spec: &str, size: u64) -> Spec {
    let Some((first, last)) = spec.split_once('-') else {
        return Spec::Malformed;
    };
    let (first, last) = (first.trim(), last.trim());
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => {
            if suffix == 0 || size == 0 {
                Spec::Outside
            } else {
                Spec::Range(size.saturating_sub(suffix)..size)
            }
        }
        (Some(start), last_number) => {
            let end = match last_number {
                None if last.is_empty() => size,
                None => return Spec::Malformed,
                Some(last) if last < start => return Spec::Malformed,
                Some(last) => last.saturating_add(1).min(size),
            };
            if start >= size {
                Spec::Outside
            } else {
                Spec::Range(start..end)
            }
        }
        _ => Spec::Malformed,
    }
}

/// Digits only; what does not fit is as good as infinite.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::{Selection::*, *};

    fn select(header: &str) -> Selection {
        Selection::parse(Some(header), 1000)
    }

    #[test]
    fn single_ranges_are_exact_and_clamped() {
        assert_eq!(Selection::parse(None, 1000), Whole);
        assert_eq!(select("bytes=0-0"), One(0..1));
        assert_eq!(select("bytes=10-19"), One(10..20));
        assert_eq!(select("Bytes = 10-19"), One(10..20));
        assert_eq!(select("bytes=990-"), One(990..1000));
        assert_eq!(select("bytes=-1"), One(999..1000));
        assert_eq!(select("bytes=-5000"), One(0..1000));
        assert_eq!(select("bytes=999-99999999999999999999999"), One(999..1000));
    }

    #[test]
    fn nothing_to_give_is_unsatisfiable() {
        for header in [
            "bytes=1000-",
            "bytes=1000-1001",
            "bytes=-0",
            "bytes=5-4",
            "bytes=",
            "bytes=x-y",
            "bytes=-",
            "bytes=1",
            "bytes=1-2-3",
            "bytes=+1-2",
            "bytes=99999999999999999999999-",
            "bytes=0-1,oops",
        ] {
            assert_eq!(select(header), Unsatisfiable, "{header}");
        }
        assert_eq!(Selection::parse(Some("bytes=0-"), 0), Unsatisfiable);
        assert_eq!(Selection::parse(Some("bytes=-5"), 0), Unsatisfiable);
    }

    #[test]
    fn several_ranges() {
        assert_eq!(
            select("bytes=0-1, 5-6 ,,-1"),
            Many(vec![0..2, 5..7, 999..1000])
        );
        assert_eq!(select("bytes=0-1,2000-"), One(0..2));
        assert_eq!(select("bytes=0-,0-"), Whole);
        assert_eq!(select("lines=1-2"), Whole);
    }

    #[test]
    fn touching_is_half_open() {
        assert!(select("bytes=0-9").touches(&(9..10), 1000));
        assert!(!select("bytes=0-9").touches(&(10..11), 1000));
        assert!(Whole.touches(&(999..1000), 1000));
        assert!(!Whole.touches(&(1000..1001), 1000));
    }
}
