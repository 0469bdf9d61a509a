//! Comparing the served tree with the one that the tar makes.

use core::fmt::Display;
use std::collections::BTreeSet;

use crate::tree::{Attrs, Directory, InodeId, Kind, LayerTree, Rdev, TreePath, Xattrs};

/// How many differences a verdict lists.
pub const MAX_MISMATCHES: usize = 64;

/// One difference between what is served and what the tar says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Where.
    pub path: TreePath,
    /// In what.
    pub attribute: Attribute,
    /// What is served.
    pub served: String,
    /// What the tar says.
    pub tar: String,
}

/// What can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Attribute {
    /// The tar as a whole is not the claimed one.
    DiffId,
    /// The name exists on one side only.
    Presence,
    /// The type.
    Type,
    /// The permission bits.
    Mode,
    /// The owner.
    Uid,
    /// The group.
    Gid,
    /// The modification time.
    Mtime,
    /// An extended attribute.
    Xattrs,
    /// The size of a regular file.
    Size,
    /// The bytes of a regular file.
    Content,
    /// The target of a symbolic link.
    LinkTarget,
    /// The number of a device.
    Device,
    /// Which names are the same inode.
    HardLinks,
    /// Whether a directory hides what lies below it.
    Opaque,
    /// Whether the layer has an entry for a directory.
    Implied,
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self {
            path,
            attribute,
            served,
            tar,
        } = self;
        write!(f, "{path}: {attribute:?} is {served}, the tar says {tar}")
    }
}

/// The first differences found.
#[derive(Debug, Default)]
pub(super) struct Mismatches(Vec<Mismatch>);

impl Mismatches {
    pub(super) fn push(
        &mut self,
        path: &TreePath,
        attribute: Attribute,
        served: impl Display,
        tar: impl Display,
    ) {
        if !self.is_full() {
            self.0.push(Mismatch {
                path: path.clone(),
                attribute,
                served: served.to_string(),
                tar: tar.to_string(),
            });
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn into_vec(self) -> Vec<Mismatch> {
        self.0
    }

    fn is_full(&self) -> bool {
        self.0.len() >= MAX_MISMATCHES
    }
}

/// Adds every difference between the trees to `out`, until that is full.
pub(super) fn compare(served: &LayerTree, tar: &LayerTree, out: &mut Mismatches) {
    let mut comparison = Comparison {
        served,
        tar,
        served_to_tar: vec![None; served.inodes().len()],
        tar_to_served: vec![None; tar.inodes().len()],
        out,
    };
    comparison.directories();
}

struct Comparison<'a> {
    served: &'a LayerTree,
    tar: &'a LayerTree,
    /// Which inode of the other tree had the same name, for the first name of each.
    served_to_tar: Vec<Option<InodeId>>,
    tar_to_served: Vec<Option<InodeId>>,
    out: &'a mut Mismatches,
}

impl Comparison<'_> {
    fn directories(&mut self) {
        let mut queue = vec![(Vec::new(), InodeId::ROOT, InodeId::ROOT)];
        while let Some((path, served, tar)) = queue.pop() {
            let (Some(served), Some(tar)) =
                (self.served.directory(served), self.tar.directory(tar))
            else {
                continue;
            };
            self.opacity(&path, served, tar);
            let names: BTreeSet<&Vec<u8>> =
                served.entries.keys().chain(tar.entries.keys()).collect();
            for name in names {
                if self.out.is_full() {
                    return;
                }
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                let below = [&path, slash, name].concat();
                match (served.entries.get(name), tar.entries.get(name)) {
                    (Some(served), Some(tar)) => {
                        if self.pair(&below, *served, *tar) {
                            queue.push((below, *served, *tar));
                        }
                    }
                    (served, _) => {
                        let side = |here| if here { "present" } else { "absent" };
                        self.out.push(
                            &TreePath::new(below),
                            Attribute::Presence,
                            side(served.is_some()),
                            side(served.is_none()),
                        );
                    }
                }
            }
        }
    }

    /// Compares what one name stands for; whether to look below it.
    fn pair(&mut self, path: &[u8], served: InodeId, tar: InodeId) -> bool {
        let known = (
            self.served_to_tar[served.index()],
            self.tar_to_served[tar.index()],
        );
        match known {
            (None, None) => {
                self.served_to_tar[served.index()] = Some(tar);
                self.tar_to_served[tar.index()] = Some(served);
            }
            (Some(same), Some(_)) if same == tar => return false,
            (other_served, other_tar) => {
                let name = |linked: Option<InodeId>| match linked {
                    Some(_) => "a further name of an inode seen before",
                    None => "an inode of its own",
                };
                self.out.push(
                    &TreePath::new(path),
                    Attribute::HardLinks,
                    name(other_served),
                    name(other_tar),
                );
                return false;
            }
        }
        let (served, tar) = (self.served.inode(served), self.tar.inode(tar));
        let shown = TreePath::new(path);
        let mut differ = |attribute, served: &dyn Display, tar: &dyn Display| {
            self.out.push(&shown, attribute, served, tar);
        };
        let compare_attrs = match (&served.kind, &tar.kind) {
            (Kind::Directory(served), Kind::Directory(tar)) => {
                if served.implied != tar.implied {
                    differ(Attribute::Implied, &served.implied, &tar.implied);
                }
                // Those of an implied directory come from the layers below.
                !served.implied && !tar.implied
            }
            (Kind::Regular(served), Kind::Regular(tar)) => {
                if served.size != tar.size {
                    differ(Attribute::Size, &served.size, &tar.size);
                }
                true
            }
            (Kind::Symlink(served), Kind::Symlink(tar)) => {
                if served != tar {
                    let (served, tar) = (served.escape_ascii(), tar.escape_ascii());
                    differ(Attribute::LinkTarget, &served, &tar);
                }
                true
            }
            (Kind::CharDevice(served), Kind::CharDevice(tar))
            | (Kind::BlockDevice(served), Kind::BlockDevice(tar)) => {
                if served != tar {
                    let show = |rdev: &Rdev| format!("{}:{}", rdev.major, rdev.minor);
                    differ(Attribute::Device, &show(served), &show(tar));
                }
                true
            }
            (Kind::Fifo, Kind::Fifo) => true,
            // A whiteout has no attributes.
            (Kind::Whiteout, Kind::Whiteout) => false,
            (served, tar) => {
                differ(Attribute::Type, &type_name(served), &type_name(tar));
                false
            }
        };
        if compare_attrs {
            self.attrs(path, &served.attrs, &tar.attrs);
        }
        matches!(
            (&served.kind, &tar.kind),
            (Kind::Directory(_), Kind::Directory(_))
        )
    }

    fn attrs(&mut self, path: &[u8], served: &Attrs, tar: &Attrs) {
        // Named one by one so that a new attribute does not slip through.
        let Attrs {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = served;
        let shown = TreePath::new(path);
        let out = &mut *self.out;
        if *mode != tar.mode {
            let (served, tar) = (format!("{mode:04o}"), format!("{:04o}", tar.mode));
            out.push(&shown, Attribute::Mode, served, tar);
        }
        if *uid != tar.uid {
            out.push(&shown, Attribute::Uid, uid, tar.uid);
        }
        if *gid != tar.gid {
            out.push(&shown, Attribute::Gid, gid, tar.gid);
        }
        if *mtime != tar.mtime {
            let show = |seconds, nanos| format!("{seconds}.{nanos:09}");
            out.push(
                &shown,
                Attribute::Mtime,
                show(mtime.seconds, mtime.nanos),
                show(tar.mtime.seconds, tar.mtime.nanos),
            );
        }
        if *xattrs != tar.xattrs {
            let (served, tar) = first_xattr_difference(xattrs, &tar.xattrs);
            out.push(&shown, Attribute::Xattrs, served, tar);
        }
    }

    fn opacity(&mut self, path: &[u8], served: &Directory, tar: &Directory) {
        if served.opaque != tar.opaque {
            let path = TreePath::new(path);
            self.out
                .push(&path, Attribute::Opaque, served.opaque, tar.opaque);
        }
    }
}

fn first_xattr_difference(served: &Xattrs, tar: &Xattrs) -> (String, String) {
    let differs = |key: &&Vec<u8>| served.get(*key) != tar.get(*key);
    let key = served.keys().chain(tar.keys()).find(differs);
    let show = |side: &Xattrs| match key.map(|key| (key, side.get(key))) {
        None => String::new(),
        Some((key, None)) => format!("without {}", key.escape_ascii()),
        Some((key, Some(value))) => {
            let shown = &value[..value.len().min(64)];
            let (key, shown) = (key.escape_ascii(), shown.escape_ascii());
            format!("{key}={shown} ({} bytes)", value.len())
        }
    };
    (show(served), show(tar))
}

fn type_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Directory(_) => "a directory",
        Kind::Regular(_) => "a regular file",
        Kind::Symlink(_) => "a symbolic link",
        Kind::CharDevice(_) => "a character device",
        Kind::BlockDevice(_) => "a block device",
        Kind::Fifo => "a named pipe",
        Kind::Whiteout => "a whiteout",
    }
}
