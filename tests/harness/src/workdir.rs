//! Private directories that leave nothing mounted behind.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::mount::{UnmountFlags, unmount};

/// A temporary directory; on drop everything mounted below it is detached and it is deleted.
#[derive(Debug)]
pub struct Workdir {
    dir: Option<tempfile::TempDir>,
}

impl Workdir {
    /// A fresh one with a short path (unix sockets allow 107 bytes), on disk: /tmp is often a tmpfs,
    /// from which EROFS cannot be mounted.
    ///
    /// # Panics
    /// When the directory cannot be made.
    pub fn new() -> Self {
        Self::below(Path::new("/var/tmp"))
    }

    /// A fresh one in another directory, which must be short as well.
    ///
    /// # Panics
    /// When the directory cannot be made.
    pub fn below(parent: &Path) -> Self {
        let made = tempfile::Builder::new().prefix("sd-").tempdir_in(parent);
        let dir =
            made.unwrap_or_else(|error| panic!("a directory below {}: {error}", parent.display()));
        Self { dir: Some(dir) }
    }

    /// Its path.
    ///
    /// # Panics
    /// Never: the directory is only taken on drop.
    pub fn path(&self) -> &Path {
        self.dir.as_ref().expect("present until drop").path()
    }

    /// A directory below it, made if missing.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn sub(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).expect("a directory below the workdir");
        path
    }
}

impl Default for Workdir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        for mount in mounts_below(dir.path()).iter().rev() {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
        if env_keep() {
            eprintln!("kept: {}", dir.keep().display());
        }
    }
}

fn env_keep() -> bool {
    std::env::var_os("SNAPSHOTTERD_TEST_KEEP").is_some()
}

/// Mount points at or below `dir`, in mount order.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(path.replace("\\040", " ")))
        .filter(|path| path.starts_with(dir))
        .collect()
}
