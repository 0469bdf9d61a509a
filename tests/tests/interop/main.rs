//! Images of other makers, hydration, wrong input and deep images, through the daemon's program.

#[expect(dead_code, reason = "shared with the lazy suite, which uses all of it")]
#[path = "../lazy/fixture.rs"]
mod fixture;

mod deep;
mod hydration;
mod made;
mod stargz;
mod third_party;
mod upstream;
mod world;
mod wrong;
