//! Benchmarks, the sample images they share, and the demo behind `./run demo`.
#![forbid(unsafe_code)]

pub mod client;
pub mod containerd;
pub mod demo;
pub mod figures;
pub mod floor;
pub mod isolation;
mod node;
mod packed;
pub mod sample;
pub mod signals;
pub mod steady;
