//! Credentials in a docker `config.json`: `auths`, `credHelpers`, `credsStore`.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc, time::Duration};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;

use super::{Credential, Credentials, CredentialsError, Secret, keychain};
use crate::source::BoxFuture;

const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Under this key docker stores what `docker login` without a host asks for.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Some tools pad base64, some do not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where a docker configuration is.
#[derive(Clone, Debug)]
pub struct DockerConfigOptions {
    /// The file `config.json`. It is read anew for each lookup, and may be missing.
    pub path: PathBuf,
    /// Directories searched for `docker-credential-*` before those in `PATH`.
    pub helper_dirs: Vec<PathBuf>,
    /// How long a credential helper may take.
    pub helper_timeout: Duration,
}

impl Default for DockerConfigOptions {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/root/.docker/config.json"),
            helper_dirs: Vec::new(),
            helper_timeout: Duration::from_secs(10),
        }
    }
}

/// Credentials from a docker configuration.
#[derive(Clone, Debug)]
pub struct DockerConfig {
    options: DockerConfigOptions,
}

impl DockerConfig {
    /// A source that reads this configuration.
    pub fn new(options: DockerConfigOptions) -> Self {
        Self { options }
    }

    async fn find(&self, host: &str) -> Result<Option<Credential>, CredentialsError> {
        let path = self.options.path.clone();
        let file = tokio::task::spawn_blocking(move || ConfigFile::read(path))
            .await
            .map_err(|error| CredentialsError::Other(error.to_string()))??;
        let Some(file) = file else {
            return Ok(None);
        };
        let names = names_of(host);
        if let Some(helper) = file.helper_for(&names) {
            for name in &names {
                let found = keychain::lookup(helper, name, &self.options).await?;
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        Ok(file.stored_for(&names, host))
    }
}

impl Credentials for DockerConfig {
    fn lookup<'a>(
        &'a self,
        host: &'a str,
        _repository: &'a str,
    ) -> BoxFuture<'a, Result<Option<Credential>, CredentialsError>> {
        Box::pin(self.find(host))
    }

    fn describe(&self) -> String {
        format!("the docker config {}", self.options.path.display())
    }
}

/// The names under which credentials for `host` may be stored, best first.
fn names_of(host: &str) -> Vec<String> {
    if DOCKER_HUB_NAMES.contains(&host) {
        let names = DOCKER_HUB_NAMES.iter().map(|name| (*name).to_owned());
        return std::iter::once(DOCKER_HUB_KEY.to_owned())
            .chain(names)
            .collect();
    }
    vec![host.to_owned()]
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ConfigFile {
    auths: BTreeMap<String, StoredAuth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StoredAuth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl ConfigFile {
    fn read(path: PathBuf) -> Result<Option<Self>, CredentialsError> {
        let read = || {
            if std::fs::metadata(&path)?.len() > MAX_CONFIG_BYTES {
                return Err(io::Error::other("the file is too large"));
            }
            std::fs::read(&path)
        };
        let text = match read() {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(CredentialsError::Read {
                    path,
                    source: Arc::new(error),
                });
            }
        };
        if text.trim_ascii().is_empty() {
            return Ok(None);
        }
        Self::parse(&text, path).map(Some)
    }

    fn parse(text: &[u8], path: PathBuf) -> Result<Self, CredentialsError> {
        serde_json::from_slice(text).map_err(|error| CredentialsError::Syntax {
            // The error of serde_json may quote the value: say only where it is.
            problem: format!("line {}, column {}", error.line(), error.column()),
            path,
        })
    }

    fn helper_for(&self, names: &[String]) -> Option<&str> {
        let helper = names
            .iter()
            .find_map(|name| by_host(&self.cred_helpers, name))
            .map_or(self.creds_store.as_str(), String::as_str);
        (!helper.is_empty()).then_some(helper)
    }

    fn stored_for(&self, names: &[String], host: &str) -> Option<Credential> {
        let stored = names.iter().find_map(|name| by_host(&self.auths, name))?;
        let credential = stored.credential();
        if credential.is_none() {
            tracing::debug!(
                host,
                "the docker config names the registry without a credential"
            );
        }
        credential
    }
}

/// The entry of a host: stored under its name, or under a URL with this host.
fn by_host<'a, T>(entries: &'a BTreeMap<String, T>, name: &str) -> Option<&'a T> {
    entries.get(name).or_else(|| {
        let mut entries = entries.iter();
        let (_, entry) = entries.find(|(key, _)| host_of(key) == name)?;
        Some(entry)
    })
}

/// `https://host:port/v2/` as `host:port`.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

impl StoredAuth {
    fn credential(&self) -> Option<Credential> {
        if !self.registrytoken.is_empty() {
            return Some(Credential::RegistryToken(Secret::new(&self.registrytoken)));
        }
        if !self.identitytoken.is_empty() {
            return Some(Credential::IdentityToken(Secret::new(&self.identitytoken)));
        }
        let decoded = BASE64
            .decode(self.auth.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok());
        let (username, password) = match decoded.as_ref().and_then(|pair| pair.split_once(':')) {
            // Docker pads with NULs when it encodes.
            Some((username, password)) => (username, password.trim_end_matches('\0')),
            None => (self.username.as_str(), self.password.as_str()),
        };
        (!username.is_empty()).then(|| Credential::Basic {
            username: username.to_owned(),
            password: Secret::new(password),
        })
    }
}

/// Reads a config and looks up hosts in it: for fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(in crate::registry) fn read_and_look_up(text: &[u8], hosts: &[&str]) {
    let Ok(file) = ConfigFile::parse(text, "config.json".into()) else {
        return;
    };
    for host in hosts {
        let names = names_of(host);
        assert!(!names.is_empty());
        if let Some(helper) = file.helper_for(&names) {
            assert!(!helper.is_empty());
        }
        let found = file.stored_for(&names, host);
        // Shown as it would be in a log.
        let _ = format!("{found:?}");
    }
}

#[cfg(test)]
mod tests;
