//! The lab registry: an OCI distribution registry with a link model, scripted faults and a
//! request log.
//!
//! It is the test double, the benchmark server and the registry of the demo. It speaks
//! distribution 1.1 (push, pull, ranges, referrers) over HTTP/1.1, keeps its content in a plain
//! directory and can be made to behave like a distant or a broken registry, from the same process
//! ([`Lab`]) or over HTTP (`/_lab/`, see docs/lab.md). It never talks to other hosts and trusts its
//! clients: it is no production registry.
//!
//! Entry points: [`Lab::start`] for tests, [`serve`] for programs, [`Handle`] for everything that
//! can be done to a running registry.
#![forbid(unsafe_code)]

mod auth;
mod body;
mod connection;
mod handle;
mod lab;
mod link;
mod log;
mod options;
mod query;
mod ranges;
mod reply;
mod routes;
mod rules;
mod server;
mod store;
mod tls;

pub use self::{
    handle::Handle,
    lab::Lab,
    link::{LinkModel, LinkParseError},
    log::{BlobTotals, Log, LogEntry, Marker, RequestKind, Totals},
    options::{Auth, Credentials, LabOptions, Tls},
    rules::{Action, Match, Rule, RuleId, RuleState, Rules},
    server::{LabError, Server, serve},
    store::{Manifest, NameError, Reference, RepoName, Store, StoreError, Tag},
    tls::TlsError,
};
