//! Redirects: where a `Location` leads, byte for byte, and how long the URL may be used.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, Uri, header::LOCATION};

use super::{dates::parse_iso8601, hosts::split_port, proxy::percent_decode};

/// For how long a URL that names no expiry is used again.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(60);
/// No URL is used longer than this without asking the registry again.
const LONGEST_LIFETIME: Duration = Duration::from_secs(3600);
const LONGEST_LOCATION: usize = 16 << 10;

/// The URL that a reply to a request of `base` points to. The bytes of the location are kept as
/// they are: a signed URL does not survive re-encoding.
pub(super) fn location(base: &Uri, headers: &HeaderMap) -> Result<Uri, String> {
    let Some(value) = headers.get(LOCATION) else {
        return Err("sent a redirect without a location".to_owned());
    };
    let bytes = value.as_bytes();
    if bytes.len() > LONGEST_LOCATION {
        return Err("sent a redirect to a location that is too long".to_owned());
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| "sent a redirect to a location that is not text".to_owned())?;
    let uri: Uri = resolve(base, text.trim())
        .parse()
        .map_err(|error| format!("sent a redirect to a location that is not a URL: {error}"))?;
    let Some(authority) = uri.authority() else {
        return Err("sent a redirect to no host".to_owned());
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("sent a redirect to neither http nor https".to_owned());
    }
    if authority.as_str().contains('@') {
        return Err("sent a redirect to a location with credentials".to_owned());
    }
    let (host, _) = split_port(authority.as_str());
    if is_link_local(host) {
        // Metadata services of clouds live there, no registry does.
        return Err(format!("sent a redirect to the link-local address {host}"));
    }
    Ok(uri)
}

fn resolve(base: &Uri, location: &str) -> String {
    let scheme = base.scheme_str().unwrap_or("https");
    let authority = base.authority().map_or("", |authority| authority.as_str());
    let has_scheme = location
        .split(['/', '?', '#'])
        .next()
        .is_some_and(|first| first.contains(':'));
    if has_scheme {
        return location.to_owned();
    }
    if location.starts_with("//") {
        return format!("{scheme}:{location}");
    }
    let origin = format!("{scheme}://{authority}");
    if location.starts_with('/') {
        return format!("{origin}{location}");
    }
    let path = base.path();
    if location.starts_with('?') || location.is_empty() {
        return format!("{origin}{path}{location}");
    }
    let directory = path.rfind('/').map_or("/", |slash| &path[..=slash]);
    let at = location.find(['?', '#']).unwrap_or(location.len());
    let joined = format!("{directory}{}", &location[..at]);
    format!("{origin}{}{}", without_dots(&joined), &location[at..])
}

/// Resolves `.` and `..` in a path that starts with a slash.
fn without_dots(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    parts.pop();
                }
                if last {
                    parts.push("");
                }
            }
            segment => parts.push(segment),
        }
    }
    format!("/{}", parts.join("/"))
}

fn is_link_local(host: &str) -> bool {
    match host.parse() {
        Ok(std::net::IpAddr::V4(address)) => address.is_link_local(),
        Ok(std::net::IpAddr::V6(address)) => address.is_unicast_link_local(),
        Err(_) => false,
    }
}

/// Whether two URLs have the same scheme, host and port: only then may credentials go along.
pub(super) fn same_origin(one: &Uri, other: &Uri) -> bool {
    let origin = |uri: &Uri| {
        let scheme = uri.scheme_str().map(str::to_ascii_lowercase);
        let host = uri.host().map(str::to_ascii_lowercase);
        let default = if scheme.as_deref() == Some("https") {
            443
        } else {
            80
        };
        (scheme, host, uri.port_u16().unwrap_or(default))
    };
    origin(one) == origin(other)
}

/// For how long from now a URL may be used again without asking the registry: four fifths of what
/// its signature allows.
pub(super) fn lifetime(uri: &Uri, now: SystemTime) -> Duration {
    let Some(allowed) = allowed_lifetime(uri.query().unwrap_or(""), now) else {
        return UNKNOWN_LIFETIME;
    };
    (allowed / 5 * 4).min(LONGEST_LIFETIME)
}

fn allowed_lifetime(query: &str, now: SystemTime) -> Option<Duration> {
    let parameter = |names: &[&str]| {
        query.split('&').find_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let known = names.iter().any(|known| name.eq_ignore_ascii_case(known));
            known.then(|| String::from_utf8(percent_decode(value)).ok())?
        })
    };
    let until = |seconds: u64| {
        UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))?
            .duration_since(now)
            .ok()
    };
    // Signed by S3 or GCS: so many seconds from a date.
    let relative = parameter(&["X-Amz-Expires", "X-Goog-Expires"])
        .and_then(|seconds| seconds.parse().ok())
        .map(Duration::from_secs);
    if let Some(relative) = relative {
        let signed =
            parameter(&["X-Amz-Date", "X-Goog-Date"]).and_then(|date| parse_iso8601(&date));
        let left = signed.and_then(|signed| until(signed.checked_add(relative.as_secs())?));
        return match (signed, left) {
            (None, _) => Some(relative),
            // A clock that is wrong must not make a fresh URL last longer than it was made for.
            (Some(_), Some(left)) => Some(left.min(relative)),
            (Some(_), None) => None,
        };
    }
    // CloudFront, S3 version 2, OSS and others: the second of expiry.
    if let Some(expires) = parameter(&["Expires", "exp"]) {
        return until(expires.parse().ok()?);
    }
    // Azure: the date of expiry.
    until(parse_iso8601(&parameter(&["se"])?)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn follow(location_header: &str) -> Result<String, String> {
        let base: Uri = "https://r.io:5000/v2/a/b/blobs/x?y=z".parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(
            LOCATION,
            http::HeaderValue::from_str(location_header).unwrap(),
        );
        location(&base, &headers).map(|uri| uri.to_string())
    }

    #[test]
    fn locations_resolve_and_keep_their_bytes() {
        for (header, expected) in [
            (
                "https://cdn.io/x?Signature=a%2Fb+c%3D~_-&Key=AB==",
                "https://cdn.io/x?Signature=a%2Fb+c%3D~_-&Key=AB==",
            ),
            (
                "http://cdn.io:80/%7Ex//y/../z?",
                "http://cdn.io:80/%7Ex//y/../z?",
            ),
            ("//cdn.io/x", "https://cdn.io/x"),
            (
                "/upload?_state=a:b/c==",
                "https://r.io:5000/upload?_state=a:b/c==",
            ),
            (
                "other?u=http://q",
                "https://r.io:5000/v2/a/b/blobs/other?u=http://q",
            ),
            ("../c/./d", "https://r.io:5000/v2/a/b/c/d"),
            ("../../../../../..", "https://r.io:5000/"),
            ("?n=1", "https://r.io:5000/v2/a/b/blobs/x?n=1"),
            ("/x#fragment", "https://r.io:5000/x"),
        ] {
            assert_eq!(follow(header).unwrap(), expected, "{header}");
        }
    }

    #[test]
    fn bad_locations_are_refused() {
        for (bad, why) in [
            ("ftp://x/y", "neither"),
            ("https://u:p@x/y", "credentials"),
            ("http://169.254.169.254/latest/meta-data", "link-local"),
            ("http://[fe80::1]/", "link-local"),
            ("https://", "not a URL"),
            ("http://a b/", "not a URL"),
        ] {
            let error = follow(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
        assert!(follow(&format!("/{}", "x".repeat(LONGEST_LOCATION))).is_err());
        assert!(location(&Uri::from_static("http://x/"), &HeaderMap::new()).is_err());
    }

    #[test]
    fn signed_urls_say_how_long_they_last() {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_498_260); // 2026-11-24T05:31:00Z
        let of =
            |query: &str| lifetime(&format!("https://c/x?{query}").parse().unwrap(), now).as_secs();
        assert_eq!(of("X-Amz-Date=20261124T053100Z&X-Amz-Expires=1200"), 960);
        assert_eq!(of("x-amz-expires=1200&x-amz-date=20261124T052100Z"), 480);
        assert_eq!(of("X-Amz-Expires=1000"), 800);
        assert_eq!(of("X-Goog-Date=20261124T053100Z&X-Goog-Expires=500"), 400);
        assert_eq!(
            of("X-Amz-Date=20261124T063100Z&X-Amz-Expires=500"),
            400,
            "clock behind"
        );
        assert_eq!(
            of("X-Amz-Date=20251124T063100Z&X-Amz-Expires=500"),
            60,
            "clock ahead"
        );
        assert_eq!(of("Expires=1795498360&Signature=x"), 80);
        assert_eq!(of("se=2026-11-24T05%3A41%3A00Z&sig=x"), 480);
        assert_eq!(of("exp=1795498270~hmac"), 60);
        assert_eq!(of("Expires=99999999999"), 3600);
        for unknown in [
            "",
            "Expires=1",
            "Expires=x",
            "se=",
            "X-Amz-Expires=",
            "a&b=&=c",
        ] {
            assert_eq!(of(unknown), 60, "{unknown}");
        }
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let same = |a: &str, b: &str| same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://R.io/a", "https://r.io:443/b"));
        assert!(same("http://r.io/a", "http://r.io:80/b"));
        assert!(!same("https://r.io/", "http://r.io/"));
        assert!(!same("https://r.io/", "https://r.io:5000/"));
        assert!(!same("https://r.io/", "https://r.io.evil.io/"));
    }

    proptest! {
        #[test]
        fn any_location_is_followed_or_refused(text in "\\PC{0,60}", query in "\\PC{0,60}") {
            let mut headers = HeaderMap::new();
            if let Ok(value) = http::HeaderValue::from_str(&text) {
                headers.insert(LOCATION, value);
            }
            let _ = location(&Uri::from_static("https://r.io/a/b"), &headers);
            allowed_lifetime(&query, UNIX_EPOCH);
        }
    }
}
