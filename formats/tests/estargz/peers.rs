//! Programs that are not ours read our layers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use formats::{
    digest::Digest,
    stargz::{Built, WriterOptions},
};
use skip::skip;

use crate::{
    identity::write,
    tars::{Spec, tar, unpack},
};

/// An archive with one of everything, and a list of its paths to put first.
fn sample() -> (Vec<u8>, Vec<Vec<u8>>) {
    let entry = |flag: u8, name: &str| Spec {
        flag,
        name: name.as_bytes().to_vec(),
        mode: 0o755,
        seconds: 1_700_000_000,
        ..Spec::default()
    };
    let file = |name: &str, len: u32| Spec {
        content: (0..len).map(|at| (at / 5).to_le_bytes()[0]).collect(),
        ..entry(b'0', name)
    };
    let long = format!("usr/{}", "long-name-".repeat(20));
    let entries = [
        entry(b'5', "etc/"),
        file("etc/hostname", 12),
        file("etc/empty", 0),
        entry(b'5', "usr/"),
        entry(b'5', "usr/bin/"),
        Spec {
            mode: 0o4755,
            owner: (0, 70_000),
            user: "root",
            ..file("usr/bin/tool", 300_000)
        },
        file("usr/exact", 131_072),
        Spec {
            link: b"usr/bin/tool".to_vec(),
            mode: 0o4755,
            owner: (0, 70_000),
            ..entry(b'1', "usr/bin/hard")
        },
        Spec {
            link: b"../../etc/hostname".to_vec(),
            ..entry(b'2', "usr/bin/soft")
        },
        file(&long, 100),
        Spec {
            device: (1, 3),
            ..entry(b'3', "dev/null")
        },
        entry(b'6', "dev/pipe"),
        Spec {
            xattrs: vec![("user.k".to_owned(), b"a\0\xffb".to_vec())],
            nanos: 700_000_000,
            ..file("usr/attributed", 1)
        },
        file(".wh.gone", 0),
        file("etc/.wh..wh..opq", 0),
    ];
    let first = ["usr/bin/hard", "etc/hostname"];
    let first = first.map(|path| path.as_bytes().to_vec()).to_vec();
    (tar(&entries), first)
}

/// The sample as layers, with and without a start list.
fn layers(dir: &Path) -> Vec<(PathBuf, Built)> {
    let (tar, first) = sample();
    let mut layers = Vec::new();
    for (index, prioritized) in [Vec::new(), first].into_iter().enumerate() {
        let options = WriterOptions {
            chunk_size: 65536,
            prioritized,
            ..WriterOptions::default()
        };
        let (blob, built) = write(&tar, &options);
        let path = dir.join(format!("layer-{index}.tar.gz"));
        fs::write(&path, blob).unwrap();
        layers.push((path, built));
    }
    layers
}

#[test]
fn gzip_and_tar_read_our_layers() {
    for program in ["gzip", "tar"] {
        if Command::new(program).arg("--version").output().is_err() {
            skip(&format!("{program} is not installed"));
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for (path, built) in layers(dir.path()) {
        let output = Command::new("gzip").arg("-t").arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
        let output = Command::new("gzip").arg("-dc").arg(&path).output().unwrap();
        assert_eq!(Digest::of(&output.stdout), built.diff_id);
        let output = Command::new("tar")
            .arg("-tzvf")
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
        let listed = String::from_utf8_lossy(&output.stdout);
        // 15 entries, a landmark, the TOC.
        assert_eq!(listed.lines().count(), 17, "{listed}");
        assert!(listed.contains("usr/bin/hard link to usr/bin/tool"));
    }
}

#[test]
fn upstream_verifies_and_reads_our_layers() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers/estargz");
    let dir = tempfile::tempdir().unwrap();
    let reader = dir.path().join("estargz");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&reader)
        .arg(".")
        .current_dir(&source)
        .env("CGO_ENABLED", "0")
        .output();
    match built {
        Err(error) => {
            skip(&format!("no Go toolchain: {error}"));
            return;
        }
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr);
            skip(&format!(
                "the pinned Go modules cannot be had or built: {said}"
            ));
            return;
        }
        Ok(_) => {}
    }
    let (tar, _) = sample();
    let (tree, contents) = unpack(&tar);
    for (path, built) in layers(dir.path()) {
        let output = Command::new(&reader)
            .arg(&path)
            .arg(built.toc_digest.to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let listed = String::from_utf8(output.stdout).unwrap();
        let mut seen = 0;
        for row in listed.lines() {
            let columns: Vec<&str> = row.split('\t').collect();
            let name = columns[0].trim_matches('"');
            if columns[1] != "reg" || name.ends_with("landmark") {
                continue;
            }
            let of = match name {
                "usr/bin/hard" => "usr/bin/tool",
                own => own,
            };
            let content = &contents[of.as_bytes()];
            assert_eq!(columns[2], content.len().to_string(), "{row}");
            assert_eq!(columns[4], Digest::of(content).hex(), "{row}");
            if let Some(id) = tree.lookup(name.as_bytes()) {
                assert_eq!(columns[3], tree.inode(id).nlink.to_string(), "{row}");
            }
            seen += 1;
        }
        // Both names of the linked file, and the two whiteouts.
        assert_eq!(seen, contents.len() + 1, "{listed}");

        let wrong = Digest::of(b"another TOC").to_string();
        let refused = Command::new(&reader)
            .arg(&path)
            .arg(wrong)
            .output()
            .unwrap();
        assert!(!refused.status.success());
    }
}
