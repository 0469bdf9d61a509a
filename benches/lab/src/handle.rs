//! What can be asked of a running registry and done to it.

use std::{io::Read, net::SocketAddr, path::Path, sync::Arc};

use formats::digest::Digest;

use crate::{
    link::LinkModel,
    log::Log,
    rules::{Action, Match, Rule, RuleId, Rules},
    server::Shared,
    store::{Store, StoreError},
};

/// A running registry, seen from inside its process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.shared.main
    }

    /// Where blob redirects lead.
    pub fn storage_addr(&self) -> SocketAddr {
        self.shared.storage
    }

    /// Where the control endpoints listen on their own.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.shared.admin
    }

    /// `address:port`, as it stands in image references.
    pub fn host(&self) -> String {
        self.shared.main.to_string()
    }

    /// `http://address:port` or `https://address:port`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.shared.scheme(), self.shared.main)
    }

    /// PEM file of the private CA, with [`Tls::PrivateCa`](crate::Tls::PrivateCa).
    pub fn ca_pem_path(&self) -> Option<&Path> {
        self.shared.ca_pem()
    }

    /// The content.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// The request log.
    pub fn log(&self) -> &Log {
        &self.shared.log
    }

    /// The scripted faults.
    pub fn rules(&self) -> &Rules {
        &self.shared.rules
    }

    /// Puts a blob into the store, past the network, the log and the rules.
    pub fn push_blob(&self, repo: &str, bytes: &[u8]) -> Result<Digest, StoreError> {
        self.shared.store.put_blob(&repo.parse()?, bytes)
    }

    /// The same from a reader; gives digest and length.
    pub fn push_blob_from(
        &self,
        repo: &str,
        reader: impl Read,
    ) -> Result<(Digest, u64), StoreError> {
        self.shared.store.put_blob_from(&repo.parse()?, reader)
    }

    /// Puts a manifest into the store under a tag or its digest; what it names is not checked.
    pub fn push_manifest(
        &self,
        repo: &str,
        reference: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Digest, StoreError> {
        self.shared
            .store
            .put_manifest(&repo.parse()?, &reference.parse()?, media_type, bytes)
    }

    /// Holds all GETs of a blob before their headers, until [`Handle::release`].
    pub fn stall(&self, digest: Digest) -> RuleId {
        self.shared.rules.add(Rule::new(
            Match::blob(digest),
            Action::Stall { after: None },
        ))
    }

    /// Removes a rule; requests it holds go on. False if there is none of that name.
    pub fn release(&self, rule: RuleId) -> bool {
        self.shared.rules.remove(rule)
    }

    /// The registry is gone: connections are cut and new ones refused until [`Handle::back`]. The
    /// port stays reserved. Returns once that is so.
    pub async fn gone(&self) {
        self.shared.set_present(false).await;
    }

    /// Takes connections again.
    pub async fn back(&self) {
        self.shared.set_present(true).await;
    }

    /// Puts another line in front of the registry, for connections accepted from now on.
    pub fn set_link(&self, link: Option<LinkModel>) {
        self.shared.set_link(link);
    }

    /// The line in front of new connections.
    pub fn link(&self) -> Option<LinkModel> {
        self.shared.link()
    }

    /// Requests to the token endpoint so far.
    pub fn token_requests(&self) -> u64 {
        self.shared.authority.token_requests()
    }

    /// Makes all tokens given out so far invalid.
    pub fn revoke_tokens(&self) {
        self.shared.authority.revoke_all();
    }
}
