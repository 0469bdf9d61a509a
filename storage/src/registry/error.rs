//! Errors of the registry client: what was asked of whom, what came of it, and what to do.

use std::{error::Error, fmt, io, ops::Range, sync::Arc, time::Duration};

use formats::digest::Digest;

use super::{credentials::CredentialsError, hosts::HostsError, reference::Repository};
use crate::ranges::FetchFailure;

/// The cause of an error, shared between all who wait for the same thing.
type SharedError = Arc<dyn Error + Send + Sync>;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The repository.
    pub repository: Repository,
    /// The thing in it.
    pub object: Object,
}

/// A thing in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Object {
    /// A manifest or index by tag or digest.
    Manifest(String),
    /// A whole blob.
    Blob(Digest),
    /// A part of a blob.
    BlobRange(Digest, Range<u64>),
    /// An upload of a blob.
    Upload(Digest),
    /// A token for the scopes named.
    Token(String),
}

/// Why a registry could not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The configuration of the registry's hosts cannot be used.
    #[error("the host configuration of {registry} cannot be used")]
    Hosts {
        /// The registry.
        registry: String,
        /// What is wrong.
        #[source]
        source: HostsError,
    },
    /// No configured host may be asked for this.
    #[error("{target}: no host of {} has the capability {capability:?} in its hosts.toml", target.repository.registry())]
    NoEndpoint {
        /// What was asked for.
        target: Arc<Target>,
        /// `pull`, `resolve` or `push`.
        capability: &'static str,
    },
    /// No connection could be made.
    #[error("{target}: {host} {problem}")]
    Unreachable {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// A verb phrase: `refused the connection`.
        problem: String,
        /// The error below.
        #[source]
        source: SharedError,
    },
    /// The TLS handshake failed.
    #[error("{target}: TLS: {problem}")]
    Tls {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// What is wrong and what to do.
        problem: String,
        /// The error below.
        #[source]
        source: SharedError,
    },
    /// The connection broke.
    #[error("{target}: the connection to {host} broke")]
    Broken {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// The error below.
        #[source]
        source: SharedError,
    },
    /// Nothing came, or nothing could be sent, for too long.
    #[error("{target}: {host} sent nothing for {}", Seconds(*waited))]
    Stalled {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The server answered with an error.
    #[error("{target}: {host} answered {status}{}", Said(message))]
    Status {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What the server said, cut to a line.
        message: String,
        /// How long the server asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The server wants other credentials.
    #[error("{target}: {status}: {advice}{}", Said(message))]
    Denied {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// 401 or 403.
        status: u16,
        /// What is missing.
        advice: String,
        /// What the server said, cut to a line.
        message: String,
    },
    /// The credentials could not be had.
    #[error("{target}: credentials for {host}")]
    Credentials {
        /// What was asked for.
        target: Arc<Target>,
        /// The registry they are for.
        host: String,
        /// What went wrong.
        #[source]
        source: CredentialsError,
    },
    /// The server contradicts the protocol or the descriptor.
    #[error("{target}: {host} {problem}")]
    Protocol {
        /// What was asked for.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// A verb phrase: `sent 5 bytes instead of 4`.
        problem: String,
    },
    /// The content is not what its digest says.
    #[error("{target}: {host} delivered content with digest {actual}")]
    Digest {
        /// What was asked for; it names the digest expected.
        target: Arc<Target>,
        /// Host and port.
        host: String,
        /// Digest of what was delivered.
        actual: Digest,
    },
    /// What was to be pushed could not be read.
    #[error("{target}: the content to push could not be read")]
    Content {
        /// What was asked for.
        target: Arc<Target>,
        /// The error below.
        #[source]
        source: SharedError,
    },
}

impl RegistryError {
    /// The HTTP status, if a server answered with one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } | Self::Denied { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What kind of failure it is.
    pub fn failure(&self) -> FetchFailure {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Stalled { .. } => {
                FetchFailure::Unreachable
            }
            Self::Status { status, .. } => match status {
                408 | 425 | 429 | 500 | 502 | 503 | 504 => FetchFailure::Busy,
                404 | 410 => FetchFailure::Missing,
                401 | 403 => FetchFailure::Denied,
                _ => FetchFailure::Invalid,
            },
            Self::Denied { .. } | Self::Credentials { .. } => FetchFailure::Denied,
            Self::Content { .. } => FetchFailure::Local,
            Self::Hosts { .. }
            | Self::NoEndpoint { .. }
            | Self::Tls { .. }
            | Self::Protocol { .. }
            | Self::Digest { .. } => FetchFailure::Invalid,
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.failure(),
            FetchFailure::Unreachable | FetchFailure::Busy
        )
    }

    /// How long the server asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What happened and what to do about it, for a sentence that names the thing asked for.
    pub fn brief(&self) -> String {
        match self {
            Self::Hosts { .. } | Self::Content { .. } => self.report(),
            Self::NoEndpoint { target, capability } => format!(
                "no host of {} may be asked: give one the capability {capability:?} in its hosts.toml",
                target.repository.registry()
            ),
            Self::Unreachable { host, problem, .. } => {
                format!(
                    "{host} {problem}; check that the registry runs and can be reached from here"
                )
            }
            Self::Tls { problem, .. } => problem.clone(),
            Self::Broken { host, source, .. } => {
                format!("the connection to {host} broke ({})", root(&**source))
            }
            Self::Stalled { host, waited, .. } => {
                format!("{host} sent nothing for {}", Seconds(*waited))
            }
            Self::Status {
                target,
                host,
                status,
                message,
                ..
            } => {
                let message = unnamed(target, message);
                match status {
                    404 | 410 => format!(
                        "{host} does not have it ({status}{}); push the image again",
                        Also(&message)
                    ),
                    416 => format!(
                        "{host} answered {status}{}: what it has is shorter than the manifest \
                         says; push the image again",
                        Said(&message)
                    ),
                    _ => format!("{host} answered {status}{}", Said(&message)),
                }
            }
            Self::Denied {
                target,
                host,
                status,
                advice,
                message,
            } => {
                let message = unnamed(target, message);
                let remedy = if advice.contains("credentials") {
                    "; an account that may pull from this repository has to be put there"
                } else {
                    ""
                };
                format!(
                    "{host} answered {status}{}: {advice}{remedy}",
                    Said(&message)
                )
            }
            Self::Credentials { host, source, .. } => {
                format!("credentials for {host}: {}", crate::ranges::report(source))
            }
            Self::Protocol { host, problem, .. } => format!("{host} {problem}"),
            Self::Digest { host, actual, .. } => {
                format!("{host} delivered other content, with digest {actual}")
            }
        }
    }

    /// The error and all its sources in one line.
    pub fn report(&self) -> String {
        crate::ranges::report(self)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { repository, object } = self;
        match object {
            Object::Manifest(name) => write!(f, "manifest {name} of {repository}"),
            Object::Blob(digest) => write!(f, "blob {digest} of {repository}"),
            Object::BlobRange(digest, range) => {
                let Range { start, end } = range;
                write!(f, "bytes {start}..{end} of blob {digest} of {repository}")
            }
            Object::Upload(digest) => write!(f, "upload of blob {digest} to {repository}"),
            Object::Token(scope) => write!(f, "token for {scope} of {repository}"),
        }
    }
}

/// `: "what the server said"`, or nothing.
struct Said<'a>(&'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " ({})", self.0)
    }
}

/// `: what the server said`, or nothing.
struct Also<'a>(&'a str);

impl fmt::Display for Also<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, ": {}", self.0)
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

/// Why a request got no reply.
#[derive(Debug)]
pub(super) enum SendError {
    /// No connection, a failed handshake, or a connection that broke.
    Client(hyper_util::client::legacy::Error),
    /// Nothing came for that long.
    Stalled(Duration),
    /// The TLS files of the host cannot be used.
    Setup(HostsError),
}

impl SendError {
    /// The typed error. `config` names the file in which the host is configured.
    pub(super) fn into_registry_error(
        self,
        target: &Arc<Target>,
        host: &str,
        config: &str,
    ) -> RegistryError {
        let (target, host) = (Arc::clone(target), host.to_owned());
        let error = match self {
            Self::Stalled(waited) => {
                return RegistryError::Stalled {
                    target,
                    host,
                    waited,
                };
            }
            Self::Setup(source) => {
                return RegistryError::Hosts {
                    registry: host,
                    source,
                };
            }
            Self::Client(error) => error,
        };
        if let Some(tls) = find::<rustls::Error>(&error) {
            let problem = tls_problem(tls, &host, config);
            return RegistryError::Tls {
                target,
                host,
                problem,
                source: Arc::new(error),
            };
        }
        if let Some(problem) = unreadable_content(&error) {
            return RegistryError::Content {
                target,
                source: Arc::new(io::Error::other(problem)),
            };
        }
        if !error.is_connect() {
            return RegistryError::Broken {
                target,
                host,
                source: Arc::new(error),
            };
        }
        let problem = match find::<io::Error>(&error).map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => "refused the connection",
            Some(io::ErrorKind::TimedOut) => "did not accept a connection in time",
            Some(io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => {
                "closed the connection at once"
            }
            _ => "cannot be reached",
        };
        RegistryError::Unreachable {
            target,
            host,
            problem: problem.to_owned(),
            source: Arc::new(error),
        }
    }

    /// Whether the peer seems to speak the other one of HTTP and HTTPS.
    pub(super) fn is_other_scheme(&self) -> bool {
        let Self::Client(error) = self else {
            return false;
        };
        let not_tls = matches!(
            find::<rustls::Error>(error),
            Some(rustls::Error::InvalidMessage(_))
        );
        let not_http = find::<hyper::Error>(error)
            .is_some_and(|error| error.is_parse() || error.is_incomplete_message());
        let hung_up = find::<io::Error>(error).is_some_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            )
        });
        not_tls || not_http || hung_up
    }
}

fn tls_problem(error: &rustls::Error, host: &str, config: &str) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Cert, Error as Tls};
    match error {
        Tls::InvalidCertificate(Cert::UnknownIssuer) => format!(
            "the certificate of {host} is not signed by a trusted authority; add its CA as \
             `ca = \"…\"` to {config}"
        ),
        Tls::InvalidCertificate(Cert::Expired | Cert::ExpiredContext { .. }) => {
            format!("the certificate of {host} has expired (or the clock of this machine is wrong)")
        }
        Tls::InvalidCertificate(Cert::NotValidForName | Cert::NotValidForNameContext { .. }) => {
            format!("the certificate of {host} was issued for another name")
        }
        Tls::InvalidCertificate(_) => format!("the certificate of {host} is not valid"),
        Tls::AlertReceived(
            Alert::CertificateRequired | Alert::BadCertificate | Alert::HandshakeFailure,
        ) => format!(
            "{host} refused the handshake; if it wants a client certificate, name it as \
             `client = …` in {config}"
        ),
        Tls::InvalidMessage(_) => format!(
            "{host} does not speak TLS; if it is a plain HTTP registry, write \
             `server = \"http://{host}\"` to {config}"
        ),
        _ => format!("the handshake with {host} failed"),
    }
}

/// What a server said, without the digest that the sentence around it names.
fn unnamed(target: &Target, message: &str) -> String {
    match &target.object {
        Object::Manifest(name) if name.contains(':') => message.replace(name.as_str(), "…"),
        Object::Blob(digest) | Object::BlobRange(digest, _) => {
            message.replace(&digest.to_string(), "…")
        }
        _ => message.to_owned(),
    }
}

/// The last of an error's sources.
fn root<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut root = error;
    // An error chain is short; the bound only guards against a cycle.
    for _ in 0..32 {
        let Some(source) = root.source() else { break };
        root = source;
    }
    root
}

/// The first error of type `E` among `error` and its sources, also inside of `io::Error`s.
pub(super) fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    // An error chain is short; the bound only guards against a cycle.
    for _ in 0..32 {
        let error = next?;
        if let Some(found) = error.downcast_ref::<E>() {
            // An io::Error that only wraps another one says less than the one inside.
            let wraps = error
                .downcast_ref::<io::Error>()
                .is_some_and(|outer| outer.get_ref().is_some());
            if !wraps {
                return Some(found);
            }
        }
        next = match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Marks an error of the request's own body, so that it is told from one of the connection.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UnreadableContent(pub(super) String);

fn unreadable_content(error: &hyper_util::client::legacy::Error) -> Option<String> {
    find::<UnreadableContent>(error).map(|content| content.0.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_inside_of_io_errors_are_found() {
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let wrapped = io::Error::other(io::Error::other(tls));
        assert!(find::<rustls::Error>(&wrapped).is_some());
        let refused = io::Error::other(io::Error::from(io::ErrorKind::ConnectionRefused));
        let kind = find::<io::Error>(&refused).map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::ConnectionRefused));
        assert!(find::<rustls::Error>(&refused).is_none());
    }

    #[test]
    fn a_target_names_everything() {
        let target = Target {
            repository: Repository::new("ghcr.io", "a/b").unwrap(),
            object: Object::BlobRange(Digest::of(b""), 5..9),
        };
        assert_eq!(
            target.to_string(),
            format!("bytes 5..9 of blob {} of ghcr.io/a/b", Digest::of(b""))
        );
    }
}
