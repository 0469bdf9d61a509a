//! What a `hosts.toml` says, before any rule is applied to it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::{ALL, Capabilities, HostsError, StampedFile, TlsSettings, read_error};

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct HostsFile {
    pub(super) server: String,
    pub(super) host: BTreeMap<String, HostTable>,
    #[serde(flatten)]
    pub(super) root: HostTable,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct HostTable {
    pub(super) capabilities: Vec<String>,
    ca: OneOrMany,
    client: ClientField,
    pub(super) skip_verify: Option<bool>,
    pub(super) header: BTreeMap<String, OneOrMany>,
    pub(super) override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClientField {
    One(String),
    Many(Vec<OneOrMany>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Default for ClientField {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// The keys of the table `host` in the order of the file, which the mirrors are tried in.
pub(super) fn urls_in_order(text: &str) -> Result<Vec<String>, toml::de::Error> {
    let document = toml::de::DeTable::parse(text)?;
    let Some(hosts) = document.get_ref().get("host") else {
        return Ok(Vec::new());
    };
    let toml::de::DeValue::Table(hosts) = hosts.get_ref() else {
        return Ok(Vec::new());
    };
    let mut keys: Vec<(usize, String)> = hosts
        .keys()
        .map(|key| (key.span().start, key.get_ref().to_string()))
        .collect();
    keys.sort();
    Ok(keys.into_iter().map(|(_, url)| url).collect())
}

pub(super) fn capabilities(names: &[String]) -> Result<Capabilities, String> {
    if names.is_empty() {
        return Ok(ALL);
    }
    let mut capabilities = Capabilities::default();
    for name in names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => capabilities.pull = true,
            "resolve" => capabilities.resolve = true,
            "push" => capabilities.push = true,
            "referrers" => {}
            _ => return Err(format!("unknown capability {name:?}")),
        }
    }
    Ok(capabilities)
}

pub(super) fn headers(table: &BTreeMap<String, OneOrMany>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in table {
        let name: HeaderName = name
            .parse()
            .map_err(|_| format!("{name:?} is not a header name"))?;
        for value in values.as_slice() {
            let mut value = HeaderValue::from_str(value)
                .map_err(|_| format!("the value of header {name} has forbidden characters"))?;
            // It may be a secret: keep it out of debug output.
            value.set_sensitive(true);
            headers.append(&name, value);
        }
    }
    Ok(headers)
}

pub(super) fn tls_settings(table: &HostTable, config: &Path) -> Result<TlsSettings, HostsError> {
    let base = config.parent().unwrap_or(Path::new("/"));
    let stamped = |path: &String| stamp(base.join(path));
    let mut client = Vec::new();
    let one;
    let entries = match &table.client {
        ClientField::One(path) => {
            one = [OneOrMany::One(path.clone())];
            &one[..]
        }
        ClientField::Many(entries) => entries,
    };
    for entry in entries {
        client.push(match entry {
            OneOrMany::One(path) => (stamped(path), None),
            OneOrMany::Many(pair) => match &pair[..] {
                [certificate, key] => (stamped(certificate), Some(stamped(key))),
                _ => {
                    return Err(HostsError::Value {
                        path: config.to_owned(),
                        problem: format!("`client` has {} files where a pair belongs", pair.len()),
                    });
                }
            },
        });
    }
    Ok(TlsSettings {
        ca: table.ca.as_slice().iter().map(stamped).collect(),
        client,
        skip_verify: table.skip_verify.unwrap_or(false),
    })
}

fn stamp(path: PathBuf) -> StampedFile {
    let modified = std::fs::metadata(&path).and_then(|metadata| metadata.modified());
    StampedFile {
        modified: modified.ok(),
        path,
    }
}

/// The layout of `/etc/docker/certs.d`: `*.crt` are CAs, `*.cert` with `*.key` client certificates.
pub(super) fn docker_certificates(dir: &Path) -> Result<HostTable, HostsError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| read_error(dir, error))? {
        let entry = entry.map_err(|error| read_error(dir, error))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    let mut table = HostTable::default();
    let (mut ca, mut client) = (Vec::new(), Vec::new());
    for name in &names {
        if name.strip_suffix(".crt").is_some() {
            ca.push(name.clone());
        } else if let Some(stem) = name.strip_suffix(".cert") {
            let key = format!("{stem}.key");
            client.push(if names.contains(&key) {
                OneOrMany::Many(vec![name.clone(), key])
            } else {
                OneOrMany::One(name.clone())
            });
        }
    }
    table.ca = OneOrMany::Many(ca);
    table.client = ClientField::Many(client);
    Ok(table)
}

pub(super) fn dial_timeout(table: &HostTable) -> Result<Option<Duration>, String> {
    let Some(text) = &table.dial_timeout else {
        return Ok(None);
    };
    let duration = parse_go_duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("dial_timeout {text:?} is not a duration like 5s or 500ms"))?;
    Ok(Some(duration))
}

/// `1h30m`, `5s`, `1.5s`, `500ms`: the durations of Go programs, without a sign.
fn parse_go_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        rest = &rest[unit..];
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
    }
    (!text.is_empty()).then_some(total)
}
