//! Images made by `snapctl image convert`, and what the registry holds of them.

use std::process::Command;

use formats::oci::{ImageConfig, Manifest};
use lab::{Lab, Reference};
use suite::machine::binary;

/// `snapctl image convert ARGS`.
pub(crate) fn convert(args: &[&str]) {
    let converted = Command::new("timeout")
        .args(["-k", "5", "120"])
        .arg(binary("snapctl"))
        .args(["image", "convert"])
        .args(args)
        .output()
        .expect("timeout(1) starts");
    let error = String::from_utf8_lossy(&converted.stderr);
    assert!(converted.status.success(), "snapctl: {error}");
}

/// Manifest and config of an image in the registry's store.
pub(crate) fn stored(lab: &Lab, repository: &str, tag: &str) -> (Manifest, ImageConfig) {
    let name = repository.parse().expect("a repository");
    let reference = Reference::Tag(tag.parse().expect("a tag"));
    let found = lab.store().manifest(&name, &reference).expect("the store");
    let found = found.unwrap_or_else(|| panic!("{repository}:{tag} was not pushed"));
    let manifest = Manifest::parse(&found.bytes, Some(&found.media_type)).expect("a manifest");
    let config = std::fs::read(lab.store().blob_path(&manifest.config.digest));
    let config = ImageConfig::parse(&config.expect("a config")).expect("a config");
    (manifest, config)
}
