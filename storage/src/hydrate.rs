//! Hydration: the rest of a layer is fetched, and one pass over its bytes decides what it is.
//!
//! # Fetching
//!
//! Begins when the start list has been asked for. What is missing of the blob is fetched on
//! capacity that readers leave (see [`Scheduler`](crate::cache::Scheduler)), several requests in
//! flight. Because the wire keeps the bytes, the order of fetching is free: places where readers
//! were lately come first, then the blob from its beginning. Nothing is decoded on arrival; a
//! reader that wants it finds it in the wire.
//!
//! # The pass
//!
//! When every byte of the blob is local, one thread reads the wire from its beginning, hashes the
//! compressed stream and hands it to a [`Prove`], which inflates it, hashes the tar, and compares
//! the tree with the one that is served; every chunk that it verifies on the way goes into `data`
//! if it is not there yet. The pass never waits for the network, so it holds no thread in vain and
//! needs no checkpoints: after a restart it begins again from local bytes.
//!
//! If the compressed stream does not hash to the layer digest, what was fetched is forgotten and
//! fetched once more before that is held against the image.
//!
//! # Afterwards
//!
//! The rest of `data` is filled from the wire, `data` and its map are made durable, then
//! `proof.json` is written (a temporary file, fsync, rename, fsync of the folder), then the wire is
//! dropped. A crash between any two of these steps repeats what was not recorded.

mod estargz;
mod pump;
mod record;
mod run;

use std::{future::Future, io, path::Path, sync::Arc};

use formats::{digest::Digest, units::ChunkIdx};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::{estargz::StargzProof, record::Record};
use crate::cache::LayerBlob;

/// Receives every chunk of a layer whose bytes matched their digest.
pub type ChunkSink<'a> = dyn FnMut(ChunkIdx, &[u8]) + 'a;

/// What an ordered pass over a layer's compressed stream concludes.
pub trait Prove: Send + Sync + 'static {
    /// Reads `compressed` from the layer's first byte to its end and judges it. `sink` is given
    /// each chunk once it matched its digest. An error is a local one: a stream that does not
    /// decode is a verdict.
    fn prove(&self, compressed: &mut dyn io::Read, sink: &mut ChunkSink<'_>) -> io::Result<Judged>;
}

/// What a pass found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The DiffID that the layer's tar has, if it was taken.
    pub diff_id: Option<Digest>,
    /// The verdict.
    pub verdict: Verdict,
}

impl From<Verdict> for Judged {
    fn from(verdict: Verdict) -> Self {
        Self {
            diff_id: None,
            verdict,
        }
    }
}

/// Whether the served tree is what the image's DiffID stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It is.
    Proven,
    /// It is not.
    Refuted {
        /// What disagrees.
        reasons: Vec<String>,
    },
    /// The tar holds what an index cannot: no alarm, but no proof.
    Unprovable {
        /// What it holds.
        reason: String,
    },
}

/// When hydration fetches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// On what readers leave, at line rate when they are silent.
    #[default]
    Full,
    /// Only while no reader is active on the node.
    Idle,
    /// Not at all. What is in flight arrives.
    Off,
}

/// What hydration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Not asked for.
    #[default]
    NotStarted,
    /// Waiting for the start list to be asked for, or mode is off.
    Waiting,
    /// Fetching what is missing.
    Fetching,
    /// The source fails; trying again later.
    Retrying,
    /// The pass is running or about to.
    Proving,
    /// Over; the record says how.
    Over,
}

/// Where hydration of a layer stands.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Compressed bytes local.
    pub fetched_bytes: u64,
    /// Compressed bytes that the pass has read.
    pub passed_bytes: u64,
    /// Length of the blob.
    pub blob_bytes: u64,
    /// The last failure, if it is being retried.
    pub problem: Option<String>,
    /// The outcome, once over.
    pub record: Option<Record>,
}

/// How a layer is hydrated.
#[derive(Clone)]
pub struct HydrateOptions {
    /// Digest of the compressed blob.
    pub layer_digest: Digest,
    /// When to fetch.
    pub mode: Mode,
    /// What judges the bytes.
    pub prover: Arc<dyn Prove>,
}

impl std::fmt::Debug for HydrateOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HydrateOptions")
            .field("layer_digest", &self.layer_digest)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// Hydration's place in a [`LayerBlob`].
#[derive(Debug)]
pub(crate) struct Slot {
    state: watch::Sender<Progress>,
    mode: watch::Sender<Mode>,
    started: Mutex<bool>,
}

impl Slot {
    /// Finds out whether an earlier life of this layer got to the end.
    pub(crate) fn load(dir: &Path, identity: Digest) -> io::Result<Self> {
        let record = Record::load(dir, identity)?;
        let phase = if record.is_some() {
            Phase::Over
        } else {
            Phase::NotStarted
        };
        Ok(Self {
            state: watch::Sender::new(Progress {
                phase,
                record,
                ..Progress::default()
            }),
            mode: watch::Sender::default(),
            started: Mutex::new(false),
        })
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.state.send_modify(change);
    }
}

impl LayerBlob {
    /// Begins to hydrate. Once per blob; a later call only sets the mode. A layer that is over
    /// already (this life or an earlier one) stays so.
    pub fn hydrate(self: &Arc<Self>, options: HydrateOptions) {
        self.set_hydration_mode(options.mode);
        {
            let mut started = self.hydration.started.lock();
            if *started || self.is_complete() {
                return;
            }
            *started = true;
        }
        self.hydration.update(|progress| {
            progress.phase = Phase::Waiting;
            progress.record = None;
        });
        let runtime = self.wire.scheduler.runtime.clone();
        // Weak: a blob that nobody holds any more stops hydrating.
        runtime.spawn(run::run(Arc::downgrade(self), options));
    }

    /// Pauses or resumes.
    pub fn set_hydration_mode(&self, mode: Mode) {
        self.hydration.mode.send_replace(mode);
    }

    /// Where hydration stands.
    pub fn hydration_progress(&self) -> Progress {
        let mut progress = self.hydration.state.borrow().clone();
        progress.blob_bytes = self.wire.blob_len();
        progress.fetched_bytes = if progress.record.as_ref().is_some_and(|r| r.complete) {
            progress.blob_bytes
        } else {
            self.wire.present_bytes()
        };
        progress
    }

    /// Completes when hydration is over. Never if it was not begun.
    pub fn hydrated(&self) -> impl Future<Output = Option<Record>> + Send + 'static {
        let mut state = self.hydration.state.subscribe();
        async move {
            let over = state
                .wait_for(|progress| progress.phase == Phase::Over)
                .await;
            over.ok().and_then(|progress| progress.record.clone())
        }
    }

    /// Whether all chunks are local, verified and durable, with the ordered pass over: the data
    /// file may then be used without this process.
    pub fn is_complete(&self) -> bool {
        let recorded = self
            .hydration
            .state
            .borrow()
            .record
            .as_ref()
            .is_some_and(|record| record.complete);
        recorded && self.is_full()
    }
}
