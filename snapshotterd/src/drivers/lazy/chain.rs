//! The layers below a snapshot, lazy and ordinary ones mixed.

use std::path::PathBuf;

use crate::{
    drivers::{DriverError, overlayfs::Overlayfs},
    layers::{
        Layers,
        implied::{Lookup, Unpacked},
        record::{LayerNumber, LazySnapshot, MountNumber},
    },
    store::SnapshotId,
};

/// One committed snapshot of a chain.
#[derive(Clone, Debug)]
pub(super) enum Link {
    /// A lazy layer.
    Lazy(LazySnapshot),
    /// A directory of the overlayfs driver.
    Unpacked(SnapshotId),
}

/// A chain, nearest layer first.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    pub(super) links: Vec<Link>,
}

impl Chain {
    pub(super) fn new(ids: impl Iterator<Item = SnapshotId>, layers: &Layers) -> Self {
        let links = ids
            .map(|id| layers.snapshot(id).map_or(Link::Unpacked(id), Link::Lazy))
            .collect();
        Self { links }
    }

    /// The layer mounts the chain needs.
    pub(super) fn mounts(&self) -> Vec<MountNumber> {
        self.links
            .iter()
            .filter_map(|link| match link {
                Link::Lazy(lazy) => lazy.mount,
                Link::Unpacked(_) => None,
            })
            .collect()
    }

    /// How often the chain shows that variant of a layer already.
    pub(super) fn occurrences(&self, layer: LayerNumber, variant: &str) -> u32 {
        let count = self
            .links
            .iter()
            .filter(|link| {
                matches!(link, Link::Lazy(lazy) if lazy.layer == layer && lazy.variant == variant)
            })
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The lower directories, nearest first. Layers that change nothing have none; a chain of
    /// only such layers has one that is empty. Blocks shortly.
    pub(super) fn lowers(
        &self,
        layers: &Layers,
        overlayfs: &Overlayfs,
    ) -> Result<Vec<PathBuf>, DriverError> {
        let mut lowers = Vec::with_capacity(self.links.len());
        for link in &self.links {
            match link {
                Link::Lazy(lazy) => {
                    lowers.extend(lazy.mount.map(|number| layers.mounts().target(number)));
                }
                Link::Unpacked(id) => lowers.push(overlayfs.lower(*id)?),
            }
        }
        if lowers.is_empty() && !self.links.is_empty() {
            lowers.push(layers.empty_lower()?);
        }
        Ok(lowers)
    }

    /// What can be asked for the attributes of directories that a layer on top implies.
    pub(super) fn lookups(
        &self,
        layers: &Layers,
        overlayfs: &Overlayfs,
    ) -> Vec<Box<dyn Lookup + Send>> {
        self.links
            .iter()
            .map(|link| match link {
                Link::Lazy(lazy) => layers.lookup(lazy),
                Link::Unpacked(id) => {
                    Box::new(Unpacked::new(overlayfs.layer(*id))) as Box<dyn Lookup + Send>
                }
            })
            .collect()
    }
}
