//! Where every remote byte enters: registry client, range-request cache, prefetch, hydration.
#![forbid(unsafe_code)]

pub mod ranges;
pub mod source;
