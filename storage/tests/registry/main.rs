//! The registry client against small servers that behave as real ones do, and worse.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod auth;
mod certs;
mod docker_registry;
mod faults;
mod hosts;
mod lab_registry;
mod manifests;
mod proxies;
mod push;
mod ranges;
mod redirects;
mod server;
mod tls;
