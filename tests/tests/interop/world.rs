//! What these tests share beside the fixture of the lazy suite.

use formats::digest::Digest;
use lab::Totals;
use serde_json::Value;
use suite::{isolate, machine, pushed::PushedImage, skip};

use crate::fixture::Fixture;

/// One fetch may overlap what is local already by this much, which shows in tiny layers only.
const ONE_REQUEST: u64 = 64 << 10;

/// Whether the test may go on: as root, in a process and a mount namespace of its own.
pub(crate) fn ready() -> bool {
    if !machine::is_root() {
        skip("mounting needs root");
        return false;
    }
    isolate::enter(400)
}

/// Hydrates everything the daemon holds, waits for it, and returns the verdicts.
pub(crate) fn verdicts(fixture: &Fixture) -> Vec<Value> {
    let (status, answer) = fixture.admin("POST", "/v1/hydrate");
    assert_eq!(status, 200, "{answer}");
    answer["layers"].as_array().expect("a list").clone()
}

/// Asserts that every layer is complete and proven.
pub(crate) fn all_proven(fixture: &Fixture) {
    for layer in verdicts(fixture) {
        assert!(
            layer["verdict"] == "proven" && layer["complete"] == true,
            "{layer}\n{}",
            fixture.daemon.log()
        );
    }
}

/// Asserts the bound on what the registry sent of each layer: 1.01 of its size, or for layers
/// where that is less than one request of 64 KiB, its size and one such request.
pub(crate) fn within_egress_bound(totals: &Totals, layers: &[(Digest, u64)]) {
    let unique: std::collections::BTreeMap<_, _> = layers.iter().copied().collect();
    let all: u64 = unique.values().sum();
    let sent_of = |digest| totals.blobs.get(digest).map_or(0, |blob| blob.bytes);
    let sent: u64 = unique.keys().map(sent_of).sum();
    eprintln!("all layers: {sent} of {all} bytes sent");
    assert!(
        sent <= (all + all / 100).max(all + ONE_REQUEST),
        "{sent} bytes sent of {all}"
    );
    for (digest, size) in layers {
        let sent = totals.blobs.get(digest).map_or(0, |blob| blob.bytes);
        let bound = (size + size / 100).max(size + ONE_REQUEST);
        eprintln!("layer {digest}: {sent} of {size} bytes sent");
        assert!(sent <= bound, "{digest}: {sent} bytes sent of {size}");
    }
}

/// Digest and size of each layer.
pub(crate) fn sizes(image: &PushedImage) -> Vec<(Digest, u64)> {
    image
        .layers
        .iter()
        .map(|layer| (layer.digest(), layer.descriptor.size))
        .collect()
}
