//! Builds a [`LayerTree`] from the entries of one layer in stream order.
//!
//! The one place that knows what an entry does to a tree. An index reader and the prover that
//! checks the index against the tar both go through it, so a difference between their trees is a
//! difference between their entries. The rules are those of an ordinary unpack by containerd
//! (`archive.Apply` into an overlayfs upper directory), where a layer can be unpacked at all:
//!
//! - paths are cleaned; missing parents become *implied* directories;
//! - a later entry replaces an earlier one of the same name, a directory over a directory only
//!   updates its attributes and keeps its children;
//! - a hard link adds a name to an earlier non-directory of the layer, and its own mode, owner,
//!   time and xattrs overwrite those of the inode (other xattrs stay, but for file capabilities);
//! - `.wh.NAME` deletes NAME of the layers below unless this layer also brings a real NAME, before
//!   or after; `.wh..wh..opq` makes its directory opaque; other `.wh..wh.*` names are metadata of
//!   aufs and are left out, with everything below them when they stand at the root;
//! - the entry of the root directory is ignored, the root is always 0755 0:0;
//! - symbolic links are 0777; times before 1970 or after what an `i64` of nanoseconds holds are 0.

use std::collections::btree_map;

use crate::{
    limits::Limits,
    tree::{
        Attrs, BuildError, Directory, Extent, Inode, InodeId, Kind, LayerTree, NotLazyReason, Rdev,
        Regular, TreePath, Xattrs,
        path::{clean_into, split_last},
    },
};

mod rules;

use rules::{
    bounded, checked_rdev, count_name, is_exact_text, name_error, not_a_directory, xattr_bytes,
};

/// Longest name of a directory entry.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest target of a symbolic link.
const MAX_TARGET_BYTES: usize = 4095;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const WHITEOUT_META_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// One entry of a layer as its stream or index spells it.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// The path, not cleaned.
    pub path: &'a [u8],
    /// Owner, mode (masked by the builder), time, xattrs.
    pub attrs: Attrs,
    /// Type and type-specific data.
    pub kind: EntryKind<'a>,
}

/// Type of an [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind<'a> {
    /// A directory.
    Directory,
    /// A regular file of this many bytes.
    Regular {
        /// Size in bytes.
        size: u64,
    },
    /// A symbolic link and its target.
    Symlink(&'a [u8]),
    /// A further name for the inode at this path (not cleaned).
    HardLink(&'a [u8]),
    /// A character device.
    CharDevice(Rdev),
    /// A block device.
    BlockDevice(Rdev),
    /// A named pipe.
    Fifo,
}

/// What an entry did to the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It made, or updated, this inode.
    Inode(InodeId),
    /// It is one more name of this inode.
    Link(InodeId),
    /// It deletes a name of the layers below, or marks a directory opaque.
    Whiteout,
    /// It is the root entry or metadata of aufs.
    Ignored,
}

/// Applies entries in stream order. See the module's documentation for the rules.
#[derive(Debug)]
pub struct Builder {
    inodes: Vec<Inode>,
    limits: Limits,
    names: u32,
    irregular: Option<NotLazyReason>,
    /// Cleaned path of the entry at hand; kept for its allocation.
    cleaned: Vec<u8>,
    /// The directory that the last entry was put in, with its path.
    last_parent: (Vec<u8>, InodeId),
}

impl Builder {
    /// A builder that holds the root directory.
    pub fn new(limits: Limits) -> Self {
        Self {
            inodes: LayerTree::empty().inodes,
            limits,
            names: 0,
            irregular: None,
            cleaned: Vec::new(),
            last_parent: (Vec::new(), InodeId::ROOT),
        }
    }

    /// Applies one entry; what an index could not have represented is applied as an unpack would,
    /// and remembered ([`Builder::irregular`]). An entry that comes back as an error left the tree
    /// without it (but perhaps with its parents).
    pub fn apply(&mut self, entry: Entry<'_>) -> Result<Applied, BuildError> {
        let mut cleaned = core::mem::take(&mut self.cleaned);
        clean_into(entry.path, &mut cleaned);
        let applied = self.apply_cleaned(&cleaned, entry);
        self.cleaned = cleaned;
        if let Err(BuildError::NotLazy(reason)) = &applied {
            self.irregular.get_or_insert_with(|| reason.clone());
        }
        applied
    }

    /// Applies one entry and fails on anything an index cannot represent.
    pub fn apply_strict(&mut self, entry: Entry<'_>) -> Result<Applied, BuildError> {
        let applied = self.apply(entry)?;
        match &self.irregular {
            None => Ok(applied),
            Some(reason) => Err(reason.clone().into()),
        }
    }

    /// The first thing seen that an index cannot represent.
    pub fn irregular(&self) -> Option<&NotLazyReason> {
        self.irregular.as_ref()
    }

    /// Remembers something that an index cannot represent and that the builder does not see itself.
    pub fn note_irregular(&mut self, reason: NotLazyReason) {
        self.irregular.get_or_insert(reason);
    }

    /// Says where the bytes of a regular file are. `id` is what [`Builder::apply`] returned; does
    /// nothing where that is not (or no longer) a regular file.
    pub fn set_extents(&mut self, id: InodeId, extents: Vec<Extent>) {
        if let Some(Inode {
            kind: Kind::Regular(regular),
            ..
        }) = self.inodes.get_mut(id.index())
        {
            regular.extents = extents;
        }
    }

    /// Counts names, drops what was replaced, and gives the tree. Inodes keep stream order.
    pub fn finish(mut self) -> LayerTree {
        let names = self.count_names();
        if names.iter().all(|count| *count > 0) {
            for (inode, count) in self.inodes.iter_mut().zip(names) {
                inode.nlink = count;
            }
            return LayerTree {
                inodes: self.inodes,
            };
        }
        let mut renumbered = vec![InodeId::ROOT; self.inodes.len()];
        let mut kept = Vec::with_capacity(self.inodes.len());
        for (old, (mut inode, count)) in self.inodes.drain(..).zip(names).enumerate() {
            if count > 0 {
                inode.nlink = count;
                renumbered[old] = id_of(kept.len());
                kept.push(inode);
            }
        }
        for inode in &mut kept {
            if let Kind::Directory(directory) = &mut inode.kind {
                for child in directory.entries.values_mut() {
                    *child = renumbered[child.index()];
                }
            }
        }
        LayerTree { inodes: kept }
    }

    /// `nlink` of every inode that can be reached from the root, 0 for the others.
    fn count_names(&self) -> Vec<u32> {
        let mut names = vec![0_u32; self.inodes.len()];
        names[0] = 2;
        let mut queue = vec![InodeId::ROOT];
        while let Some(id) = queue.pop() {
            let Kind::Directory(directory) = &self.inodes[id.index()].kind else {
                continue;
            };
            for child in directory.entries.values() {
                // Every name was counted against `max_entries`, a u32, so this cannot overflow.
                if matches!(self.inodes[child.index()].kind, Kind::Directory(_)) {
                    names[id.index()] += 1;
                    names[child.index()] = 2;
                    queue.push(*child);
                } else {
                    names[child.index()] += 1;
                }
            }
        }
        names
    }

    fn apply_cleaned(&mut self, path: &[u8], entry: Entry<'_>) -> Result<Applied, BuildError> {
        self.check_path(path)?;
        self.check_text(path, path, "its name");
        if path.is_empty() {
            return match entry.kind {
                EntryKind::Directory => Ok(Applied::Ignored),
                _ => Err(name_error(path, "the root is not a directory")),
            };
        }
        if path.starts_with(WHITEOUT_META_PREFIX) && path != OPAQUE_MARKER {
            return Ok(Applied::Ignored);
        }
        let (parent_path, name) = split_last(path);
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.apply_whiteout(path, parent_path, name, hidden);
        }
        let mut attrs = entry.attrs;
        attrs.mode &= 0o7777;
        attrs.mtime = bounded(attrs.mtime);
        self.check_xattrs(path, &attrs.xattrs)?;

        let kind = match entry.kind {
            EntryKind::HardLink(target) => {
                return self.apply_hard_link(path, parent_path, name, target, attrs);
            }
            EntryKind::Directory => Kind::Directory(Directory::default()),
            EntryKind::Regular { size } => Kind::Regular(Regular {
                size,
                extents: Vec::new(),
            }),
            EntryKind::Symlink(target) => {
                self.check_text(path, target, "its link target");
                if target.is_empty() || target.len() > MAX_TARGET_BYTES || target.contains(&0) {
                    let why = "its link target is empty, longer than 4095 bytes or holds a NUL";
                    return Err(name_error(path, why));
                }
                attrs.mode = 0o777;
                Kind::Symlink(target.to_vec())
            }
            EntryKind::CharDevice(rdev) => Kind::CharDevice(checked_rdev(path, rdev)?),
            EntryKind::BlockDevice(rdev) => Kind::BlockDevice(checked_rdev(path, rdev)?),
            EntryKind::Fifo => Kind::Fifo,
        };
        let parent = self.parent(path, parent_path)?;
        let inode = Inode {
            attrs,
            kind,
            nlink: 1,
        };
        self.place(path, parent, name, inode).map(Applied::Inode)
    }

    fn apply_whiteout(
        &mut self,
        path: &[u8],
        parent_path: &[u8],
        name: &[u8],
        hidden: &[u8],
    ) -> Result<Applied, BuildError> {
        if name == OPAQUE_MARKER {
            let parent = self.parent(path, parent_path)?;
            if let Kind::Directory(directory) = &mut self.inodes[parent.index()].kind {
                directory.opaque = true;
            }
            return Ok(Applied::Whiteout);
        }
        if name.starts_with(WHITEOUT_META_PREFIX) {
            return Ok(Applied::Ignored);
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(name_error(path, "a whiteout of nothing"));
        }
        let parent = self.parent(path, parent_path)?;
        if self.child(parent, hidden).is_none() {
            let inode = Inode {
                attrs: Attrs::default(),
                kind: Kind::Whiteout,
                nlink: 1,
            };
            self.place(path, parent, hidden, inode)?;
        }
        Ok(Applied::Whiteout)
    }

    fn apply_hard_link(
        &mut self,
        path: &[u8],
        parent_path: &[u8],
        name: &[u8],
        target: &[u8],
        attrs: Attrs,
    ) -> Result<Applied, BuildError> {
        self.check_text(path, target, "its link target");
        let target = TreePath::clean(target);
        let found = lookup(&self.inodes, target.as_bytes()).filter(|id| {
            !matches!(
                self.inodes[id.index()].kind,
                Kind::Directory(_) | Kind::Whiteout
            )
        });
        let Some(id) = found.filter(|_| target.as_bytes() != path) else {
            return Err(NotLazyReason::HardLinkTarget {
                path: TreePath::new(path),
                target,
            }
            .into());
        };
        let parent = self.parent(path, parent_path)?;
        count_name(path, &mut self.names, &self.limits)?;
        match self.child(parent, name) {
            Some(old) if self.inodes[old.index()].kind == Kind::Whiteout => {}
            None => {}
            Some(_) => {
                self.note_duplicate(path);
                self.last_parent = (Vec::new(), InodeId::ROOT);
            }
        }
        if let Kind::Directory(directory) = &mut self.inodes[parent.index()].kind {
            directory.entries.insert(name.to_vec(), id);
        }
        // The unpack changes the owner first, which takes file capabilities away, then sets xattrs.
        let xattrs = &mut self.inodes[id.index()].attrs.xattrs;
        xattrs.remove(&b"security.capability"[..]);
        self.update_attrs(path, id, attrs)?;
        Ok(Applied::Link(id))
    }

    /// Puts `inode` at `name`. A whiteout there gives way, two directories become one, anything
    /// else is replaced.
    fn place(
        &mut self,
        path: &[u8],
        parent: InodeId,
        name: &[u8],
        inode: Inode,
    ) -> Result<InodeId, BuildError> {
        let next = id_of(self.inodes.len());
        let Kind::Directory(directory) = &mut self.inodes[parent.index()].kind else {
            // `parent` only returns directories.
            return Err(not_a_directory(path));
        };
        let old = match directory.entries.entry(name.to_vec()) {
            btree_map::Entry::Vacant(vacant) => {
                count_name(path, &mut self.names, &self.limits)?;
                vacant.insert(next);
                self.inodes.push(inode);
                return Ok(next);
            }
            btree_map::Entry::Occupied(occupied) => *occupied.get(),
        };
        match (&mut self.inodes[old.index()].kind, &inode.kind) {
            (Kind::Whiteout, _) => {
                // A whiteout has exactly one name, so its place in the stream can be taken over.
                self.inodes[old.index()] = inode;
                Ok(old)
            }
            (Kind::Directory(existing), Kind::Directory(_)) => {
                if core::mem::take(&mut existing.implied) {
                    self.inodes[old.index()].attrs = inode.attrs;
                } else {
                    self.update_attrs(path, old, inode.attrs)?;
                }
                Ok(old)
            }
            _ => {
                self.note_duplicate(path);
                count_name(path, &mut self.names, &self.limits)?;
                if let Kind::Directory(directory) = &mut self.inodes[parent.index()].kind {
                    directory.entries.insert(name.to_vec(), next);
                }
                self.inodes.push(inode);
                self.last_parent = (Vec::new(), InodeId::ROOT);
                Ok(next)
            }
        }
    }

    /// The directory at a cleaned path, made (implied) where it is missing.
    fn parent(&mut self, path: &[u8], parent_path: &[u8]) -> Result<InodeId, BuildError> {
        if self.last_parent.0 == parent_path {
            return Ok(self.last_parent.1);
        }
        let mut at = InodeId::ROOT;
        for name in parent_path.split(|byte| *byte == b'/') {
            if name.is_empty() {
                continue;
            }
            if name.starts_with(WHITEOUT_PREFIX) {
                return Err(name_error(path, "a parent is a whiteout"));
            }
            let found = self.child(at, name);
            at = match found.map(|id| (id, &self.inodes[id.index()].kind)) {
                Some((id, Kind::Directory(_))) => id,
                None | Some((_, Kind::Whiteout)) => {
                    let implied = Inode {
                        attrs: Attrs::implied_directory(),
                        kind: Kind::Directory(Directory {
                            implied: true,
                            ..Directory::default()
                        }),
                        nlink: 2,
                    };
                    self.place(path, at, name, implied)?
                }
                Some(_) => return Err(not_a_directory(path)),
            };
        }
        self.last_parent.0.clear();
        self.last_parent.0.extend_from_slice(parent_path);
        self.last_parent.1 = at;
        Ok(at)
    }

    fn child(&self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        match &self.inodes[parent.index()].kind {
            Kind::Directory(directory) => directory.entries.get(name).copied(),
            _ => None,
        }
    }

    /// A later header speaks for an existing inode: its attributes win, other xattrs stay.
    fn update_attrs(
        &mut self,
        path: &[u8],
        id: InodeId,
        mut attrs: Attrs,
    ) -> Result<(), BuildError> {
        let inode = &mut self.inodes[id.index()];
        let mut xattrs = core::mem::take(&mut inode.attrs.xattrs);
        if matches!(inode.kind, Kind::Symlink(_)) {
            attrs.mode = 0o777;
        }
        if !xattrs.is_empty() {
            xattrs.append(&mut attrs.xattrs);
            attrs.xattrs = xattrs;
        }
        inode.attrs = attrs;
        xattr_bytes(path, &self.inodes[id.index()].attrs.xattrs, &self.limits)
    }

    fn note_duplicate(&mut self, path: &[u8]) {
        self.note_irregular(NotLazyReason::Duplicate {
            path: TreePath::new(path),
        });
    }

    fn check_path(&self, path: &[u8]) -> Result<(), BuildError> {
        let bound = |what, actual: usize, limit: u32| {
            if u64::try_from(actual).is_ok_and(|actual| actual <= u64::from(limit)) {
                return Ok(());
            }
            Err(BuildError::Limit {
                path: TreePath::new(path),
                what,
                actual: actual as u64,
                limit: u64::from(limit),
            })
        };
        bound("path length", path.len(), self.limits.max_path_bytes)?;
        let mut depth = 0;
        for name in path.split(|byte| *byte == b'/') {
            depth += 1;
            if name.len() > MAX_NAME_BYTES || name.contains(&0) {
                return Err(name_error(
                    path,
                    "a name is longer than 255 bytes or holds a NUL",
                ));
            }
        }
        bound("depth", depth, self.limits.max_depth)
    }

    fn check_text(&mut self, path: &[u8], text: &[u8], field: &'static str) {
        if !is_exact_text(text) {
            self.note_irregular(NotLazyReason::NotText {
                path: TreePath::new(path),
                field,
            });
        }
    }

    fn check_xattrs(&mut self, path: &[u8], xattrs: &Xattrs) -> Result<(), BuildError> {
        if xattrs.is_empty() {
            return Ok(());
        }
        for key in xattrs.keys() {
            self.check_text(path, key, "an xattr name");
            if key.is_empty() || key.len() > MAX_NAME_BYTES || key.contains(&0) {
                let why = "an xattr name is empty, longer than 255 bytes or holds a NUL";
                return Err(name_error(path, why));
            }
            if key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.") {
                self.note_irregular(NotLazyReason::OverlayXattr {
                    path: TreePath::new(path),
                    key: key.escape_ascii().to_string(),
                });
            }
        }
        xattr_bytes(path, xattrs, &self.limits)
    }
}

fn lookup(inodes: &[Inode], cleaned: &[u8]) -> Option<InodeId> {
    cleaned
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
        .try_fold(InodeId::ROOT, |at, name| match &inodes[at.index()].kind {
            Kind::Directory(directory) => directory.entries.get(name).copied(),
            _ => None,
        })
}

fn id_of(index: usize) -> InodeId {
    // Inodes are bounded by `max_entries`, a u32, plus the root; `count_name` refuses more names.
    InodeId(u32::try_from(index).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests;
