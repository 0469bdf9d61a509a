//! Images that other tools wrote.

use std::{fs, os::unix::ffi::OsStrExt as _, path::Path, process::Command};

use formats::{
    erofs::{Image, ReadError, write},
    limits::Limits,
    tree::{InodeId, Kind, LayerTree},
};
use skip::skip;

/// A small directory in the temporary directory `dir`.
fn source(dir: &Path) -> std::path::PathBuf {
    let root = dir.join("source");
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("small"), b"small file\n").unwrap();
    let large: Vec<u8> = (0..300_000_u32)
        .map(|at| (at / 7).to_le_bytes()[0])
        .collect();
    fs::write(root.join("a/large"), &large).unwrap();
    fs::write(root.join("a/b/c/block"), &large[..4096]).unwrap();
    fs::hard_link(root.join("small"), root.join("a/hard")).unwrap();
    std::os::unix::fs::symlink("../small", root.join("a/soft")).unwrap();
    for index in 0..400 {
        fs::write(root.join(format!("a/b/file-number-{index}")), b"").unwrap();
    }
    root
}

/// Compares names, types, sizes, targets and hard links, and content through `data`.
fn compare(tree: &LayerTree, id: InodeId, path: &Path, data: &[u8]) {
    match &tree.inode(id).kind {
        Kind::Directory(directory) => {
            let mut names: Vec<Vec<u8>> = fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
                .collect();
            names.sort_unstable();
            assert!(directory.entries.keys().eq(names.iter()), "{path:?}");
            for (name, child) in &directory.entries {
                let path = path.join(std::ffi::OsStr::from_bytes(name));
                compare(tree, *child, &path, data);
            }
        }
        Kind::Regular(file) => {
            let mut bytes = vec![0; usize::try_from(file.size).unwrap()];
            for extent in &file.extents {
                let to = usize::try_from(extent.file_offset).unwrap();
                let from = usize::try_from(extent.decoded.0).unwrap();
                let len = usize::try_from(extent.len).unwrap();
                bytes[to..to + len].copy_from_slice(&data[from..from + len]);
            }
            assert!(bytes == fs::read(path).unwrap(), "{path:?}");
        }
        Kind::Symlink(target) => {
            let read = fs::read_link(path).unwrap();
            assert_eq!(read.as_os_str().as_bytes(), target);
        }
        other => panic!("{path:?}: {other:?}"),
    }
}

#[test]
fn what_mkfs_writes_is_read() {
    if Command::new("mkfs.erofs")
        .arg("--version")
        .output()
        .is_err()
    {
        skip("mkfs.erofs (package erofs-utils) is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let image = dir.path().join("image");
    let blob = dir.path().join("blob");
    let make = |args: &[&str]| {
        let output = Command::new("mkfs.erofs")
            .args(args)
            .args([&image, &source])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        fs::read(&image).unwrap()
    };
    let limits = Limits::default();

    for args in [&["-Eforce-inode-extended"][..], &["-Eforce-inode-compact"]] {
        let bytes = make(args);
        let opened = Image::open(&bytes).unwrap();
        assert_eq!(opened.device_len(), None);
        let tree = opened.tree(&limits).unwrap();
        compare(&tree, InodeId::ROOT, &source, &bytes);
        let linked = tree.inode(tree.lookup(b"a/hard").unwrap());
        assert_eq!(linked.nlink, 2);
        assert_eq!(tree.lookup(b"a/hard"), tree.lookup(b"small"));
    }

    // mkfs.erofs 1.8 fails without a word unless it exists.
    fs::File::create(&blob).unwrap();
    let blobdev = format!("--blobdev={}", blob.display());
    let bytes = make(&["--chunksize=4096", &blobdev]);
    let opened = Image::open(&bytes).unwrap();
    let tree = opened.tree(&limits).unwrap();
    let data = fs::read(&blob).unwrap();
    // mkfs.erofs before 1.8 leaves the length out.
    let stated = opened.device_len().unwrap();
    let device_len = data.len() as u64;
    assert!(stated == 0 || stated == device_len.next_multiple_of(4096));
    compare(&tree, InodeId::ROOT, &source, &data);
    // The same tree, written by us over the same device.
    let ours = write(&tree, device_len).unwrap();
    let again = Image::open(&ours).unwrap().tree(&limits).unwrap();
    assert_eq!(again, tree);

    let bytes = make(&["-zlz4"]);
    assert!(matches!(
        Image::open(&bytes).and_then(|image| image.tree(&limits)),
        Err(ReadError::Unsupported { .. })
    ));
}
