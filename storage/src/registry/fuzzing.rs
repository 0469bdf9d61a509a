//! What the fuzz targets of `storage/fuzz` do with their input, and the same as plain tests. Not a
//! part of the crate's interface.

use std::{path::Path, time::UNIX_EPOCH};

use http::{
    HeaderMap, HeaderValue, Uri,
    header::{LOCATION, RETRY_AFTER, WWW_AUTHENTICATE},
};

use super::{
    backoff, body, challenge,
    content_range::ContentRange,
    credentials::docker,
    dates, hosts,
    proxy::{ProxyConfig, percent_decode},
    redirect,
    reference::{Reference, Repository},
    token,
};

/// A target's name and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 5] = [
    ("reply", reply),
    ("reference", reference),
    ("hosts", hosts_file),
    ("docker", docker_config),
    ("proxy", proxy),
];

/// Everything that is read out of a registry's or token server's reply: the first line is a header's
/// value, the rest a body.
pub fn reply(data: &[u8]) {
    let (line, rest) = data
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or((data, &[][..]), |at| (&data[..at], &data[at + 1..]));
    if let Some(found) = ContentRange::parse(line) {
        assert!(found.range.start < found.range.end);
        assert!(found.total.is_none_or(|total| found.range.end <= total));
    }
    let text = String::from_utf8_lossy(line);
    for date in [dates::parse_http_date(&text), dates::parse_iso8601(&text)] {
        // Until the year 9999.
        assert!(date.is_none_or(|seconds| seconds < 253_402_400_000));
    }
    if let Ok(value) = HeaderValue::from_bytes(line) {
        headers(&value);
    }
    if let Some(token) = token::parse_reply(rest) {
        assert!(!token.text.reveal().is_empty());
        assert!(token.lifetime.as_secs() <= 24 * 3600);
    }
    let said = body::readable(rest);
    assert!(
        said.len() <= 4096 && !said.contains(char::is_control),
        "{said:?}"
    );
}

fn headers(value: &HeaderValue) {
    let mut headers = HeaderMap::new();
    headers.append(WWW_AUTHENTICATE, value.clone());
    headers.append(RETRY_AFTER, value.clone());
    headers.append(LOCATION, value.clone());
    for found in challenge::of_headers(&headers) {
        assert_eq!(found.scheme, found.scheme.to_ascii_lowercase());
        assert!(found.parameters.len() <= 64);
        let _ = found.parameter("realm");
    }
    let _ = backoff::retry_after(&headers, UNIX_EPOCH);
    let base = Uri::from_static("https://registry.example:5000/v2/a/blobs/x?y=z");
    if let Ok(url) = redirect::location(&base, &headers) {
        assert!(url.authority().is_some());
        assert!(matches!(url.scheme_str(), Some("http" | "https")));
        let _ = redirect::same_origin(&base, &url);
        let lifetime = redirect::lifetime(&url, UNIX_EPOCH);
        assert!(lifetime.as_secs() <= 3600);
        // What was read is written and read again.
        let mut again = HeaderMap::new();
        let text = HeaderValue::try_from(url.to_string()).expect("a URL is a header's value");
        again.append(LOCATION, text);
        assert_eq!(redirect::location(&base, &again).as_ref(), Ok(&url));
    }
}

/// An image reference: what was read is written and read again.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(reference) = text.parse::<Reference>() {
        let shown = reference.to_string();
        assert_eq!(shown.parse::<Reference>().as_ref(), Ok(&reference));
        assert!(!reference.manifest_name().is_empty());
    }
    if let Some((registry, name)) = text.split_once('/')
        && let Ok(repository) = Repository::new(registry, name)
    {
        let reference: Reference = repository
            .to_string()
            .parse()
            .expect("a repository's name is a reference");
        assert_eq!(*reference.repository(), repository);
    }
}

/// A `hosts.toml`.
pub fn hosts_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let path = Path::new("/nonexistent/hosts.toml");
    if let Ok(found) = hosts::parse(text, path, &[], "registry.example:5000") {
        assert!(!found.is_empty());
        assert!(found.len() <= text.len() + 1);
    }
}

/// A docker config: any host may be looked up, and no error quotes a secret.
pub fn docker_config(data: &[u8]) {
    docker::read_and_look_up(data, &["docker.io", "ghcr.io", "[::1]:5000"]);
}

/// Proxy variables, a line each: `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`, and the destination.
pub fn proxy(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let mut next = || lines.next().unwrap_or_default();
    let vars = [
        ("HTTP_PROXY", next()),
        ("https_proxy", next()),
        ("NO_PROXY", next()),
    ];
    let url = next().parse::<Uri>();
    assert!(percent_decode(&text).len() <= text.len());
    if let Ok(config) = ProxyConfig::from_vars(vars) {
        let _ = format!("{config:?}");
        for url in url.iter().chain([&Uri::from_static("https://a.b/c")]) {
            let _ = config.proxy_for(url);
        }
        let own = Uri::from_static("http://127.0.0.1:5000/");
        assert!(
            config.proxy_for(&own).is_none(),
            "this machine is reached directly"
        );
    }
}

#[cfg(test)]
#[path = "../../../formats/fuzz/plain.rs"]
mod plain;

#[cfg(test)]
mod tests {
    use super::{TARGETS, plain};

    const HERE: &str = env!("CARGO_MANIFEST_DIR");

    #[test]
    fn seeds_and_their_parts() {
        plain::cut(HERE, &TARGETS);
    }

    #[test]
    fn damaged_seeds() {
        plain::damaged(HERE, &TARGETS, 20_000);
    }

    #[test]
    fn noise() {
        plain::noise(&TARGETS, 2000);
    }
}
