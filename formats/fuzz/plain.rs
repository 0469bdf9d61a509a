// Runs fuzz bodies without a fuzzer, as a plain test of any crate that has some: over their seeds,
// the beginnings and ends of those, damaged seeds, and noise.

use std::{fs, path::Path};

use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestRunner},
};

/// A target's name and what it does with its input.
type Target = (&'static str, fn(&[u8]));

fn seeds(manifest_dir: &str, target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(manifest_dir).join("fuzz/seeds").join(target);
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

/// Every seed, and every beginning and end of it (some, of long ones).
pub(crate) fn cut(manifest_dir: &str, targets: &[Target]) {
    for (target, body) in targets {
        for seed in seeds(manifest_dir, target) {
            body(&seed);
            for at in (0..seed.len()).step_by(seed.len() / 300 + 1) {
                body(&seed[..at]);
                body(&seed[at..]);
            }
        }
    }
}

/// Seeds with some bytes changed, some left out and some put in.
pub(crate) fn damaged(manifest_dir: &str, targets: &[Target], cases: u32) {
    let seeds: Vec<_> = targets
        .iter()
        .map(|(target, _)| seeds(manifest_dir, target))
        .collect();
    let edit = (any::<Index>(), any::<u8>(), 0..3_u8);
    let input = (
        0..targets.len(),
        any::<Index>(),
        prop::collection::vec(edit, 1..6),
    );
    let test = |(target, pick, edits): (usize, Index, Vec<(Index, u8, u8)>)| {
        let mut seed = pick.get(&seeds[target]).clone();
        for (at, byte, how) in edits {
            let at = at.index(seed.len() + 1);
            match how {
                0 if at < seed.len() => seed[at] = byte,
                1 if at < seed.len() => drop(seed.remove(at)),
                _ => seed.insert(at, byte),
            }
        }
        targets[target].1(&seed);
        Ok(())
    };
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    });
    if let Err(error) = runner.run(&input, test) {
        panic!("{error}");
    }
}

/// Bytes and text without any form.
pub(crate) fn noise(targets: &[Target], cases: u32) {
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    });
    let input = (prop::collection::vec(any::<u8>(), 0..600), "\\PC{0,80}");
    let outcome = runner.run(&input, |(bytes, text)| {
        for (_, body) in targets {
            body(&bytes);
            body(text.as_bytes());
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
