//! Benchmarks, the sample images they share, and the demo behind `./run demo`.
#![forbid(unsafe_code)]

pub mod client;
pub mod demo;
pub mod sample;
