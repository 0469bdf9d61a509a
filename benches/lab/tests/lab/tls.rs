//! TLS with a private CA, and without anyone to trust.

use std::time::Duration;

use lab::Tls;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use crate::client::{Client, Fixture, connect_tls};

#[tokio::test]
async fn the_private_ca_is_what_clients_need() {
    let fixture = Fixture::new(|options| {
        options.tls = Tls::PrivateCa;
        options.redirect = Some(Duration::from_mins(1));
    })
    .await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("r", b"blob").unwrap();
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(lab.ca_pem_path().unwrap()).unwrap();
    roots.add(ca).unwrap();
    let mut client = connect_tls(lab, roots).await.unwrap();
    let answer = client.get(&format!("/v2/r/blobs/{digest}"), &[]).await;
    assert!(answer.header("location").starts_with("https://lab.test:"));

    let untrusting = connect_tls(lab, RootCertStore::empty())
        .await
        .err()
        .unwrap();
    assert!(
        untrusting.to_string().contains("UnknownIssuer"),
        "{untrusting}"
    );
    // The control port is plain.
    let mut admin = Client::try_connect(lab.admin_addr().unwrap())
        .await
        .unwrap();
    assert_eq!(admin.get("/_lab/info", &[]).await.status, 200);
}

#[tokio::test]
async fn a_self_signed_certificate_convinces_nobody() {
    let fixture = Fixture::new(|options| options.tls = Tls::SelfSigned).await;
    let lab = &fixture.lab;
    assert!(lab.ca_pem_path().is_none());
    let error = connect_tls(lab, RootCertStore::empty())
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}
