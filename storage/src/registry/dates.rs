//! The few date forms that registries and object stores use, as seconds since the Unix epoch.

/// `Sun, 06 Nov 1994 08:49:37 GMT` and the two obsolete forms HTTP still allows.
pub(super) fn parse_http_date(text: &str) -> Option<u64> {
    let text = text.trim();
    let fields: Vec<&str> = text
        .split([' ', ',', '-'])
        .filter(|field| !field.is_empty())
        .collect();
    // asctime: "Sun Nov  6 08:49:37 1994"
    if let [_, month, day, time, year] = fields[..]
        && day.len() <= 2
        && time.contains(':')
    {
        return seconds(number(year)?, month_of(month)?, number(day)?, clock(time)?);
    }
    let [_, day, month, year, time, zone] = fields[..] else {
        return None;
    };
    if !matches!(zone, "GMT" | "UTC") {
        return None;
    }
    let year = match (year.len(), number(year)?) {
        (2, short @ 70..) => 1900 + short,
        (2, short) => 2000 + short,
        (_, year) => year,
    };
    seconds(year, month_of(month)?, number(day)?, clock(time)?)
}

/// `20261124T053100Z` and `2026-11-24T05:31:00[.123]Z`.
pub(super) fn parse_iso8601(text: &str) -> Option<u64> {
    let (date, time) = text.trim().split_once(['T', 't'])?;
    let time = time.strip_suffix(['Z', 'z'])?;
    let time = time.split_once('.').map_or(time, |(whole, _)| whole);
    let date: String = date.chars().filter(|c| *c != '-').collect();
    let time: String = time.chars().filter(|c| *c != ':').collect();
    if date.len() != 8 || !(time.len() == 6 || time.len() == 4) {
        return None;
    }
    let part = |text: &str, from: usize, to: usize| number(text.get(from..to)?);
    let second = if time.len() == 6 {
        part(&time, 4, 6)?
    } else {
        0
    };
    let clock = of_clock(part(&time, 0, 2)?, part(&time, 2, 4)?, second)?;
    seconds(
        part(&date, 0, 4)?,
        part(&date, 4, 6)?,
        part(&date, 6, 8)?,
        clock,
    )
}

fn clock(text: &str) -> Option<u64> {
    let mut parts = text.split(':').map(number);
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    parts
        .next()
        .is_none()
        .then(|| of_clock(hour, minute, second))?
}

fn of_clock(hour: u64, minute: u64, second: u64) -> Option<u64> {
    // 60 is a leap second.
    (hour < 24 && minute < 60 && second <= 60).then_some(hour * 3600 + minute * 60 + second)
}

fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.len() <= 4 && text.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| text.parse().ok())?
}

fn month_of(text: &str) -> Option<u64> {
    let months = "janfebmaraprmayjunjulaugsepoctnovdec";
    let text = text.to_ascii_lowercase();
    let at = (text.len() == 3).then(|| months.find(&text))??;
    (at % 3 == 0).then_some(at as u64 / 3 + 1)
}

/// From 1 March of the year 0 to 1 January 1970.
const DAYS_TO_1970: u64 = 719_468;

/// Seconds since 1970 of a date from then to the year 9999 in the Gregorian calendar.
fn seconds(year: u64, month: u64, day: u64, clock: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years counted from March, so that the leap day is the last one.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    Some((days - DAYS_TO_1970) * 86_400 + clock)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_dates() {
        for text in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(parse_http_date(text), Some(784_111_777), "{text}");
        }
        assert_eq!(parse_http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(
            parse_http_date("Thu, 29 Feb 2024 12:00:00 GMT"),
            Some(1_709_208_000)
        );
        for text in [
            "20261124T053100Z",
            "2026-11-24T05:31:00Z",
            "2026-11-24T05:31:00.5Z",
        ] {
            assert_eq!(parse_iso8601(text), Some(1_795_498_260), "{text}");
        }
        assert_eq!(parse_iso8601("2026-11-24T05:31Z"), Some(1_795_498_260));
        for bad in [
            "",
            "120",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "x, 0 y 1 0:0:0 GMT",
        ] {
            assert_eq!(parse_http_date(bad), None, "{bad}");
        }
        for bad in [
            "",
            "T",
            "2026-11-24",
            "20261324T000000Z",
            "20261124T250000Z",
            "2026112éT000000Z",
        ] {
            assert_eq!(parse_iso8601(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,40}") {
            parse_http_date(&text);
            parse_iso8601(&text);
        }

        #[test]
        fn days_follow_each_other(day in 0u64..2_900_000) {
            // The inverse, by another formula (civil from days).
            let z = day + 719_468;
            let era = z / 146_097;
            let doe = z - era * 146_097;
            let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
            let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
            let mp = (5 * doy + 2) / 153;
            let d = doy - (153 * mp + 2) / 5 + 1;
            let m = if mp < 10 { mp + 3 } else { mp - 9 };
            let y = yoe + era * 400 + u64::from(m <= 2);
            prop_assert_eq!(seconds(y, m, d, 0), Some(day * 86_400));
        }
    }
}
