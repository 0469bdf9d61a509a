//! The reading half of the crate against layers made by other tools, by generators, and by chance.

mod arbitrary;
mod fixtures;
mod generate;
mod listing;
mod mutations;
mod proving;
mod upstream;
mod writing;
