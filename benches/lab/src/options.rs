//! How a registry is set up.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::link::LinkModel;

/// Everything a registry is started with.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "written with `..LabOptions::new(dir)`"
)]
pub struct LabOptions {
    /// The store; created where missing. Anything pushed earlier is there again.
    pub dir: PathBuf,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The line in front of it; `None` is as fast as the machine.
    pub link: Option<LinkModel>,
    /// Plain HTTP or TLS.
    pub tls: Tls,
    /// Names and addresses to put into the certificate beside localhost, 127.0.0.1 and ::1.
    pub tls_names: Vec<String>,
    /// Who may pull and push.
    pub auth: Auth,
    /// Answer GETs of blobs with a redirect to the storage port, signed for so long.
    pub redirect: Option<Duration>,
    /// Append a JSON line per finished request to this file.
    pub log_file: Option<PathBuf>,
    /// Requests the log in memory remembers.
    pub log_keep: usize,
    /// Where the control endpoints listen on their own. `None` turns all of `/_lab/` off.
    pub admin: Option<SocketAddr>,
}

impl LabOptions {
    /// Plain HTTP on a free loopback port, open to all, unshaped, with control endpoints.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let free_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            dir: dir.into(),
            listen: free_port,
            link: None,
            tls: Tls::Off,
            tls_names: Vec::new(),
            auth: Auth::None,
            redirect: None,
            log_file: None,
            log_keep: 1_000_000,
            admin: Some(free_port),
        }
    }
}

/// Transport security.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tls {
    /// Plain HTTP.
    #[default]
    Off,
    /// A certificate of a private CA made at start; its PEM file is at
    /// [`Handle::ca_pem_path`](crate::Handle::ca_pem_path).
    PrivateCa,
    /// A self-signed certificate that nobody can trust.
    SelfSigned,
}

/// Access control.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Auth {
    /// Open to all.
    #[default]
    None,
    /// HTTP basic authentication on every request.
    Basic(Credentials),
    /// Tokens from `/token` on the same server.
    Bearer {
        /// What the token endpoint asks for; `None` gives tokens to anyone.
        credentials: Option<Credentials>,
        /// Life of a token; the reply announces it in whole seconds, rounded up.
        expires_in: Duration,
    },
}

/// A user and a password.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "there is nothing else to it")]
pub struct Credentials {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}
