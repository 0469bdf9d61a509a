//! Compiles the protos under `proto/` in process; no protoc is needed.

use std::{error::Error, path::PathBuf};

const PROTOS: [&str; 6] = [
    "containerd/services/snapshots/v1/snapshots.proto",
    "containerd/services/content/v1/content.proto",
    "containerd/services/images/v1/images.proto",
    "containerd/services/version/v1/version.proto",
    "containerd/services/introspection/v1/introspection.proto",
    "containerd/services/namespaces/v1/namespace.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("proto");
    let files = protox::compile(PROTOS, [root])?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .btree_map(".")
        .compile_fds(files)?;
    Ok(())
}
