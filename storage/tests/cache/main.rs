//! The cache from outside: layers served from a source in memory that can be told to misbehave.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod corruption;
mod estargz;
mod fixture;
mod full;
mod hydration;
mod isolation;
mod model;
mod reading;
mod restart;
mod source;
mod whole;
