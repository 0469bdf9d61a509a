//! containerd's snapshotter suite (`core/snapshots/testsuite`), in Rust, over the real socket: the
//! same cases under the same names, for any driver. [`metadata`] and [`files`] hold those,
//! [`extra`] the cases containerd lacks.

pub mod extra;
pub mod files;
pub mod metadata;

use std::{cell::Cell, fs, path::PathBuf};

use snapshotterd::api::types::Mount;

use crate::{
    mounting::{mount_all, unmount_all},
    snapshotter::Snapshotter,
    tree::{self, Change},
};

/// A snapshotter under test and a directory to play in.
#[derive(Debug)]
pub struct Bench {
    /// The snapshotter.
    pub sn: Snapshotter,
    /// A directory of the test's own; mount points are made below it.
    pub work: PathBuf,
    /// Whether a directory of a lower layer can be renamed (overlayfs without `redirect_dir`
    /// cannot).
    pub renames_directories: bool,
    names: Cell<u32>,
}

impl Bench {
    /// A bench over a fresh key space.
    pub fn new(sn: Snapshotter, work: PathBuf, renames_directories: bool) -> Self {
        Self {
            sn,
            work,
            renames_directories,
            names: Cell::new(0),
        }
    }

    /// A path below the work directory, as a key.
    pub fn key(&self, name: &str) -> String {
        self.work.join(name).display().to_string()
    }

    fn fresh(&self, what: &str) -> String {
        self.names.set(self.names.get() + 1);
        format!("{what}-{}", self.names.get())
    }

    /// Mounts, runs `body` on the mount point, and unmounts even if it panics.
    ///
    /// # Panics
    /// When mounting or unmounting fails.
    pub fn mounted<T>(&self, mounts: &[Mount], body: impl FnOnce(&std::path::Path) -> T) -> T {
        struct Unmount(PathBuf);
        impl Drop for Unmount {
            fn drop(&mut self) {
                let unmounted = unmount_all(&self.0);
                if !std::thread::panicking() {
                    unmounted.expect("unmounting");
                }
            }
        }
        assert!(!mounts.is_empty(), "an answer without mounts");
        let target = self.work.join(self.fresh("mount"));
        fs::create_dir(&target).expect("a mount point");
        mount_all(mounts, &target).expect("mounting");
        let _unmount = Unmount(target.clone());
        body(&target)
    }

    /// Prepares, changes and commits a layer, and returns its name.
    ///
    /// # Panics
    /// When anything fails.
    pub fn layer(&self, parent: &str, changes: &[Change]) -> String {
        let name = self.fresh("layer");
        let key = format!("{name}-prepare");
        let mounts = self.sn.prepare(&key, parent).expect("prepare");
        self.mounted(&mounts, |root| tree::apply(root, changes).expect("changes"));
        self.sn.commit(&name, &key).expect("commit");
        name
    }

    /// Makes one layer after the other, and compares a view of each with the same changes made to
    /// an ordinary directory.
    ///
    /// # Panics
    /// When anything fails or differs.
    pub fn check_layers(&self, layers: &[&[Change]]) {
        let flat = self.work.join(self.fresh("flat"));
        fs::create_dir(&flat).expect("a directory");
        let mut parent = String::new();
        for changes in layers {
            parent = self.layer(&parent, changes);
            tree::apply(&flat, changes).expect("changes to the flat directory");
            let view = format!("{parent}-view");
            let mounts = self.sn.view(&view, &parent).expect("view");
            self.mounted(&mounts, |root| tree::assert_same(&flat, root));
            self.sn.remove(&view).expect("remove the view");
        }
    }
}
