//! Certificates made at start.

use std::{fs, io, path::Path, path::PathBuf, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use crate::options::Tls;

/// Why no TLS server could be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The certificate could not be made.
    #[error("make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library rejected it.
    #[error("set up tls")]
    Config(#[from] rustls::Error),
    /// The CA could not be written.
    #[error("write {}", path.display())]
    Write {
        /// The PEM file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A server certificate in use.
pub(crate) struct Setup {
    pub(crate) acceptor: TlsAcceptor,
    /// PEM file of the CA, if one signed.
    pub(crate) ca_pem: Option<PathBuf>,
}

impl Setup {
    /// `None` without TLS. The CA is written to `dir/ca.pem`.
    pub(crate) fn make(mode: Tls, names: &[String], dir: &Path) -> Result<Option<Self>, TlsError> {
        let mut subject: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(Into::into).into();
        subject.extend(names.iter().cloned());
        let mut params = CertificateParams::new(subject)?;
        params
            .distinguished_name
            .push(DnType::CommonName, "lab registry");
        let key = KeyPair::generate()?;
        let (chain, ca_pem) = match mode {
            Tls::Off => return Ok(None),
            Tls::SelfSigned => (vec![params.self_signed(&key)?.der().clone()], None),
            Tls::PrivateCa => {
                let ca_key = KeyPair::generate()?;
                let mut ca_params = CertificateParams::default();
                ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                ca_params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
                ca_params
                    .distinguished_name
                    .push(DnType::CommonName, "lab registry private CA");
                let ca = ca_params.self_signed(&ca_key)?;
                let path = dir.join("ca.pem");
                fs::write(&path, ca.pem()).map_err(|source| TlsError::Write {
                    path: path.clone(),
                    source,
                })?;
                let issuer = Issuer::new(ca_params, ca_key);
                let leaf = params.signed_by(&key, &issuer)?;
                (vec![leaf.der().clone()], Some(path))
            }
        };
        Ok(Some(Self {
            acceptor: acceptor(chain, &key)?,
            ca_pem,
        }))
    }
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup")
            .field("ca_pem", &self.ca_pem)
            .finish_non_exhaustive()
    }
}

fn acceptor(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Result<TlsAcceptor, TlsError> {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
