//! Where every remote byte enters: registry client, range-request cache, prefetch, hydration.
#![forbid(unsafe_code)]

pub mod cache;
pub mod hydrate;
pub mod prefetch;
pub mod ranges;
pub mod registry;
pub mod source;
