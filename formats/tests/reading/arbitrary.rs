//! The fuzz bodies over their seeds, over damaged seeds and over noise, so that they run without a
//! fuzzer.

#[path = "../../fuzz/bodies.rs"]
mod bodies;
#[path = "../../fuzz/plain.rs"]
mod plain;

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// A target's name and what it does.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 8] = [
    ("tar", bodies::tar),
    ("footer", bodies::footer),
    ("toc", bodies::toc),
    ("gzip", bodies::gzip),
    ("chunk", bodies::chunk),
    ("proof", bodies::proof),
    ("erofs", bodies::erofs),
    ("oci", bodies::oci),
];

#[test]
fn seeds_and_their_parts() {
    plain::cut(HERE, &TARGETS);
}

#[test]
fn damaged_seeds() {
    plain::damaged(HERE, &TARGETS, 300);
}

#[test]
fn noise() {
    plain::noise(&TARGETS, 64);
}
