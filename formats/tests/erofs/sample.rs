//! A layer that holds one of everything.

use formats::{
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Mtime, Rdev, Regular},
    units::DecodedOffset,
};

const BLOCK: u64 = 4096;

/// A tree that grows by paths.
pub(crate) struct Sample {
    inodes: Vec<Inode>,
    device_len: u64,
}

impl Sample {
    pub(crate) fn new() -> Self {
        Self {
            inodes: vec![Inode {
                attrs: attrs(0o755),
                kind: directory(false),
                nlink: 2,
            }],
            device_len: 0,
        }
    }

    /// Adds an inode at `path`; parents must exist.
    pub(crate) fn add(&mut self, path: &str, attrs: Attrs, kind: Kind) -> InodeId {
        let id = InodeId(u32::try_from(self.inodes.len()).unwrap());
        let is_directory = matches!(kind, Kind::Directory(_));
        self.inodes.push(Inode {
            attrs,
            kind,
            nlink: if is_directory { 2 } else { 1 },
        });
        let parent = self.name(path, id);
        if is_directory {
            self.inodes[parent.index()].nlink += 1;
        }
        id
    }

    /// Adds one more name.
    pub(crate) fn link(&mut self, path: &str, id: InodeId) {
        self.name(path, id);
        self.inodes[id.index()].nlink += 1;
    }

    fn name(&mut self, path: &str, id: InodeId) -> InodeId {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut at = InodeId::ROOT;
        for part in parent.split('/').filter(|part| !part.is_empty()) {
            at = self.entries(at).entries[part.as_bytes()];
        }
        self.entries(at)
            .entries
            .insert(name.as_bytes().to_vec(), id);
        at
    }

    fn entries(&mut self, id: InodeId) -> &mut Directory {
        match &mut self.inodes[id.index()].kind {
            Kind::Directory(directory) => directory,
            other => panic!("{other:?} is no directory"),
        }
    }

    /// A file of `size` bytes in one stretch.
    pub(crate) fn file(&mut self, size: u64) -> Kind {
        let extents = self.extent(0, size).into_iter().collect();
        Kind::Regular(Regular { size, extents })
    }

    /// Device space for `len` bytes of a file from `file_offset` on.
    pub(crate) fn extent(&mut self, file_offset: u64, len: u64) -> Option<Extent> {
        let decoded = DecodedOffset(self.device_len);
        self.device_len += len.next_multiple_of(BLOCK);
        (len > 0).then_some(Extent {
            file_offset,
            len,
            decoded,
        })
    }

    pub(crate) fn finish(self) -> (LayerTree, u64) {
        let tree = LayerTree::from_inodes(self.inodes).expect("the sample is a tree");
        (tree, self.device_len)
    }
}

pub(crate) fn attrs(mode: u16) -> Attrs {
    Attrs {
        mode,
        mtime: Mtime {
            seconds: 1_700_000_000,
            nanos: 0,
        },
        ..Attrs::default()
    }
}

pub(crate) fn directory(opaque: bool) -> Kind {
    Kind::Directory(Directory {
        opaque,
        ..Directory::default()
    })
}

fn with_xattrs(mode: u16, xattrs: &[(&str, &[u8])]) -> Attrs {
    Attrs {
        xattrs: xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
            .collect(),
        ..attrs(mode)
    }
}

/// An access ACL the kernel accepts: owner, one user, group, mask, others.
fn acl() -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 4, 1234),
        (4, 5, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 5, u32::MAX),
    ] {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// One of every kind of inode, name, size and time.
pub(crate) fn everything() -> (LayerTree, u64) {
    let mut sample = Sample::new();
    files(&mut sample);
    special(&mut sample);
    xattrs(&mut sample);

    sample.add("deep", attrs(0o755), directory(false));
    let mut path = "deep".to_owned();
    for level in 0..60 {
        path = format!("{path}/level-{level}");
        sample.add(&path, attrs(0o711), directory(false));
    }
    let kind = sample.file(10);
    sample.add(&format!("{path}/bottom"), attrs(0o600), kind);

    sample.add("many", attrs(0o755), directory(false));
    for index in 0..20_000 {
        let kind = if index % 1000 == 0 {
            sample.file(index + 1)
        } else {
            Kind::Regular(Regular::default())
        };
        sample.add(&format!("many/entry-{index}"), attrs(0o644), kind);
    }
    sample.add("middling", attrs(0o755), directory(false));
    for index in 0..200 {
        sample.add(
            &format!("middling/{index:0>40}"),
            attrs(0o755),
            directory(false),
        );
    }
    sample.finish()
}

fn files(sample: &mut Sample) {
    sample.add("sizes", attrs(0o1777), directory(false));
    for size in [0, 1, 4095, 4096, 4097, 65536, (3 << 20) + 5] {
        let kind = sample.file(size);
        sample.add(&format!("sizes/{size}"), attrs(0o644), kind);
    }
    // Extents out of order on the device, holes at the start, in the middle and at the end.
    let late = sample.extent(8192, 4096).unwrap();
    let early = sample.extent(0, 8192).unwrap();
    sample.add(
        "sizes/swapped",
        attrs(0o644),
        Kind::Regular(Regular {
            size: 12288,
            extents: vec![early, late],
        }),
    );
    let first = sample.extent(16384, 4096).unwrap();
    let second = sample.extent(1 << 20, 16384).unwrap();
    sample.add(
        "sizes/holes",
        attrs(0o644),
        Kind::Regular(Regular {
            size: (2 << 20) + 77,
            extents: vec![first, second],
        }),
    );
    sample.add(
        "sizes/all-hole",
        attrs(0o644),
        Kind::Regular(Regular {
            size: 1_000_000,
            extents: Vec::new(),
        }),
    );
    let kind = sample.file(5000);
    let shared = sample.add("sizes/linked", attrs(0o4755), kind);
    sample.link("linked-elsewhere", shared);
    sample.link("sizes/linked-again", shared);

    let longest = "n".repeat(255);
    let kind = sample.file(3);
    sample.add(&longest, attrs(0o644), kind);
    sample.add(
        &format!("{}d", "m".repeat(254)),
        attrs(0o755),
        directory(false),
    );
    for name in ["!before-the-dot", "-", "..x", "~", "\u{fc}"] {
        let kind = sample.file(1);
        sample.add(name, attrs(0o644), kind);
    }
}

fn special(sample: &mut Sample) {
    let device = |major, minor| Rdev { major, minor };
    sample.add("null", attrs(0o666), Kind::CharDevice(device(1, 3)));
    sample.add(
        "wide",
        attrs(0o640),
        Kind::CharDevice(device(4095, 0xf_ffff)),
    );
    sample.add("disk", attrs(0o660), Kind::BlockDevice(device(259, 70_000)));
    sample.add("pipe", attrs(0o622), Kind::Fifo);
    sample.add("gone", Attrs::default(), Kind::Whiteout);
    sample.add("opaque", attrs(0o750), directory(true));
    sample.add("link", attrs(0o777), Kind::Symlink(b"../target".to_vec()));
    let long = b"x/".repeat(2047);
    sample.add("long-link", attrs(0o777), Kind::Symlink(long));
    for (name, mode) in [("suid", 0o4755), ("sgid", 0o2755), ("sticky", 0o1600)] {
        let kind = sample.file(1);
        sample.add(name, attrs(mode), kind);
    }
    for (name, seconds, nanos) in [
        ("epoch", 0, 0),
        ("epoch-and-a-bit", 0, 1),
        ("before-1970", -1, 999_999_999),
        ("1901", -2_177_452_800, 0),
        ("2100", 4_102_444_800, 123_456_789),
    ] {
        let mut attrs = attrs(0o644);
        attrs.mtime = Mtime { seconds, nanos };
        let kind = sample.file(1);
        sample.add(name, attrs, kind);
    }
    let mut owned = attrs(0o600);
    owned.uid = 4_000_000_000;
    owned.gid = 70_000;
    let kind = sample.file(1);
    sample.add("owned", owned, kind);
}

fn xattrs(sample: &mut Sample) {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let large = vec![7; 60_000];
    let long_name = format!("user.{}", "k".repeat(250));
    let acl = acl();
    let all: &[(&str, &[u8])] = &[
        ("user.empty", b""),
        ("user.binary", b"a\0b\n\xff"),
        (&long_name, b"long name"),
        ("user.large", &large),
        ("security.capability", capability),
        ("security.other", b"s"),
        ("trusted.t", b"t"),
        ("system.posix_acl_access", &acl),
        // None of these reaches the kernel.
        ("trusted.overlay.redirect", b"/etc"),
        ("user.overlay.opaque", b"y"),
        ("com.apple.provenance", b"x"),
    ];
    let kind = sample.file(6000);
    sample.add("xattrs", with_xattrs(0o755, all), kind);
    let mut on_directory = all.to_vec();
    on_directory.push(("system.posix_acl_default", &acl));
    sample.add(
        "xattrs-directory",
        with_xattrs(0o755, &on_directory),
        directory(true),
    );
    sample.add(
        "xattrs-link",
        with_xattrs(0o777, &[("security.l", b"1"), ("trusted.l", b"2")]),
        Kind::Symlink(b"xattrs".to_vec()),
    );
    let pages = vec![9; 4090];
    sample.add(
        "xattrs-link-far",
        with_xattrs(0o777, &[("trusted.l", &pages)]),
        Kind::Symlink(b"xattrs".to_vec()),
    );
}
