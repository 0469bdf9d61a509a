//! HTTP proxies: which destinations go through one, by the rules that containerd (Go) follows.

use std::{fmt, net::IpAddr};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderValue, Uri};

use super::hosts::{is_loopback, split_port};

/// Where requests are sent through. Empty by default: no proxy.
#[derive(Clone, Debug, Default)]
pub struct ProxyConfig {
    http: Option<Proxy>,
    https: Option<Proxy>,
    direct: Vec<Direct>,
}

/// Why proxy settings cannot be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProxyError {
    /// The value is not the URL of an HTTP proxy.
    #[error("{variable} is not the URL of an HTTP proxy (http://[user:password@]host[:port])")]
    Url {
        /// The variable; its value may hold a password and is not shown.
        variable: String,
    },
}

/// One proxy.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Proxy {
    /// Host and port.
    pub(super) authority: String,
    /// `Basic …`.
    pub(super) authorization: Option<HeaderValue>,
}

/// A destination that is reached without the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Direct {
    All,
    Network(IpAddr, u8),
    /// A domain and its subdomains (only those, if `subdomains_only`), on one port or all.
    Domain {
        name: String,
        subdomains_only: bool,
        port: Option<String>,
    },
}

impl ProxyConfig {
    /// Takes `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` (or their lower-case forms) out of
    /// variables such as the environment; the upper-case form wins, empty values do not count.
    pub fn from_vars<N, V>(vars: impl IntoIterator<Item = (N, V)>) -> Result<Self, ProxyError>
    where
        N: AsRef<str>,
        V: AsRef<str>,
    {
        let mut values: [Option<(String, String)>; 3] = Default::default();
        for (name, value) in vars {
            let (name, value) = (name.as_ref(), value.as_ref().trim());
            let slot = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
                .iter()
                .position(|known| name.eq_ignore_ascii_case(known));
            let Some(slot) = slot.filter(|_| !value.is_empty()) else {
                continue;
            };
            let is_upper = name.bytes().all(|b| !b.is_ascii_lowercase());
            if is_upper || values[slot].is_none() {
                values[slot] = Some((name.to_owned(), value.to_owned()));
            }
        }
        let [http, https, no_proxy] = values;
        let proxy = |value: Option<(String, String)>| {
            value
                .map(|(variable, url)| Proxy::parse(&url).ok_or(ProxyError::Url { variable }))
                .transpose()
        };
        let no_proxy = no_proxy.map(|(_, value)| value).unwrap_or_default();
        Ok(Self {
            http: proxy(http)?,
            https: proxy(https)?,
            direct: no_proxy
                .split([',', ' '])
                .filter_map(Direct::parse)
                .collect(),
        })
    }

    /// The proxy for a destination; this machine is always reached directly.
    pub(super) fn proxy_for(&self, uri: &Uri) -> Option<&Proxy> {
        let is_https = uri.scheme_str() == Some("https");
        let proxy = if is_https { &self.https } else { &self.http };
        let proxy = proxy.as_ref()?;
        let authority = uri.authority()?.as_str();
        let (host, port) = split_port(authority);
        let port = port.unwrap_or(if is_https { "443" } else { "80" });
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let direct = is_loopback(&host) || self.direct.iter().any(|rule| rule.covers(&host, port));
        (!direct).then_some(proxy)
    }
}

impl Proxy {
    fn parse(url: &str) -> Option<Self> {
        let rest = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return None,
            None => url,
        };
        let rest = rest.split(['/', '?', '#']).next()?;
        let (user, authority) = match rest.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, rest),
        };
        let authorization = match user {
            Some(user) => {
                let (name, password) = user.split_once(':').unwrap_or((user, ""));
                let pair = [&percent_decode(name)[..], b":", &percent_decode(password)].concat();
                let value = format!("Basic {}", BASE64_STANDARD.encode(pair));
                let mut value = HeaderValue::try_from(value).ok()?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let authority = match split_port(authority) {
            ("", _) => return None,
            (_, Some(port)) if port.parse::<u16>().is_ok() => authority.to_owned(),
            (_, Some(_)) => return None,
            (_, None) => format!("{authority}:80"),
        };
        // It will be the authority of a URI.
        authority.parse::<http::uri::Authority>().ok()?;
        Some(Self {
            authority,
            authorization,
        })
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("authority", &self.authority)
            .finish_non_exhaustive()
    }
}

impl Direct {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text.is_empty() {
            return None;
        }
        if text == "*" {
            return Some(Self::All);
        }
        if let Some((address, bits)) = text.split_once('/') {
            let address: IpAddr = address.parse().ok()?;
            let width = if address.is_ipv4() { 32 } else { 128 };
            let bits = bits.parse().ok().filter(|bits| *bits <= width)?;
            return Some(Self::Network(address, bits));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            let width = if address.is_ipv4() { 32 } else { 128 };
            return Some(Self::Network(address, width));
        }
        let (host, port) = split_port(&text);
        let host = host.strip_prefix('*').unwrap_or(host);
        let name = host.trim_start_matches('.').trim_end_matches('.');
        (!name.is_empty()).then(|| Self::Domain {
            name: name.to_owned(),
            subdomains_only: host.starts_with('.'),
            port: port.map(str::to_owned),
        })
    }

    fn covers(&self, host: &str, port: &str) -> bool {
        match self {
            Self::All => true,
            Self::Network(network, bits) => host
                .parse::<IpAddr>()
                .is_ok_and(|address| in_network(address, *network, *bits)),
            Self::Domain {
                name,
                subdomains_only,
                port: only_port,
            } => {
                if only_port.as_ref().is_some_and(|only| only != port) {
                    return false;
                }
                match host.strip_suffix(name.as_str()) {
                    Some("") => !subdomains_only,
                    Some(rest) => rest.ends_with('.'),
                    None => false,
                }
            }
        }
    }
}

fn in_network(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    let shift = |width: u8| u32::from(width.saturating_sub(bits));
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let differs = u32::from(address) ^ u32::from(network);
            differs.checked_shr(shift(32)).unwrap_or(0) == 0
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let differs = u128::from(address) ^ u128::from(network);
            differs.checked_shr(shift(128)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// `%41` as `A`; what is no escape stays.
pub(super) fn percent_decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        let escaped = (byte == b'%')
            .then(|| Some((ahead.next()?, ahead.next()?)))
            .flatten()
            .and_then(|(high, low)| Some(hex_digit(high)? << 4 | hex_digit(low)?));
        match escaped {
            Some(decoded) => {
                out.push(decoded);
                bytes = ahead;
            }
            None => out.push(byte),
        }
    }
    out
}

fn hex_digit(byte: u8) -> Option<u8> {
    let digit = char::from(byte).to_digit(16)?;
    u8::try_from(digit).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(vars: &[(&str, &str)]) -> ProxyConfig {
        ProxyConfig::from_vars(vars.iter().copied()).unwrap()
    }

    fn used(config: &ProxyConfig, url: &str) -> Option<String> {
        let proxy = config.proxy_for(&url.parse().unwrap())?;
        Some(proxy.authority.clone())
    }

    #[test]
    fn the_scheme_chooses_the_proxy() {
        let config = config(&[
            ("https_proxy", "http://ignored:1"),
            ("HTTPS_PROXY", "http://secure:3128/"),
            ("http_proxy", "plain"),
            ("HTTP_PROXY", ""),
            ("PATH", "/bin"),
        ]);
        assert_eq!(used(&config, "https://x.io/v2"), Some("secure:3128".into()));
        assert_eq!(used(&config, "http://x.io/v2"), Some("plain:80".into()));
        for local in [
            "http://localhost:1/",
            "https://127.0.0.2/",
            "http://[::1]:5/",
        ] {
            assert_eq!(used(&config, local), None, "{local}");
        }
        assert_eq!(used(&ProxyConfig::default(), "https://x.io/"), None);
    }

    #[test]
    fn credentials_are_decoded_and_not_shown() {
        let config = config(&[("HTTP_PROXY", "http://us%65r:p%40ss@proxy:8080")]);
        let proxy = config.http.as_ref().unwrap();
        assert_eq!(proxy.authorization.as_ref().unwrap(), "Basic dXNlcjpwQHNz");
        assert_eq!(proxy.authority, "proxy:8080");
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("p@ss") && !shown.contains("dXNl"),
            "{shown}"
        );
    }

    #[test]
    fn no_proxy_is_read_as_go_does() {
        let proxied = |no_proxy: &str, url: &str| {
            let config = config(&[("HTTPS_PROXY", "http://p:1"), ("no_proxy", no_proxy)]);
            used(&config, url).is_some()
        };
        for (no_proxy, url, through) in [
            ("", "https://x.io/", true),
            ("*", "https://x.io/", false),
            ("x.io", "https://x.io/", false),
            ("x.io", "https://X.IO./", false),
            ("x.io", "https://a.x.io/", false),
            ("x.io", "https://ax.io/", true),
            (".x.io", "https://x.io/", true),
            (".x.io", "https://a.x.io/", false),
            ("*.x.io", "https://a.x.io/", false),
            ("x.io:443", "https://x.io/", false),
            ("x.io:444", "https://x.io/", true),
            (" a.io , x.io ", "https://x.io/", false),
            ("10.0.0.0/8", "https://10.9.9.9/", false),
            ("10.0.0.0/8", "https://11.0.0.1/", true),
            ("10.0.0.0/8", "https://x.io/", true),
            ("0.0.0.0/0", "https://11.0.0.1/", false),
            ("10.1.1.1", "https://10.1.1.1:5000/", false),
            ("fd00::/8", "https://[fd12::1]:5000/", false),
            ("fd00::/8", "https://[fe12::1]/", true),
            ("10.0.0.0/99", "https://10.0.0.1/", true),
        ] {
            assert_eq!(proxied(no_proxy, url), through, "{no_proxy} {url}");
        }
    }

    #[test]
    fn other_kinds_of_proxies_are_refused() {
        for bad in [
            "https://p:1",
            "socks5://p:1",
            "http://",
            "http://p:port",
            "http://p p:1",
        ] {
            let error = ProxyConfig::from_vars([("HTTPS_PROXY", bad)]).unwrap_err();
            assert_eq!(
                error,
                ProxyError::Url {
                    variable: "HTTPS_PROXY".into()
                },
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_value_is_used_or_refused(proxy in "\\PC{0,40}", no_proxy in "\\PC{0,40}") {
            if let Ok(config) = ProxyConfig::from_vars([("HTTP_PROXY", &proxy), ("NO_PROXY", &no_proxy)]) {
                used(&config, "http://x.io/");
            }
        }
    }
}
