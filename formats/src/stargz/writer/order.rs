//! Which entries are emitted, and in which order.

use std::collections::HashMap;

use super::{WriteError, source::Item};
use crate::{
    limits::Limits,
    tar::EntryType,
    tree::{Applied, BuildError, Builder, Entry, Extent, LayerTree, NotLazyReason, TreePath},
    units::DecodedOffset,
};

/// Positions of items.
pub(super) struct Order {
    /// What comes before the landmark.
    pub(super) first: Vec<usize>,
    /// What comes behind it.
    pub(super) rest: Vec<usize>,
    /// Prioritised paths that no item has.
    pub(super) missing: Vec<Vec<u8>>,
}

/// Hard links that name each other are followed this far.
const MAX_LINKS: usize = 40;

impl Order {
    pub(super) fn of(items: &[Item], prioritized: &[Vec<u8>]) -> Self {
        // Of several entries of one name the last one counts, at its place.
        let last: HashMap<&[u8], usize> = items
            .iter()
            .enumerate()
            .map(|(index, item)| (item.path.as_bytes(), index))
            .collect();
        let mut picker = Picker {
            items,
            last,
            picked: vec![false; items.len()],
            first: Vec::new(),
        };
        let mut missing = Vec::new();
        for path in prioritized {
            let cleaned = TreePath::clean(path);
            if picker.last.contains_key(cleaned.as_bytes()) {
                picker.pick(cleaned.as_bytes(), MAX_LINKS);
            } else {
                missing.push(path.clone());
            }
        }
        let Picker {
            last,
            picked,
            first,
            ..
        } = picker;
        let rest = items
            .iter()
            .enumerate()
            .filter(|(index, item)| !picked[*index] && last[item.path.as_bytes()] == *index)
            .map(|(index, _)| index)
            .collect();
        Self {
            first,
            rest,
            missing,
        }
    }

    /// Checks that the tree is the one that the items make in their own order. Returns why readers
    /// would not serve it lazily, if they would not.
    pub(super) fn verify(
        &self,
        items: &[Item],
        limits: &Limits,
    ) -> Result<Option<NotLazyReason>, WriteError> {
        let (before, _) = tree(items.iter(), limits)?;
        let emitted = self.first.iter().chain(&self.rest);
        let (after, not_lazy) = tree(emitted.map(|index| &items[*index]), limits)?;
        if before == after {
            Ok(not_lazy)
        } else {
            Err(WriteError::Order)
        }
    }
}

struct Picker<'a> {
    items: &'a [Item],
    last: HashMap<&'a [u8], usize>,
    picked: Vec<bool>,
    first: Vec<usize>,
}

impl Picker<'_> {
    /// Picks the item at `path`, after its parents and, for a hard link, its target.
    fn pick(&mut self, path: &[u8], links: usize) {
        self.pick_one(b"");
        for (slash, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            self.pick_one(&path[..slash]);
        }
        let target = self.last.get(path).and_then(|index| {
            let header = &self.items[*index].header;
            (header.kind == EntryType::HardLink).then(|| TreePath::clean(&header.link))
        });
        if let (Some(target), Some(links)) = (target, links.checked_sub(1)) {
            self.pick(target.as_bytes(), links);
        }
        self.pick_one(path);
    }

    fn pick_one(&mut self, path: &[u8]) {
        if let Some(index) = self.last.get(path)
            && !core::mem::replace(&mut self.picked[*index], true)
        {
            self.first.push(*index);
        }
    }
}

/// The tree that `items` make in this order, with file content as positions in the archive.
fn tree<'a>(
    items: impl Iterator<Item = &'a Item>,
    limits: &Limits,
) -> Result<(LayerTree, Option<NotLazyReason>), WriteError> {
    let mut builder = Builder::new(*limits);
    for item in items {
        let header = &item.header;
        // `Source` let no other types in.
        let Some(kind) = header.entry_kind() else {
            continue;
        };
        let entry = Entry {
            path: &header.path,
            attrs: header.attrs(),
            kind,
        };
        match builder.apply(entry) {
            Ok(Applied::Inode(id)) if header.size > 0 => {
                let extent = Extent {
                    file_offset: 0,
                    len: header.size,
                    decoded: DecodedOffset(header.payload_offset),
                };
                builder.set_extents(id, vec![extent]);
            }
            // The builder remembers the reason; the entry itself is kept as it is.
            Ok(_) | Err(BuildError::NotLazy(_)) => {}
            Err(limit @ BuildError::Limit { .. }) => return Err(WriteError::Limit(limit)),
        }
    }
    let not_lazy = builder.irregular().cloned();
    Ok((builder.finish().in_order(), not_lazy))
}
