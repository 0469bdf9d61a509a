//! What comes from elsewhere, mutated: whatever is in it, parsers answer.

use std::path::Path;

use http::{HeaderMap, HeaderValue, Uri, header::LOCATION};

use super::*;

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % bound.max(1)
    }
}

/// `seed` with a few bytes changed, removed, doubled or swapped for odd ones.
fn mutate(seed: &str, dice: &mut Dice) -> Vec<u8> {
    let odd = b"\0\n\r\t \"'\\,;:=/%?#@[]{}<>*-+.0189azAZ\x7f\x80\xc3\xff";
    let mut bytes = seed.as_bytes().to_vec();
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len());
        match dice.below(4) {
            0 if !bytes.is_empty() => drop(bytes.remove(at)),
            1 => bytes.insert(at, odd[dice.below(odd.len())]),
            2 if !bytes.is_empty() => bytes[at] = odd[dice.below(odd.len())],
            _ => {
                let tail = bytes.split_off(at);
                bytes.extend_from_slice(&tail);
                bytes.extend_from_slice(&tail[..tail.len().min(9)]);
            }
        }
    }
    bytes
}

fn each_mutation(seeds: &[&str], mut check: impl FnMut(&[u8], &str)) {
    let mut dice = Dice(0x5eed);
    for seed in seeds {
        for _ in 0..2000 {
            let bytes = mutate(seed, &mut dice);
            check(&bytes, &String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn mutated_headers_are_survived() {
    each_mutation(
        &[
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#,
            r#"Basic realm="x", Bearer realm=y,error="invalid_token""#,
        ],
        |_, text| challenge::parse(text, &mut Vec::new()),
    );
    each_mutation(&["bytes 0-99/1000", "bytes 5-5/*"], |bytes, _| {
        if let Some(parsed) = content_range::ContentRange::parse(bytes) {
            assert!(parsed.range.start < parsed.range.end);
            assert!(parsed.total.is_none_or(|total| parsed.range.end <= total));
        }
    });
    each_mutation(
        &[
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ],
        |_, text| assert!(dates::parse_http_date(text).is_none_or(|at| at < 1 << 40)),
    );
    each_mutation(
        &[
            "https://cdn.io/x?X-Amz-Date=20261124T053100Z&X-Amz-Expires=1200&Signature=a%2Fb==",
            "../../x?se=2026-11-24T05%3A41%3A00Z",
            "//h/x?Expires=1795498360#f",
        ],
        |bytes, _| {
            let mut headers = HeaderMap::new();
            headers.extend(HeaderValue::from_bytes(bytes).map(|value| (LOCATION, value)));
            let base = Uri::from_static("https://r.io/v2/a/b");
            if let Ok(uri) = redirect::location(&base, &headers) {
                assert!(matches!(uri.scheme_str(), Some("http" | "https")));
                assert!(
                    uri.authority()
                        .is_some_and(|authority| !authority.as_str().contains('@'))
                );
                redirect::lifetime(&uri, std::time::SystemTime::now());
            }
        },
    );
}

#[test]
fn mutated_references_are_parsed_the_same_again_or_refused() {
    let digest = Digest::of(b"x").to_string();
    let pinned = format!("ghcr.io/a/b_c:1.2@{digest}");
    each_mutation(
        &[&pinned, "localhost:5000/a/b", "[::1]:5000/x", "python:3.12"],
        |_, text| {
            if let Ok(reference) = text.parse::<Reference>() {
                let shown = reference.to_string();
                assert_eq!(
                    shown.parse::<Reference>().as_ref(),
                    Ok(&reference),
                    "{text:?}"
                );
                // It becomes a part of URLs.
                let url = format!(
                    "https://{}/v2/{}",
                    reference.registry(),
                    reference.repository().name()
                );
                assert!(url.parse::<Uri>().is_ok(), "{text:?}");
            }
        },
    );
}

#[test]
fn mutated_configuration_is_used_or_refused() {
    let hosts = "server = \"https://x.io\"\nskip_verify = true\n[host.\"https://m.io/p\"]\n\
                 capabilities = [\"pull\"]\nclient = [[\"b\", \"c\"]]\ndial_timeout = \"5s\"\n";
    each_mutation(&[hosts], |_, text| {
        if let Ok(hosts) = hosts::parse(text, Path::new("/x/hosts.toml"), &[], "x.io") {
            assert!(hosts.iter().all(|host| !host.authority.contains('@')));
        }
    });
    each_mutation(&["http://us:p%40ss@proxy:3128/", "proxy"], |_, text| {
        drop(ProxyConfig::from_vars([
            ("HTTPS_PROXY", text),
            ("NO_PROXY", text),
        ]));
    });
}
