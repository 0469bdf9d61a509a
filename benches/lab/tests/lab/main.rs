//! The registry over the network, as a client sees it.
#![expect(clippy::unwrap_used, reason = "tests")]

mod auth;
mod client;
mod distribution;
mod presence;
mod ranges;
mod rules;
mod tls;
