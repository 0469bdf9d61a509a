//! The directory tree of one layer: the one in-memory form every reader produces and every
//! presenter and writer consumes.

mod assemble;

pub use assemble::ShapeError;
pub(crate) use assemble::is_name;

use std::{borrow::Cow, collections::BTreeMap};

use crate::units::DecodedOffset;

pub mod builder;
mod path;
mod reason;

pub use builder::{Applied, Builder, Entry, EntryKind};
pub use path::TreePath;
pub use reason::{BuildError, NotLazyReason};

/// Index of an inode in its [`LayerTree`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u32);

impl InodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// The index as a `usize`.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Modification time. EROFS holds a signed 64-bit second and a nanosecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtime {
    /// Seconds since 1970, floored; may be negative.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// Extended attributes, sorted by full name (`user.x`, `security.capability`, ...).
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Owner, mode, time and extended attributes of an inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attrs {
    /// Permission bits with setuid, setgid and sticky (`mode & 0o7777`).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl Attrs {
    /// What a directory that no entry describes gets: 0755, root, 1970.
    pub fn implied_directory() -> Self {
        Self {
            mode: 0o755,
            ..Self::default()
        }
    }
}

/// Device number of a device node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rdev {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// A stretch of a regular file and where its bytes lie. Extents are sorted, do not overlap, and
/// what they leave out of `[0, size)` reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub file_offset: u64,
    /// Length in bytes; never 0.
    pub len: u64,
    /// Where the bytes lie in the decoded address space.
    pub decoded: DecodedOffset,
}

/// A directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Children by name (no `/`, not `.` or `..`, 1 to 255 bytes).
    pub entries: BTreeMap<Vec<u8>, InodeId>,
    /// Hides everything the layers below have here (`.wh..wh..opq`).
    pub opaque: bool,
    /// No entry of the layer describes it; its attributes come from the layers below.
    pub implied: bool,
}

/// A regular file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regular {
    /// Size in bytes.
    pub size: u64,
    /// Where its bytes are.
    pub extents: Vec<Extent>,
}

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    Regular(Regular),
    /// A symbolic link and its target bytes.
    Symlink(Vec<u8>),
    /// A character device.
    CharDevice(Rdev),
    /// A block device.
    BlockDevice(Rdev),
    /// A named pipe.
    Fifo,
    /// The name is deleted (`.wh.NAME`): presented as overlayfs wants it, a character device 0:0.
    Whiteout,
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Owner, mode, time, xattrs.
    pub attrs: Attrs,
    /// Type and type-specific data.
    pub kind: Kind,
    /// Names that point here (for a directory: 2 + subdirectories).
    pub nlink: u32,
}

/// The tree of one layer. Inode 0 is the root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTree {
    pub(crate) inodes: Vec<Inode>,
}

impl LayerTree {
    /// A tree that holds only the root directory: 0755, root, 1970, whatever an image says of it,
    /// as an ordinary unpack leaves it. (So it is never implied.)
    pub fn empty() -> Self {
        Self {
            inodes: vec![Inode {
                attrs: Attrs::implied_directory(),
                kind: Kind::Directory(Directory::default()),
                nlink: 2,
            }],
        }
    }

    /// All inodes; the position is the [`InodeId`].
    pub fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    /// One inode. Panics on an id of another tree.
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    /// The directory at `id`, if it is one.
    pub fn directory(&self, id: InodeId) -> Option<&Directory> {
        match &self.inode(id).kind {
            Kind::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// Looks a cleaned relative path up (no leading slash; "" is the root).
    pub fn lookup(&self, path: &[u8]) -> Option<InodeId> {
        path.split(|b| *b == b'/')
            .filter(|name| !name.is_empty())
            .try_fold(InodeId::ROOT, |at, name| {
                self.directory(at)?.entries.get(name).copied()
            })
    }

    /// A path that leads to `id`. Searches the whole tree: for messages.
    pub fn path(&self, id: InodeId) -> Option<TreePath> {
        let mut queue = vec![(Vec::new(), InodeId::ROOT)];
        while let Some((path, at)) = queue.pop() {
            if at == id {
                return Some(TreePath::new(path));
            }
            let entries = self.directory(at).map(|directory| &directory.entries);
            for (name, child) in entries.into_iter().flatten() {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                queue.push(([&path, slash, name].concat(), *child));
            }
        }
        None
    }

    /// Paths (cleaned, relative, "" is the root) of all directories no entry describes.
    pub fn implied_directories(&self) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut queue = vec![(Vec::new(), InodeId::ROOT)];
        while let Some((path, id)) = queue.pop() {
            let Some(directory) = self.directory(id) else {
                continue;
            };
            for (name, child) in &directory.entries {
                if matches!(self.inode(*child).kind, Kind::Directory(_)) {
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(name);
                    queue.push((below, *child));
                }
            }
            if directory.implied {
                found.push(path);
            }
        }
        found.sort_unstable();
        found
    }

    /// The tree as an ordinary unpack leaves it: `trusted.*` attributes act on the host, so an
    /// unpack never takes them from an archive.
    pub fn as_unpacked(&self) -> Cow<'_, Self> {
        let acts_on_host = |name: &[u8]| name.starts_with(b"trusted.");
        let has = |inode: &Inode| inode.attrs.xattrs.keys().any(|name| acts_on_host(name));
        if !self.inodes.iter().any(has) {
            return Cow::Borrowed(self);
        }
        let mut tree = self.clone();
        for inode in &mut tree.inodes {
            inode.attrs.xattrs.retain(|name, _| !acts_on_host(name));
        }
        Cow::Owned(tree)
    }

    /// Replaces the attributes of an implied directory with those of the layers below.
    /// Does nothing where `path` is not an implied directory.
    pub fn set_implied_attrs(&mut self, path: &[u8], attrs: Attrs) {
        if let Some(id) = self.lookup(path) {
            let inode = &mut self.inodes[id.index()];
            if matches!(&inode.kind, Kind::Directory(directory) if directory.implied) {
                inode.attrs = attrs;
            }
        }
    }
}
