//! Whether the file system of the caches takes bytes.
//!
//! One write that fails makes the whole file system count as full (or broken: what to do is the
//! same). While it does, nothing is fetched in order to be stored, readers are served from memory,
//! and once in a while something small is written to find out whether there is room again.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::watch};

/// How often to look whether there is room again.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How often an operator is told.
const WARN_EVERY: Duration = Duration::from_mins(1);
/// What must be free before anything is stored again: with less, filling the last blocks and
/// failing would take turns.
const ROOM: u64 = 16 << 20;
/// What a probe writes. Quotas and full allocation groups do not show in what is said to be free.
const PROBE_BYTES: usize = 64 << 10;
const PROBE_NAME: &str = "probe";

/// One file system that caches are on.
#[derive(Debug)]
pub(crate) struct Disk {
    runtime: Handle,
    full: watch::Sender<bool>,
    refused: AtomicU64,
    warned: Mutex<Warned>,
}

#[derive(Debug, Default)]
struct Warned {
    at: Option<Instant>,
    /// Times that the disk was found full without a warning since the last one.
    silent: u64,
}

impl Disk {
    pub(crate) fn new(runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            full: watch::Sender::new(false),
            refused: AtomicU64::new(0),
            warned: Mutex::default(),
        })
    }

    pub(crate) fn is_full(&self) -> bool {
        *self.full.borrow()
    }

    /// Writes that failed.
    pub(crate) fn refused_writes(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Told whenever the disk becomes full or has room again.
    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.full.subscribe()
    }

    /// A write in `dir` failed. Until there is room nothing more is written.
    pub(crate) fn refused(self: &Arc<Self>, dir: &Path, error: &io::Error) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        if self.full.send_replace(true) {
            return;
        }
        self.warn(dir, error);
        let (me, dir) = (Arc::clone(self), dir.to_owned());
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(PROBE_EVERY).await;
                let probed = dir.clone();
                // A panic in it would be a bug; trying to write is then as good as knowing.
                let room = tokio::task::spawn_blocking(move || has_room(&probed)).await;
                if room.unwrap_or(true) {
                    break;
                }
            }
            tracing::debug!(dir = %dir.display(), "caches are written again");
            me.full.send_replace(false);
        });
    }

    fn warn(&self, dir: &Path, error: &io::Error) {
        let mut warned = self.warned.lock();
        if warned.at.is_some_and(|at| at.elapsed() < WARN_EVERY) {
            warned.silent += 1;
            return;
        }
        let silent = std::mem::take(&mut warned.silent);
        warned.at = Some(Instant::now());
        drop(warned);
        tracing::warn!(
            dir = %dir.display(),
            %error,
            found_full_since_last_warning = silent,
            "the disk takes no more bytes of layers: readers are served from memory, hydration \
             waits; free some space or inodes"
        );
    }
}

/// Whether bytes and a new file can be written in `dir`. Blocks.
fn has_room(dir: &Path) -> bool {
    let Ok(stat) = rustix::fs::statvfs(dir) else {
        // The folder is gone: the next write tells.
        return true;
    };
    let wanted = ROOM.min(stat.f_blocks.saturating_mul(stat.f_frsize) / 16);
    // Some file systems make inodes as they need them and count none.
    let inodes = stat.f_files == 0 || stat.f_favail > 0;
    if !inodes || stat.f_bavail.saturating_mul(stat.f_frsize) < wanted {
        return false;
    }
    let path: PathBuf = dir.join(PROBE_NAME);
    let written = File::create(&path)
        .and_then(|mut file| file.write_all(&vec![0xA5; PROBE_BYTES]).map(|()| file))
        .and_then(|file| file.sync_data());
    // If it cannot be removed, the next probe writes over it.
    let _ = std::fs::remove_file(&path);
    match written {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
