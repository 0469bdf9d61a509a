//! What may fail and must not be noticed: daemons killed at any moment, registries gone or silent,
//! reboots, signals. Everything is read back by processes of their own and checked against the
//! SHA-256 of what was put into the images.

#[path = "../lazy/fixture.rs"]
#[expect(dead_code, reason = "the lazy suite uses all of it")]
mod fixture;
mod full;
mod kills;
mod offline;
mod stalls;
mod teardown;
mod worker;
mod world;
