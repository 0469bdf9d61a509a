//! What the kernel shows of our images.
//!
//! Tests that mount start this program again, under a hard timeout and in a mount namespace of its
//! own, so that neither a hang nor a mount outlives them.

use std::{
    ffi::CString,
    fs::{self, File},
    io::Write as _,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
};

use formats::{
    erofs::{is_xattr_presented, write},
    tree::{Extent, Inode, InodeId, Kind, LayerTree, Regular, Xattrs},
    units::DecodedOffset,
};
use rustix::mount::{MountFlags, mount, unmount};
use skip::skip;

use crate::sample::{Sample, attrs, directory, everything};

const INSIDE: &str = "FORMATS_TEST_IN_NAMESPACE";

#[test]
fn the_kernel_shows_the_tree() {
    in_namespace("kernel::inside_tree");
}

#[test]
fn overlayfs_understands_whiteouts_and_opaque_directories() {
    in_namespace("kernel::inside_overlay");
}

#[test]
fn fsck_accepts_the_image() {
    if Command::new("fsck.erofs")
        .arg("--version")
        .output()
        .is_err()
    {
        skip("fsck.erofs (package erofs-utils) is not installed");
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for (name, (tree, device_len)) in [
        ("everything", everything()),
        ("empty", (LayerTree::empty(), 0)),
    ] {
        let layer = Layer::store(dir.path(), name, &tree, device_len);
        let output = Command::new("timeout")
            .args(["-s", "KILL", "60", "fsck.erofs", "-d3"])
            .arg(format!("--device={}", layer.device.display()))
            .arg(&layer.meta)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{name}: {said}");
    }
}

/// Runs the ignored test `name` of this program where its mounts are seen by nobody else.
fn in_namespace(name: &str) {
    if let Some(why) = cannot_mount() {
        skip(why);
        return;
    }
    let output = Command::new("timeout")
        .args(["-k", "5", "-s", "KILL", "120"])
        .args(["unshare", "--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            name,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

fn cannot_mount() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting needs root");
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.trim() == "erofs") {
        return Some("this kernel has no EROFS (or its module is not loaded)");
    }
    let release = rustix::system::uname();
    let mut numbers = release
        .release()
        .to_str()
        .unwrap_or_default()
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (version < (6, 12)).then_some("EROFS from a file needs Linux 6.12")
}

/// An image and its device in files.
struct Layer {
    meta: PathBuf,
    device: PathBuf,
}

impl Layer {
    fn store(dir: &Path, name: &str, tree: &LayerTree, device_len: u64) -> Self {
        let layer = Self {
            meta: dir.join(format!("{name}.erofs")),
            device: dir.join(format!("{name}.data")),
        };
        fs::write(&layer.meta, write(tree, device_len).unwrap()).unwrap();
        let device = File::create(&layer.device).unwrap();
        device.set_len(device_len).unwrap();
        for inode in tree.inodes() {
            if let Kind::Regular(file) = &inode.kind {
                for extent in &file.extents {
                    let bytes = content(extent.decoded.0, extent.len);
                    device.write_all_at(&bytes, extent.decoded.0).unwrap();
                }
            }
        }
        layer
    }

    fn mount(&self, at: &Path) {
        fs::create_dir_all(at).unwrap();
        let options = CString::new(format!("device={}", self.device.display())).unwrap();
        let flags = MountFlags::RDONLY;
        mount(&self.meta, at, "erofs", flags, options.as_c_str()).unwrap();
    }
}

/// Bytes that say where on the device they lie.
fn content(at: u64, len: u64) -> Vec<u8> {
    (at..at + len)
        .map(|at| {
            let mixed = (at >> 3)
                .wrapping_add(1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed.to_le_bytes()[usize::try_from(at & 7).unwrap()]
        })
        .collect()
}

fn expected_content(file: &Regular) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.size).unwrap()];
    for extent in &file.extents {
        let start = usize::try_from(extent.file_offset).unwrap();
        let extent = content(extent.decoded.0, extent.len);
        bytes[start..start + extent.len()].copy_from_slice(&extent);
    }
    bytes
}

#[test]
#[ignore = "runs inside the namespace that another test makes"]
fn inside_tree() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (tree, device_len) = everything();
    let layer = Layer::store(dir.path(), "l", &tree, device_len);
    let root = dir.path().join("mnt");
    layer.mount(&root);
    let result = std::panic::catch_unwind(|| {
        let mut numbers = std::collections::HashMap::new();
        let seen = compare(&tree, InodeId::ROOT, &root, &mut numbers);
        assert!(seen > 20_300, "{seen} names");
        assert_eq!(numbers.len(), tree.inodes().len());
    });
    unmount(&root, rustix::mount::UnmountFlags::DETACH).unwrap();
    result.unwrap();
    large_file(dir.path());
}

/// A file of more than 4 GiB in one chunk, of which a few bytes are not zero.
fn large_file(dir: &Path) {
    const SIZE: u64 = (6 << 30) + 123;
    const AT: u64 = 1 << 33;
    let extent = Extent {
        file_offset: 0,
        len: SIZE,
        decoded: DecodedOffset(AT),
    };
    let mut sample = Sample::new();
    let file = Regular {
        size: SIZE,
        extents: vec![extent],
    };
    sample.add("large", attrs(0o644), Kind::Regular(file));
    let (tree, _) = sample.finish();
    let layer = Layer {
        meta: dir.join("large.erofs"),
        device: dir.join("large.data"),
    };
    let device_len = (AT + SIZE).next_multiple_of(4096);
    fs::write(&layer.meta, write(&tree, device_len).unwrap()).unwrap();
    let device = File::create(&layer.device).unwrap();
    device.set_len(device_len).unwrap();
    let marks = [0, (1 << 32) - 3, (1 << 32) + 5, SIZE - 7];
    for mark in marks {
        device
            .write_all_at(&mark.to_le_bytes()[..7], AT + mark)
            .unwrap();
    }
    let root = dir.join("large");
    layer.mount(&root);
    let read = |at: u64| {
        let mut bytes = [0; 7];
        let file = File::open(root.join("large")).unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let found = marks.map(read);
    let elsewhere = read(3 << 30);
    unmount(&root, rustix::mount::UnmountFlags::DETACH).unwrap();
    for (mark, found) in marks.iter().zip(found) {
        assert_eq!(mark.to_le_bytes()[..7], found);
    }
    assert_eq!(elsewhere, [0; 7]);
}

/// Compares what lies at `path` with the inode `id`, and everything below. Returns the number of
/// names. `numbers` holds the inode numbers seen.
fn compare(
    tree: &LayerTree,
    id: InodeId,
    path: &Path,
    numbers: &mut std::collections::HashMap<u64, InodeId>,
) -> usize {
    let inode = tree.inode(id);
    compare_inode(inode, path);
    let number = fs::symlink_metadata(path).unwrap().ino();
    assert_eq!(*numbers.entry(number).or_insert(id), id, "{path:?}");
    let Kind::Directory(directory) = &inode.kind else {
        return 1;
    };
    let mut names: Vec<Vec<u8>> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_vec())
        .collect();
    names.sort_unstable();
    let expected: Vec<&Vec<u8>> = directory.entries.keys().collect();
    assert_eq!(names.iter().collect::<Vec<_>>(), expected, "{path:?}");
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let child = tree.inode(directory.entries[entry.file_name().as_bytes()]);
        let file_type = entry.file_type().unwrap();
        assert_eq!(file_type.is_dir(), matches!(child.kind, Kind::Directory(_)));
        assert_eq!(file_type.is_file(), matches!(child.kind, Kind::Regular(_)));
    }
    directory
        .entries
        .iter()
        .map(|(name, child)| {
            let path = path.join(std::ffi::OsStr::from_bytes(name));
            compare(tree, *child, &path, numbers)
        })
        .sum::<usize>()
        + 1
}

fn compare_inode(inode: &Inode, path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    assert_eq!(
        meta.mode() & 0o7777,
        u32::from(inode.attrs.mode),
        "{path:?}"
    );
    assert_eq!(meta.uid(), inode.attrs.uid, "{path:?}");
    assert_eq!(meta.gid(), inode.attrs.gid, "{path:?}");
    assert_eq!(meta.mtime(), inode.attrs.mtime.seconds, "{path:?}");
    let nanos = i64::from(inode.attrs.mtime.nanos);
    assert_eq!(meta.mtime_nsec(), nanos, "{path:?}");
    assert_eq!(meta.nlink(), u64::from(inode.nlink), "{path:?}");
    let rdev = (
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev()),
    );
    match &inode.kind {
        Kind::Directory(_) => assert!(kind.is_dir(), "{path:?}"),
        Kind::Regular(file) => {
            assert!(kind.is_file(), "{path:?}");
            assert_eq!(meta.len(), file.size, "{path:?}");
            let read = fs::read(path).unwrap();
            assert!(read == expected_content(file), "content of {path:?}");
        }
        Kind::Symlink(target) => {
            assert!(kind.is_symlink(), "{path:?}");
            assert_eq!(meta.len(), target.len() as u64, "{path:?}");
            let read = fs::read_link(path).unwrap();
            assert_eq!(read.as_os_str().as_bytes(), target, "{path:?}");
        }
        Kind::CharDevice(device) => {
            assert!(kind.is_char_device(), "{path:?}");
            assert_eq!(rdev, (device.major, device.minor), "{path:?}");
        }
        Kind::BlockDevice(device) => {
            assert!(kind.is_block_device(), "{path:?}");
            assert_eq!(rdev, (device.major, device.minor), "{path:?}");
        }
        Kind::Fifo => assert!(kind.is_fifo(), "{path:?}"),
        Kind::Whiteout => {
            assert!(kind.is_char_device(), "{path:?}");
            assert_eq!(meta.rdev(), 0, "{path:?}");
        }
    }
    let mut expected = inode.attrs.xattrs.clone();
    expected.retain(|name, _| is_xattr_presented(name));
    if matches!(&inode.kind, Kind::Directory(directory) if directory.opaque) {
        expected.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    }
    assert_eq!(xattrs(path), expected, "{path:?}");
}

fn xattrs(path: &Path) -> Xattrs {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut found = Xattrs::new();
    for name in names[..len].split(|byte| *byte == 0) {
        if name.is_empty() {
            continue;
        }
        let mut value = vec![0; 65536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    found
}

#[test]
#[ignore = "runs inside the namespace that another test makes"]
fn inside_overlay() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let lower = |sample: &mut Sample, path: &str| {
        let kind = sample.file(100);
        sample.add(path, attrs(0o644), kind);
    };
    let mut below = Sample::new();
    for path in ["deleted", "kept"] {
        lower(&mut below, path);
    }
    for path in ["merged", "opaque", "deleted-directory"] {
        below.add(path, attrs(0o755), directory(false));
        lower(&mut below, &format!("{path}/old"));
    }
    let mut above = Sample::new();
    above.add("deleted", attrs(0), Kind::Whiteout);
    above.add("deleted-directory", attrs(0), Kind::Whiteout);
    above.add("merged", attrs(0o700), directory(false));
    lower(&mut above, "merged/new");
    above.add("opaque", attrs(0o700), directory(true));
    lower(&mut above, "opaque/new");

    let mounted = |name: &str, sample: Sample| {
        let (tree, device_len) = sample.finish();
        let at = dir.path().join(format!("{name}.mnt"));
        Layer::store(dir.path(), name, &tree, device_len).mount(&at);
        at
    };
    let lowers = [mounted("above", above), mounted("below", below)];

    // Upper directories need a file system that can carry them, which a container's root may not.
    let scratch = dir.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    mount("none", &scratch, "tmpfs", MountFlags::empty(), None).unwrap();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(scratch.join(name)).unwrap();
    }
    let options = CString::new(format!(
        "lowerdir={}:{},upperdir={},workdir={}",
        lowers[0].display(),
        lowers[1].display(),
        scratch.join("upper").display(),
        scratch.join("work").display()
    ))
    .unwrap();
    let root = scratch.join("merged");
    mount(
        "overlay",
        &root,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();

    let result = std::panic::catch_unwind(|| {
        let list = |path: &str| {
            let mut names: Vec<_> = fs::read_dir(root.join(path))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort_unstable();
            names
        };
        assert_eq!(list(""), ["kept", "merged", "opaque"]);
        assert_eq!(list("merged"), ["new", "old"]);
        assert_eq!(list("opaque"), ["new"]);
        assert!(fs::symlink_metadata(root.join("deleted")).is_err());
        assert!(fs::symlink_metadata(root.join("opaque/old")).is_err());
        assert_eq!(fs::read(root.join("kept")).unwrap().len(), 100);
        // Copy-up from the lower image, and a new file in an opaque directory.
        let mut kept = File::options()
            .append(true)
            .open(root.join("kept"))
            .unwrap();
        kept.write_all(b"more").unwrap();
        assert_eq!(fs::read(root.join("kept")).unwrap().len(), 104);
        fs::write(root.join("opaque/added"), b"x").unwrap();
        assert_eq!(list("opaque"), ["added", "new"]);
        fs::write(root.join("deleted"), b"again").unwrap();
        assert_eq!(fs::read(root.join("deleted")).unwrap(), b"again");
    });
    for path in [&root, &scratch, &lowers[0], &lowers[1]] {
        unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    result.unwrap();
}
