//! Where credentials come from. The docker configuration is one source; others (CRI requests,
//! kubelet credential providers) implement [`Credentials`], too.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

pub use self::docker::{DockerConfig, DockerConfigOptions};
use crate::source::BoxFuture;

pub(super) mod docker;
mod keychain;

/// A text that never shows in debug output or errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself, for the one who sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a registry is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A name and a password.
    Basic {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
    /// A refresh token, to be exchanged for access tokens (`identitytoken`).
    IdentityToken(Secret),
    /// An access token, used as it is (`registrytoken`).
    RegistryToken(Secret),
}

/// A source of credentials.
pub trait Credentials: Send + Sync + 'static {
    /// The credential for `repository` (a name such as `library/python`) of the registry `host`
    /// (`docker.io` for Docker Hub, otherwise host and port of whoever is asked: a mirror has
    /// credentials of its own). `None` means anonymous.
    fn lookup<'a>(
        &'a self,
        host: &'a str,
        repository: &'a str,
    ) -> BoxFuture<'a, Result<Option<Credential>, CredentialsError>>;

    /// The source in a few words, for `no credentials for HOST in …`.
    fn describe(&self) -> String;
}

/// Why a source of credentials failed (having none is no failure).
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The configuration cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The configuration is not what a docker `config.json` looks like.
    #[error("{} is not a docker configuration: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, without the values.
        problem: String,
    },
    /// A credential helper failed.
    #[error("credential helper {program}: {problem}")]
    Helper {
        /// The program.
        program: String,
        /// What it said or did.
        problem: String,
    },
    /// A credential helper did not answer in time and was killed.
    #[error("credential helper {program} did not answer within {} s", limit.as_secs())]
    HelperTimeout {
        /// The program.
        program: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Another source failed.
    #[error("{0}")]
    Other(String),
}

/// The source that never has any: everything is asked for anonymously.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

impl Credentials for Anonymous {
    fn lookup<'a>(
        &'a self,
        _host: &'a str,
        _repository: &'a str,
    ) -> BoxFuture<'a, Result<Option<Credential>, CredentialsError>> {
        Box::pin(async { Ok(None) })
    }

    fn describe(&self) -> String {
        "this client, which has no source of credentials".to_owned()
    }
}
