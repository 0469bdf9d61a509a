//! TLS client configurations: trusted roots, per-host CAs, client certificates.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, UnixTime,
    pem::{Error as PemError, PemObject},
};

use super::hosts::{HostsError, StampedFile, TlsSettings};

/// Which authorities are trusted besides those in `hosts.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrustedRoots {
    /// Those of the system: `SSL_CERT_FILE` and `SSL_CERT_DIR` where set, else the usual places.
    #[default]
    System,
    /// Those in these PEM files only.
    Files(Vec<PathBuf>),
}

/// Reads the trusted roots. Unreadable certificates of the system are skipped with a warning.
pub(super) fn load_roots(roots: &TrustedRoots) -> Result<RootCertStore, HostsError> {
    let mut store = RootCertStore::empty();
    match roots {
        TrustedRoots::System => {
            let loaded = rustls_native_certs::load_native_certs();
            for error in &loaded.errors {
                tracing::warn!(%error, "a certificate store of the system cannot be read");
            }
            let (added, ignored) = store.add_parsable_certificates(loaded.certs);
            if added == 0 {
                tracing::warn!(
                    ignored,
                    "no trusted certificate authority found on this system (package ca-certificates)"
                );
            }
        }
        TrustedRoots::Files(paths) => {
            for path in paths {
                add_authorities(&mut store, path)?;
            }
        }
    }
    Ok(store)
}

/// The configuration for hosts with these settings. Reads files.
pub(super) fn client_config(
    settings: &TlsSettings,
    roots: &RootCertStore,
) -> Result<ClientConfig, HostsError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = roots.clone();
    for file in &settings.ca {
        add_authorities(&mut roots, &file.path)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| HostsError::Certificate {
            path: PathBuf::new(),
            problem: error.to_string(),
        })?;
    let builder = if settings.skip_verify {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
    } else {
        builder.with_root_certificates(roots)
    };
    let Some((certificate, key)) = settings.client.first() else {
        return Ok(builder.with_no_client_auth());
    };
    if settings.client.len() > 1 {
        tracing::warn!(
            used = %certificate.path.display(),
            "several client certificates are configured for one host; the first one is used"
        );
    }
    let (chain, key) = client_certificate(certificate, key.as_ref())?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| HostsError::Certificate {
            path: certificate.path.clone(),
            problem: format!("the client certificate cannot be used: {error}"),
        })
}

fn add_authorities(store: &mut RootCertStore, path: &Path) -> Result<(), HostsError> {
    for certificate in certificates(path)? {
        store
            .add(certificate)
            .map_err(|error| HostsError::Certificate {
                path: path.to_owned(),
                problem: format!("a certificate cannot be used as an authority: {error}"),
            })?;
    }
    Ok(())
}

fn client_certificate(
    certificate: &StampedFile,
    key: Option<&StampedFile>,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), HostsError> {
    let chain = certificates(&certificate.path)?;
    // Without a file of its own the key is in the same file.
    let path = &key.unwrap_or(certificate).path;
    let pem = read(path)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| pem_error(path, &error))?;
    Ok((chain, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HostsError> {
    let pem = read(path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| pem_error(path, &error))?;
    if certificates.is_empty() {
        return Err(HostsError::Certificate {
            path: path.to_owned(),
            problem: "the file holds no PEM certificate".to_owned(),
        });
    }
    Ok(certificates)
}

fn read(path: &Path) -> Result<Vec<u8>, HostsError> {
    std::fs::read(path).map_err(|error| HostsError::Read {
        path: path.to_owned(),
        source: Arc::new(error),
    })
}

fn pem_error(path: &Path, error: &PemError) -> HostsError {
    let problem = match error {
        PemError::NoItemsFound => "the file holds no PEM key".to_owned(),
        error => error.to_string(),
    };
    HostsError::Certificate {
        path: path.to_owned(),
        problem,
    }
}

/// Accepts every certificate, for hosts with `skip_verify`.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
