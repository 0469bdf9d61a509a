//! Dependencies between the workspace's crates point one way.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, process::Command};

/// What each crate may depend on (development dependencies apart).
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("formats", &[]),
    ("lab", &["formats"]),
    ("storage", &["formats"]),
    ("fuse", &["formats", "storage"]),
    ("snapshotterd", &["formats", "storage", "fuse"]),
    (
        "core-runtime",
        &["formats", "storage", "fuse", "snapshotterd", "lab"],
    ),
    ("skip", &[]),
    ("harness", &["formats", "skip"]),
    (
        "benches",
        &[
            "formats",
            "storage",
            "fuse",
            "snapshotterd",
            "core-runtime",
            "lab",
            "harness",
        ],
    ),
    (
        "suite",
        &[
            "formats",
            "storage",
            "fuse",
            "snapshotterd",
            "core-runtime",
            "lab",
            "harness",
            "benches",
        ],
    ),
];

#[test]
fn no_arrow_points_back() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed: BTreeMap<_, _> = MAY_DEPEND_ON.iter().copied().collect();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let may = allowed
            .get(name)
            .unwrap_or_else(|| panic!("{name} is missing in this test's table"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            let ours = allowed.contains_key(on) && !dependency["path"].is_null();
            assert!(
                !ours || for_tests || may.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
}

#[test]
fn unsafe_code_stays_in_its_islands() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap();
    for name in ["formats", "storage", "benches/lab"] {
        let text = std::fs::read_to_string(root.join(name).join("src/lib.rs")).unwrap();
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{name} must forbid unsafe code"
        );
    }
}
