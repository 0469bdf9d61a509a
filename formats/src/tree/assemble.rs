//! A tree from inodes made elsewhere, checked.

use super::{Inode, InodeId, Kind, LayerTree};

/// Why a list of inodes is not a tree.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShapeError {
    /// Inode 0 is missing or no directory.
    #[error("inode 0 is not a directory")]
    Root,
    /// A directory entry points at an inode that does not exist.
    #[error("directory {directory:?} has an entry for missing inode {target:?}")]
    Missing {
        /// The directory.
        directory: InodeId,
        /// What the entry points at.
        target: InodeId,
    },
    /// A name that is empty, `.`, `..`, too long, or holds a slash or a NUL.
    #[error("directory {0:?} has an entry with an unusable name")]
    Name(InodeId),
    /// A directory has two names, or is its own ancestor.
    #[error("directory {0:?} has more than one name")]
    LinkedDirectory(InodeId),
    /// An inode has no name.
    #[error("inode {0:?} cannot be reached from the root")]
    Unreachable(InodeId),
}

impl LayerTree {
    /// Makes a tree of `inodes`; the position of an inode is its [`InodeId`] and 0 is the root.
    /// Every inode must be reachable, directories by exactly one name. `nlink` is taken as given.
    pub fn from_inodes(inodes: Vec<Inode>) -> Result<Self, ShapeError> {
        let kind = |id: InodeId| inodes.get(id.index()).map(|inode| &inode.kind);
        if !matches!(kind(InodeId::ROOT), Some(Kind::Directory(_))) {
            return Err(ShapeError::Root);
        }
        let mut seen = vec![false; inodes.len()];
        seen[0] = true;
        let mut queue = vec![InodeId::ROOT];
        while let Some(id) = queue.pop() {
            let Some(Kind::Directory(directory)) = kind(id) else {
                continue;
            };
            for (name, child) in &directory.entries {
                if !is_name(name) {
                    return Err(ShapeError::Name(id));
                }
                let is_directory = match kind(*child) {
                    None => {
                        return Err(ShapeError::Missing {
                            directory: id,
                            target: *child,
                        });
                    }
                    Some(kind) => matches!(kind, Kind::Directory(_)),
                };
                if !core::mem::replace(&mut seen[child.index()], true) {
                    queue.push(*child);
                } else if is_directory {
                    return Err(ShapeError::LinkedDirectory(*child));
                }
            }
        }
        if let Some(lost) = seen.iter().position(|seen| !seen) {
            // The tree's ids are u32, and so were those that were looked up.
            return Err(ShapeError::Unreachable(InodeId(
                u32::try_from(lost).unwrap_or(u32::MAX),
            )));
        }
        Ok(Self { inodes })
    }

    /// The same tree with inodes numbered breadth first, by name, and without unreachable ones.
    /// Trees that look the same from outside are equal in this form.
    #[must_use]
    pub fn in_order(&self) -> Self {
        let mut number = vec![None; self.inodes.len()];
        let mut order = vec![InodeId::ROOT];
        number[0] = Some(InodeId::ROOT);
        let mut next = 0;
        while let Some(id) = order.get(next) {
            next += 1;
            let Some(directory) = self.directory(*id) else {
                continue;
            };
            for child in directory.entries.values() {
                if number[child.index()].is_none() {
                    // There are as many numbers as inodes, and those are counted in 32 bits.
                    let id = InodeId(u32::try_from(order.len()).unwrap_or(u32::MAX));
                    number[child.index()] = Some(id);
                    order.push(*child);
                }
            }
        }
        let inodes = order.iter().map(|id| {
            let mut inode = self.inode(*id).clone();
            if let Kind::Directory(directory) = &mut inode.kind {
                for child in directory.entries.values_mut() {
                    *child = number[child.index()].unwrap_or_default();
                }
            }
            inode
        });
        Self {
            inodes: inodes.collect(),
        }
    }
}

/// `true` for a name a directory can hold.
pub(crate) fn is_name(name: &[u8]) -> bool {
    (1..=255).contains(&name.len())
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Attrs, Directory};

    fn directory(entries: &[(&str, u32)]) -> Inode {
        Inode {
            attrs: Attrs::default(),
            kind: Kind::Directory(Directory {
                entries: entries
                    .iter()
                    .map(|(name, id)| (name.as_bytes().to_vec(), InodeId(*id)))
                    .collect(),
                ..Directory::default()
            }),
            nlink: 2,
        }
    }

    fn fifo() -> Inode {
        Inode {
            attrs: Attrs::default(),
            kind: Kind::Fifo,
            nlink: 1,
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let check = LayerTree::from_inodes;
        assert_eq!(check(vec![]), Err(ShapeError::Root));
        assert_eq!(check(vec![fifo()]), Err(ShapeError::Root));
        assert_eq!(
            check(vec![directory(&[("a", 7)])]),
            Err(ShapeError::Missing {
                directory: InodeId(0),
                target: InodeId(7)
            })
        );
        for name in ["", ".", "..", "a/b", "a\0", &"x".repeat(256)] {
            let inodes = vec![directory(&[(name, 1)]), fifo()];
            assert_eq!(check(inodes), Err(ShapeError::Name(InodeId(0))), "{name:?}");
        }
        assert_eq!(
            check(vec![directory(&[("a", 0)])]),
            Err(ShapeError::LinkedDirectory(InodeId(0)))
        );
        assert_eq!(
            check(vec![directory(&[("a", 1), ("b", 1)]), directory(&[])]),
            Err(ShapeError::LinkedDirectory(InodeId(1)))
        );
        assert_eq!(
            check(vec![directory(&[]), directory(&[("x", 1)])]),
            Err(ShapeError::Unreachable(InodeId(1)))
        );
        assert!(check(vec![directory(&[("a", 1), ("b", 1)]), fifo()]).is_ok());
    }
}
