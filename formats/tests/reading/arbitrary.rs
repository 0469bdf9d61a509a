//! The fuzz bodies over their seeds, over damaged seeds and over noise, so that they run without a
//! fuzzer.

use std::{fs, path::Path};

use proptest::prelude::*;

#[path = "../../fuzz/bodies.rs"]
mod bodies;

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

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target);
    let mut paths: Vec<_> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no seeds");
    paths
        .iter()
        .map(|path| fs::read(path).expect("a seed"))
        .collect()
}

#[test]
fn seeds_and_their_beginnings() {
    for (target, body) in TARGETS {
        for seed in seeds(target) {
            body(&seed);
            let step = seed.len() / 50 + 1;
            for cut in (0..seed.len()).step_by(step) {
                body(&seed[..cut]);
                body(&seed[cut..]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn damaged_seeds(
        target in 0..TARGETS.len(),
        pick in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (name, body) = TARGETS[target];
        let mut seed = pick.get(&seeds(name)).clone();
        for (at, byte) in damage {
            let at = at.index(seed.len());
            seed[at] = byte;
        }
        body(&seed);
    }

    #[test]
    fn noise(data in prop::collection::vec(any::<u8>(), 0..3000)) {
        for (_, body) in TARGETS {
            body(&data);
        }
    }
}
