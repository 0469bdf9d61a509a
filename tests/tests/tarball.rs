//! The test images' tar writer is read back by the machine's own tar.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use suite::{tarball::Tarball, workdir::Workdir};

#[test]
fn the_machines_tar_reads_our_tarballs() {
    let work = Workdir::new();
    let long = format!("dir/{}", "n".repeat(250));
    let tar = Tarball::new()
        .dir("dir")
        .mode(0o4755)
        .owner(1, 2)
        .mtime(0, 0)
        .file(&long, b"hello")
        .mtime(-86_400, 0)
        .file("dir/old", b"")
        .hardlink("dir/link", "dir/old")
        .whiteout("dir/gone")
        .finish();
    let path = work.path().join("a.tar");
    std::fs::write(&path, tar).unwrap();
    let output = Command::new("tar")
        .arg("-tvf")
        .arg(&path)
        .env("TZ", "UTC")
        .output()
        .unwrap();
    let listing = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        listing.contains(&long) && listing.contains("-rwsr-xr-x 1/2"),
        "{listing}"
    );
    assert!(
        listing.contains("1969-12-31") && listing.contains("dir/.wh.gone"),
        "{listing}"
    );
}
