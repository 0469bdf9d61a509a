//! Which hosts serve a registry: containerd's `hosts.toml` directories and its rules without one.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, Uri};

use self::file::{HostTable, HostsFile};
use super::reference::DEFAULT_REGISTRY;

mod file;

const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
const MAX_FILE_BYTES: u64 = 1 << 20;
const ALL: Capabilities = Capabilities {
    pull: true,
    resolve: true,
    push: true,
};

/// Why the configuration of a registry's hosts cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostsError {
    /// A file or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The file is not what `hosts.toml` looks like.
    #[error("{}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A certificate or key cannot be used.
    #[error("{}: {problem}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// What a host may be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub(super) pull: bool,
    pub(super) resolve: bool,
    pub(super) push: bool,
}

/// How the scheme of a host is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
    /// Loopback without configuration: plain HTTP, unless the host turns out to speak TLS.
    HttpThenHttps,
    /// Plain HTTP is configured together with TLS files: TLS, unless the host does not speak it.
    HttpsThenHttp,
}

/// TLS settings of a host; hosts with equal settings share connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct TlsSettings {
    pub(super) ca: Vec<StampedFile>,
    pub(super) client: Vec<(StampedFile, Option<StampedFile>)>,
    pub(super) skip_verify: bool,
}

/// A file with its time of modification, so that a renewed certificate is noticed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct StampedFile {
    pub(super) path: PathBuf,
    modified: Option<SystemTime>,
}

/// One host that serves a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct HostConfig {
    pub(super) scheme: Scheme,
    /// Host and optional port.
    pub(super) authority: String,
    /// `/v2`, or what `override_path` says.
    pub(super) path: String,
    pub(super) capabilities: Capabilities,
    pub(super) headers: HeaderMap,
    pub(super) tls: Arc<TlsSettings>,
    pub(super) dial_timeout: Option<Duration>,
    /// The file that configures the host, or would.
    pub(super) config: PathBuf,
}

impl HostConfig {
    /// Whether the host speaks for another registry and is told which (`?ns=`).
    pub(super) fn is_mirror_of(&self, registry: &str) -> bool {
        self.authority != registry
            && !(registry == DEFAULT_REGISTRY && self.authority == DOCKER_HUB_HOST)
    }
}

impl fmt::Debug for HostConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Headers may hold secrets.
        f.debug_struct("HostConfig")
            .field("scheme", &self.scheme)
            .field("authority", &self.authority)
            .field("path", &self.path)
            .field("capabilities", &self.capabilities)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

/// The hosts of `registry` in the order in which they are to be asked. Reads files.
pub(super) fn load(
    dirs: &[PathBuf],
    plain_http: &[String],
    registry: &str,
) -> Result<Vec<HostConfig>, HostsError> {
    for dir in dirs {
        for name in directory_names(registry) {
            let dir = dir.join(name);
            match std::fs::metadata(&dir) {
                Ok(_) => return load_dir(&dir, plain_http, registry),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(read_error(&dir, error)),
            }
        }
    }
    let config = dirs.first().map_or_else(
        || PathBuf::from("hosts.toml"),
        |dir| dir.join(registry).join("hosts.toml"),
    );
    Ok(vec![default_host(
        registry,
        plain_http,
        &HostTable::default(),
        &config,
    )?])
}

/// Directory names that containerd looks for, best first.
fn directory_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty())
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

fn load_dir(
    dir: &Path,
    plain_http: &[String],
    registry: &str,
) -> Result<Vec<HostConfig>, HostsError> {
    let path = dir.join("hosts.toml");
    let text = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            let problem = format!("the file is larger than {MAX_FILE_BYTES} bytes");
            return Err(HostsError::Value { path, problem });
        }
        Ok(_) => std::fs::read_to_string(&path).map_err(|error| read_error(&path, error))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(read_error(&path, error)),
    };
    if text.is_empty() {
        let table = file::docker_certificates(dir)?;
        return Ok(vec![default_host(registry, plain_http, &table, &path)?]);
    }
    parse(&text, &path, plain_http, registry)
}

/// The hosts in a `hosts.toml`: the `[host]` tables in the order of the file, then the server.
pub(super) fn parse(
    text: &str,
    path: &Path,
    plain_http: &[String],
    registry: &str,
) -> Result<Vec<HostConfig>, HostsError> {
    let syntax = |error| HostsError::Syntax {
        path: path.to_owned(),
        source: Box::new(error),
    };
    let file: HostsFile = toml::from_str(text).map_err(syntax)?;
    let mut hosts = Vec::new();
    for url in file::urls_in_order(text).map_err(syntax)? {
        if let Some(table) = file.host.get(&url) {
            hosts.push(configured_host(&url, table, path)?);
        }
    }
    hosts.push(if file.server.is_empty() {
        default_host(registry, plain_http, &file.root, path)?
    } else {
        configured_host(&file.server, &file.root, path)?
    });
    Ok(hosts)
}

fn configured_host(url: &str, table: &HostTable, path: &Path) -> Result<HostConfig, HostsError> {
    let bad = |problem: String| HostsError::Value {
        path: path.to_owned(),
        problem,
    };
    let full = if url.starts_with("http") {
        url.to_owned()
    } else {
        format!("https://{url}")
    };
    let uri: Uri = full
        .parse()
        .map_err(|error| bad(format!("{url:?} is not a URL: {error}")))?;
    let authority = match uri.authority() {
        Some(authority) if !authority.as_str().contains('@') => authority.to_string(),
        _ => return Err(bad(format!("{url:?} names no host, or credentials"))),
    };
    let settings = file::tls_settings(table, path)?;
    let has_tls = settings != TlsSettings::default() || table.skip_verify.is_some();
    let scheme = match uri.scheme_str() {
        Some("https") => Scheme::Https,
        // As containerd does: with TLS files, a plain URL on an odd port is tried with TLS first.
        Some("http") if has_tls && uri.port_u16() != Some(80) => Scheme::HttpsThenHttp,
        Some("http") => Scheme::Http,
        _ => return Err(bad(format!("{url:?} is neither http nor https"))),
    };
    let clean = clean_path(uri.path());
    let path_on_host = if table.override_path || clean.ends_with("/v2") {
        clean
    } else {
        clean + "/v2"
    };
    Ok(HostConfig {
        scheme,
        authority,
        path: path_on_host,
        capabilities: file::capabilities(&table.capabilities).map_err(bad)?,
        headers: file::headers(&table.header).map_err(bad)?,
        tls: Arc::new(settings),
        dial_timeout: file::dial_timeout(table).map_err(bad)?,
        config: path.to_owned(),
    })
}

/// The registry itself, by containerd's rules for hosts that nothing is configured for.
fn default_host(
    registry: &str,
    plain_http: &[String],
    table: &HostTable,
    path: &Path,
) -> Result<HostConfig, HostsError> {
    let bad = |problem: String| HostsError::Value {
        path: path.to_owned(),
        problem,
    };
    let mut settings = file::tls_settings(table, path)?;
    let (host, port) = split_port(registry);
    let scheme = if plain_http
        .iter()
        .any(|plain| plain == registry || plain == host)
    {
        Scheme::Http
    } else if is_loopback(host) {
        // Nobody else can listen there, so containerd does not verify the certificate.
        settings.skip_verify = settings.ca.is_empty() && table.skip_verify.unwrap_or(true);
        match port {
            None | Some("443") => Scheme::Https,
            Some("80") => Scheme::Http,
            Some(_) => Scheme::HttpThenHttps,
        }
    } else {
        Scheme::Https
    };
    let authority = if registry == DEFAULT_REGISTRY {
        DOCKER_HUB_HOST
    } else {
        registry
    };
    Ok(HostConfig {
        scheme,
        authority: authority.to_owned(),
        path: "/v2".to_owned(),
        capabilities: ALL,
        headers: file::headers(&table.header).map_err(bad)?,
        tls: Arc::new(settings),
        dial_timeout: file::dial_timeout(table).map_err(bad)?,
        config: path.to_owned(),
    })
}

/// Host and port of `host[:port]` or `[v6][:port]`.
pub(super) fn split_port(authority: &str) -> (&str, Option<&str>) {
    if authority.starts_with('[') {
        return match authority.split_once("]:") {
            Some((host, port)) => (host.trim_start_matches('['), Some(port)),
            None => (
                authority.trim_start_matches('[').trim_end_matches(']'),
                None,
            ),
        };
    }
    match authority.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Whether a host (without port and brackets) is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// `/a//b/../c/` as `/a/c`, and `/` as nothing.
fn clean_path(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.iter().fold(String::new(), |mut out, part| {
        out.push('/');
        out.push_str(part);
        out
    })
}

fn read_error(path: &Path, error: io::Error) -> HostsError {
    HostsError::Read {
        path: path.to_owned(),
        source: Arc::new(error),
    }
}

#[cfg(test)]
mod tests;
