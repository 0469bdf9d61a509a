//! One EROFS superblock per layer, variant and occurrence, at `<lowers>/<number>`, shared by all
//! chains of the node.
//!
//! A number is recorded before anything is mounted under it, so what a killed daemon left behind
//! can always be told from what it should be: mountinfo is compared with the table, mounts that
//! fit are adopted, others are detached. All mounting and unmounting happens in helper processes.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use fuse::mounts::{ErofsMount, Helper, HelperError, mountinfo};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, join_all},
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot, watch};
use tracing::{debug, info, warn};

use super::{
    record::{MountKey, MountNumber},
    table::LayerTable,
};

/// A single mount or umount may take this long.
const STEP_LIMIT: Duration = Duration::from_secs(8);
/// Helpers at work at the same time.
const PARALLEL: usize = 4;
/// A helper of a former daemon may take this long before it is killed.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// An unmount that takes longer is looked after.
const TEARDOWN_PATIENCE: Duration = Duration::from_millis(300);
const EROFS: &str = "erofs";

/// Why a layer is not mounted.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The number is not in the table.
    #[error("mount {0} is not known")]
    Unknown(MountNumber),
    /// Image or device cannot be provided.
    #[error("mount {number} of layer {layer}: {detail}")]
    Parts {
        /// The mount.
        number: MountNumber,
        /// The layer.
        layer: String,
        /// What is missing.
        detail: String,
    },
    /// The helper failed.
    #[error("mount {number} at {}: {detail}", target.display())]
    Helper {
        /// The mount.
        number: MountNumber,
        /// Where.
        target: PathBuf,
        /// What happened.
        detail: String,
    },
    /// It took too long.
    #[error("layer mounts are not ready: {0}")]
    NotReady(&'static str),
    /// It was just being unmounted; the next attempt mounts it again.
    #[error("mount {0} was being unmounted")]
    Leaving(MountNumber),
}

/// What a mount is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The metadata image.
    pub metadata: PathBuf,
    /// The data device, if the layer has data.
    pub device: Option<PathBuf>,
    /// The device is a file on BlobFs.
    pub on_blobfs: bool,
    /// Read past the device's page cache.
    pub direct_io: bool,
}

/// Provides what mounts are made of.
pub trait Provider: Send + Sync + 'static {
    /// Metadata image and device for `key`; waits until BlobFs serves where it is needed.
    fn parts(&self, key: &MountKey) -> BoxFuture<'static, Result<Parts, String>>;

    /// Where the metadata image of `key` is, for telling our mounts from others.
    fn metadata(&self, key: &MountKey) -> PathBuf;

    /// Fails reads of the layer that wait for its source, and says how many there were.
    fn give_up(&self, key: &MountKey, which: GiveUp) -> usize;

    /// Names the layer in errors.
    fn describe(&self, key: &MountKey) -> String;
}

/// Whose reads are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// Those of threads that have ended: nobody waits for the answer.
    Ended,
    /// Everybody's.
    All,
}

type Outcome = Shared<BoxFuture<'static, Result<(), MountError>>>;

#[derive(Debug)]
enum State {
    Mounted,
    Working(Outcome),
}

/// The layer mounts of the node.
pub struct Mounts {
    lowers: PathBuf,
    table: Arc<LayerTable>,
    helper: Helper,
    provider: Arc<dyn Provider>,
    states: Mutex<HashMap<MountNumber, State>>,
    used: Mutex<HashMap<MountNumber, Instant>>,
    gate: Arc<Semaphore>,
    settled: watch::Sender<bool>,
}

impl Mounts {
    /// The mounts below `lowers`. Adopts what is mounted already; touches no mount.
    pub fn open(
        lowers: PathBuf,
        table: Arc<LayerTable>,
        helper: Helper,
        provider: Arc<dyn Provider>,
    ) -> io::Result<Self> {
        fs::create_dir_all(&lowers)?;
        Ok(Self {
            lowers,
            table,
            helper,
            provider,
            states: Mutex::default(),
            used: Mutex::default(),
            gate: Arc::new(Semaphore::new(PARALLEL)),
            settled: watch::Sender::new(false),
        })
    }

    /// Where a mount is.
    pub fn target(&self, number: MountNumber) -> PathBuf {
        self.lowers.join(number.to_string())
    }

    fn number_of(&self, target: &Path) -> Option<MountNumber> {
        let name = target.strip_prefix(&self.lowers).ok()?;
        name.to_str()?.parse().ok().map(MountNumber)
    }

    /// Where it is noted that a mount's device is a plain file.
    fn marker(&self, number: MountNumber) -> PathBuf {
        self.lowers.join(format!("{number}.plain"))
    }

    /// The directory of all lowers.
    pub fn lowers(&self) -> &Path {
        &self.lowers
    }

    /// Compares what is mounted with the table: adopts, and detaches what does not fit. Waits for
    /// helpers that a former daemon left behind, so BlobFs must be serving by now.
    ///
    /// `adopted`: the BlobFs session of the former daemon goes on. Otherwise mounts that it carried
    /// are dead, and detached too.
    pub async fn reconcile(&self, adopted: bool) -> io::Result<()> {
        for left in self.helper.settle(SETTLE_LIMIT).await {
            if left.running {
                warn!(target = %left.target.display(), "a mount helper of the former daemon hangs");
            }
        }
        let mut taken_over = 0_usize;
        for mount in mountinfo()? {
            if !mount.target.starts_with(&self.lowers) {
                continue;
            }
            let number = self.number_of(&mount.target);
            let fits = number
                .and_then(|number| self.table.mount(number))
                .is_some_and(|key| {
                    mount.fs_type == EROFS
                        && Path::new(&mount.source) == self.provider.metadata(&key)
                });
            let alive = adopted || number.is_some_and(|number| self.marker(number).exists());
            match number {
                Some(number) if fits && alive => {
                    taken_over += 1;
                    self.states.lock().entry(number).or_insert(State::Mounted);
                }
                _ => {
                    warn!(target = %mount.target.display(), "detaching a mount that is dead or not ours");
                    let key = number.and_then(|number| self.table.mount(number));
                    if let Err(error) = self.take_down(&mount.target, key.as_ref(), true).await {
                        warn!(error = &error as &dyn std::error::Error, "cannot detach it");
                    }
                }
            }
        }
        if taken_over > 0 {
            info!(taken_over, "layer mounts adopted");
        }
        self.settled.send_replace(true);
        Ok(())
    }

    /// Mounts what of `numbers` is not mounted, within `bound`, and counts it as used now.
    pub async fn ensure(
        self: &Arc<Self>,
        numbers: &[MountNumber],
        bound: Duration,
    ) -> Result<(), MountError> {
        let work = async {
            let mut settled = self.settled.subscribe();
            if settled.wait_for(|settled| *settled).await.is_err() {
                return Err(MountError::NotReady("the daemon is stopping"));
            }
            loop {
                let outcomes: Vec<Outcome> = numbers
                    .iter()
                    .filter_map(|number| self.start(*number))
                    .collect();
                let result = join_all(outcomes).await.into_iter().collect();
                if !matches!(result, Err(MountError::Leaving(_))) {
                    return result;
                }
            }
        };
        tokio::time::timeout(bound, work)
            .await
            .unwrap_or(Err(MountError::NotReady("not all are mounted in time")))
    }

    /// Whether a number is mounted.
    pub fn is_mounted(&self, number: MountNumber) -> bool {
        matches!(self.states.lock().get(&number), Some(State::Mounted))
    }

    /// How many are mounted.
    pub fn mounted(&self) -> usize {
        let states = self.states.lock();
        states
            .values()
            .filter(|state| matches!(state, State::Mounted))
            .count()
    }

    fn start(self: &Arc<Self>, number: MountNumber) -> Option<Outcome> {
        self.used.lock().insert(number, Instant::now());
        let mut states = self.states.lock();
        match states.get(&number) {
            Some(State::Mounted) => return None,
            Some(State::Working(outcome)) => return Some(outcome.clone()),
            None => {}
        }
        let this = Arc::clone(self);
        let task = tokio::spawn(async move {
            let result = this.mount(number).await;
            let mut states = this.states.lock();
            match &result {
                Ok(()) => states.insert(number, State::Mounted),
                Err(_) => states.remove(&number),
            };
            result
        });
        let outcome = async move {
            task.await
                .unwrap_or(Err(MountError::NotReady("mounting was interrupted")))
        }
        .boxed()
        .shared();
        states.insert(number, State::Working(outcome.clone()));
        Some(outcome)
    }

    async fn mount(&self, number: MountNumber) -> Result<(), MountError> {
        let key = self
            .table
            .mount(number)
            .ok_or(MountError::Unknown(number))?;
        // Never closed.
        let _permit = self.gate.acquire().await;
        let parts = self
            .provider
            .parts(&key)
            .await
            .map_err(|detail| MountError::Parts {
                number,
                layer: self.provider.describe(&key),
                detail,
            })?;
        let target = self.target(number);
        let failed = |detail: String| MountError::Helper {
            number,
            target: self.target(number),
            detail,
        };
        fs::create_dir_all(&target).map_err(|error| failed(error.to_string()))?;
        // Says after a crash that the mount does not need BlobFs.
        let marked = if parts.on_blobfs {
            remove_if_there(&self.marker(number))
        } else {
            fs::write(self.marker(number), b"")
        };
        marked.map_err(|error| failed(error.to_string()))?;
        let mount = ErofsMount {
            metadata: parts.metadata,
            devices: parts.device.into_iter().collect(),
            target: target.clone(),
            direct_io: parts.direct_io,
        };
        let begun = Instant::now();
        self.helper
            .mount_erofs(&mount, STEP_LIMIT)
            .await
            .map_err(|error| failed(storage::ranges::report(&error)))?;
        debug!(%number, layer = %key.layer, took = ?begun.elapsed(), "layer mounted");
        Ok(())
    }

    /// Unmounts every mount that is not in `in_use` and was not used for `idle`, and beyond
    /// `most` unused ones the longest unused.
    pub async fn unmount_idle(&self, in_use: &BTreeSet<MountNumber>, idle: Duration, most: usize) {
        let mut unused: Vec<(Duration, MountNumber)> = {
            let mut used = self.used.lock();
            let states = self.states.lock();
            states
                .iter()
                .filter(|(_, state)| matches!(state, State::Mounted))
                .filter(|(number, _)| !in_use.contains(number))
                .map(|(number, _)| {
                    let since = used.entry(*number).or_insert_with(Instant::now);
                    (since.elapsed(), *number)
                })
                .collect()
        };
        unused.sort_unstable_by(|a, b| b.cmp(a));
        let beyond = unused.len().saturating_sub(most);
        for (position, (since, number)) in unused.into_iter().enumerate() {
            if since >= idle || position < beyond {
                // Busy means that somebody stands in it: it stays until the next time.
                let _ = self.unmount(number).await;
            }
        }
    }

    /// Unmounts `number` if it is mounted and not busy. Who needs it meanwhile waits, and mounts
    /// it again.
    pub async fn unmount(&self, number: MountNumber) -> Result<(), HelperError> {
        let (done, waiting) = oneshot::channel::<()>();
        {
            let mut states = self.states.lock();
            if !matches!(states.get(&number), Some(State::Mounted)) {
                return Ok(());
            }
            let outcome = async move {
                let _ = waiting.await;
                Err(MountError::Leaving(number))
            };
            states.insert(number, State::Working(outcome.boxed().shared()));
        }
        let target = self.target(number);
        let key = self.table.mount(number);
        let result = self.take_down(&target, key.as_ref(), false).await;
        let mut states = self.states.lock();
        match &result {
            Ok(()) => {
                debug!(%number, "layer unmounted");
                // Empty and ours; should it be neither, it stays.
                let _ = fs::remove_dir(&target);
                let _ = remove_if_there(&self.marker(number));
                states.remove(&number);
            }
            Err(error) => {
                debug!(%number, error = error as &dyn std::error::Error, "layer stays mounted");
                states.insert(number, State::Mounted);
            }
        }
        drop(states);
        if result.is_ok() {
            self.used.lock().remove(&number);
        }
        // Who waited says again that it uses it.
        drop(done);
        result
    }

    /// Unmounts, or detaches with `lazy`.
    ///
    /// The unmount that ends a superblock waits, and no signal ends that, until BlobFs has answered
    /// everything that was asked for through it; a killed reader leaves such a request behind. So
    /// when a mount is gone but its unmount goes on, these requests are given up. A superblock that
    /// lives on (a container's overlay, a copy in another mount namespace) lets the unmount
    /// return at once: whoever reads through it goes on waiting for its bytes.
    async fn take_down(
        &self,
        target: &Path,
        key: Option<&MountKey>,
        lazy: bool,
    ) -> Result<(), HelperError> {
        let umount = self.helper.umount(target, lazy, STEP_LIMIT);
        tokio::pin!(umount);
        let begun = Instant::now();
        let mut seen_gone = false;
        loop {
            if let Ok(result) = tokio::time::timeout(TEARDOWN_PATIENCE, &mut umount).await {
                return result;
            }
            let Some(key) = key else { continue };
            let gone = mountinfo().is_ok_and(|mounts| mounts.iter().all(|m| m.target != target));
            // A helper that was only about to say that it is done has said so by the second look.
            if gone && std::mem::replace(&mut seen_gone, true) {
                // The same layer may have readers through another mount of it: they come last.
                let which = if self.has_other_mount(key) && begun.elapsed() < STEP_LIMIT / 2 {
                    GiveUp::Ended
                } else {
                    GiveUp::All
                };
                let count = self.provider.give_up(key, which);
                if count > 0 {
                    info!(
                        layer = self.provider.describe(key),
                        count, "gave up reads that nobody waits for: the layer is being unmounted"
                    );
                }
            }
        }
    }

    /// Whether the layer has another superblock that is mounted.
    fn has_other_mount(&self, key: &MountKey) -> bool {
        let states = self.states.lock();
        self.table.mounts().into_iter().any(|(number, other)| {
            other.layer == key.layer && other != *key && states.contains_key(&number)
        })
    }

    /// Detaches everything below the lowers directory, for `--unmount`. Who still reads gets an
    /// error.
    pub async fn detach_all(&self) -> io::Result<()> {
        let mounts = mountinfo()?;
        for mount in mounts.iter().rev() {
            if !mount.target.starts_with(&self.lowers) {
                continue;
            }
            let key = self.number_of(&mount.target);
            let key = key.and_then(|number| self.table.mount(number));
            if let Some(key) = &key {
                self.provider.give_up(key, GiveUp::All);
            }
            if let Err(error) = self.take_down(&mount.target, key.as_ref(), true).await {
                warn!(
                    target = %mount.target.display(),
                    error = &error as &dyn std::error::Error,
                    "cannot unmount"
                );
            }
        }
        self.states.lock().clear();
        Ok(())
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl fmt::Debug for Mounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounts")
            .field("lowers", &self.lowers)
            .field("mounted", &self.mounted())
            .finish_non_exhaustive()
    }
}
