//! From the first missing byte to the record.

use std::{
    io,
    sync::{Arc, Weak},
    time::Duration,
};

use formats::{digest::Digest, units::ChunkIdx};
use sha2::{Digest as _, Sha256};

use super::{HydrateOptions, Judged, Mode, Phase, Record, Verdict, pump::pump};
use crate::{
    cache::{LayerBlob, to_index},
    prefetch::Prefetch,
    source::Cause,
};

const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_mins(1);
/// How long a start list may take to be asked for before hydration begins anyway.
const START_LIST_PATIENCE: Duration = Duration::from_secs(30);
/// How much of the wire the pass reads at a time.
const STEP: usize = 1 << 20;

pub(super) async fn run(blob: Weak<LayerBlob>, options: HydrateOptions) {
    // `None` means that the blob was dropped: there is nothing left to do or to tell.
    let _ = hydrate(&blob, &options).await;
}

async fn hydrate(weak: &Weak<LayerBlob>, options: &HydrateOptions) -> Option<()> {
    wait_for_start_list(weak).await?;
    let mut mode = weak.upgrade()?.hydration.mode.subscribe();
    let mut delay = RETRY_FIRST;
    let mut distrusted = false;
    loop {
        if wait_for_room(weak).await? {
            delay = RETRY_FIRST;
        }
        let waiting = *mode.borrow() == Mode::Off;
        set_phase(
            weak,
            if waiting {
                Phase::Waiting
            } else {
                Phase::Fetching
            },
        )?;
        match pump(weak, &mut mode).await? {
            Ok(()) => {}
            Err(error) => {
                let message = error.report();
                retry_later(weak, message, &mut delay).await?;
                continue;
            }
        }
        delay = RETRY_FIRST;
        set_phase(weak, Phase::Proving)?;
        match pass(weak, options).await? {
            Ok((digest, _)) if digest != options.layer_digest && !distrusted => {
                distrusted = true;
                let blob = weak.upgrade()?;
                blob.note_error(format!(
                    "{}: what was fetched has digest {digest} instead of {}: fetching it again",
                    blob.wire.name, options.layer_digest
                ));
                blob.wire.forget(0..blob.wire.blob_len());
            }
            Ok((digest, judged)) => {
                let judged = if digest == options.layer_digest {
                    judged
                } else {
                    let reasons = vec![format!(
                        "the blob has digest {digest}, not {}",
                        options.layer_digest
                    )];
                    Verdict::Refuted { reasons }.into()
                };
                match finish(weak, digest, judged).await? {
                    Ok(()) => return Some(()),
                    Err(message) => retry_later(weak, message, &mut delay).await?,
                }
            }
            Err(error) => {
                let message = format!("the ordered pass failed: {error}");
                retry_later(weak, message, &mut delay).await?;
            }
        }
    }
}

async fn wait_for_start_list(weak: &Weak<LayerBlob>) -> Option<()> {
    let mut prefetch = weak.upgrade()?.prefetch.subscribe();
    let issued = prefetch.wait_for(Prefetch::is_issued);
    match tokio::time::timeout(START_LIST_PATIENCE, issued).await {
        Ok(Err(_)) => None,
        Ok(Ok(_)) | Err(_) => Some(()),
    }
}

/// Waits while the disk takes nothing; whether it did.
async fn wait_for_room(weak: &Weak<LayerBlob>) -> Option<bool> {
    let mut disk = {
        let blob = weak.upgrade()?;
        if !blob.wire.disk.is_full() {
            return Some(false);
        }
        blob.hydration.update(|progress| {
            progress.phase = Phase::Retrying;
            progress.problem = Some("the disk is full".to_owned());
        });
        blob.wire.disk.watch()
    };
    // The blob may go meanwhile: look now and then.
    while *disk.borrow_and_update() {
        let _ = tokio::time::timeout(RETRY_FIRST, disk.changed()).await;
        if weak.upgrade()?.wire.is_closed() {
            return None;
        }
    }
    Some(true)
}

fn set_phase(weak: &Weak<LayerBlob>, phase: Phase) -> Option<()> {
    weak.upgrade()?.hydration.update(|progress| {
        progress.phase = phase;
        progress.problem = None;
        progress.passed_bytes = 0;
    });
    Some(())
}

async fn retry_later(weak: &Weak<LayerBlob>, message: String, delay: &mut Duration) -> Option<()> {
    {
        let blob = weak.upgrade()?;
        if blob.wire.is_closed() {
            return None;
        }
        // That the disk is full has been said once for all layers.
        if !blob.wire.disk.is_full() {
            blob.note_error(format!("{}: hydration: {message}", blob.wire.name));
        }
        blob.hydration.update(|progress| {
            progress.phase = Phase::Retrying;
            progress.problem = Some(message);
        });
    }
    tokio::time::sleep(*delay).await;
    *delay = (*delay * 2).min(RETRY_MAX);
    Some(())
}

/// Runs the ordered pass on a blocking thread: digest of the compressed stream, and the verdict.
async fn pass(
    weak: &Weak<LayerBlob>,
    options: &HydrateOptions,
) -> Option<io::Result<(Digest, Judged)>> {
    let blob = weak.upgrade()?;
    let passes = Arc::clone(&blob.wire.scheduler.passes);
    drop(blob);
    // Never closed.
    let _permit = passes.acquire_owned().await.ok()?;
    let blob = weak.upgrade()?;
    let prover = Arc::clone(&options.prover);
    let judged = tokio::task::spawn_blocking(move || {
        let mut reader = WireReader::new(&blob);
        let mut trouble = None;
        let judged = prover.prove(&mut reader, &mut |number, bytes| {
            if trouble.is_none()
                && let Err(error) = blob.fill(number, bytes)
            {
                trouble = Some(error);
            }
        })?;
        // A verdict may come early; the digest is over everything.
        io::copy(&mut reader, &mut io::sink())?;
        match trouble {
            Some(error) => Err(error),
            None => Ok((Digest::finish(reader.hasher), judged)),
        }
    });
    Some(
        judged
            .await
            .unwrap_or_else(|join| Err(io::Error::other(join))),
    )
}

/// Fills what the pass left, makes it durable, records it, drops the wire.
async fn finish(
    weak: &Weak<LayerBlob>,
    digest: Digest,
    judged: Judged,
) -> Option<Result<(), String>> {
    let blob = weak.upgrade()?;
    if blob.wire.is_closed() {
        return None;
    }
    let refused = blob.wire.disk.refused_writes();
    let waits = blob.want(0..blob.map.decoded_len(), Cause::Hydration);
    for wait in waits {
        // What cannot be decoded has been reported as an event.
        let _ = wait.await;
    }
    let complete = blob.is_full();
    let disk = &blob.wire.disk;
    if !complete && (disk.is_full() || disk.refused_writes() != refused) {
        return Some(Err(
            "the disk does not take the rest of the layer".to_owned()
        ));
    }
    let record = Record::new(blob.wire.identity, digest, judged, complete);
    let stored = tokio::task::spawn_blocking({
        let (blob, record) = (Arc::clone(&blob), record.clone());
        move || {
            // The folder may be somebody else's by now.
            let Some(_guard) = blob.wire.usage() else {
                return Ok(false);
            };
            blob.flush_held(true)?;
            // A flush that failed meanwhile took bits back.
            if complete && !blob.store.is_full_on_disk() {
                return Err(io::Error::other(
                    "the disk lost bytes that were written lately",
                ));
            }
            record.store(blob.wire.dir())?;
            if complete {
                blob.wire.retire()?;
            }
            io::Result::Ok(true)
        }
    });
    let stored = stored
        .await
        .unwrap_or_else(|join| Err(io::Error::other(join)));
    match stored {
        Ok(true) => {}
        Ok(false) => return None,
        Err(error) => return Some(Err(format!("cannot record the outcome: {error}"))),
    }
    match &record.verdict {
        Verdict::Proven => tracing::info!(layer = blob.wire.name, complete, "layer proven"),
        Verdict::Refuted { reasons } => {
            blob.note_error(format!(
                "{}: REFUTED: {}",
                blob.wire.name,
                reasons.join("; ")
            ));
        }
        Verdict::Unprovable { reason } => {
            blob.wire
                .counters
                .event(format!("{}: not provable: {reason}", blob.wire.name));
        }
    }
    blob.hydration.update(|progress| {
        progress.phase = Phase::Over;
        progress.problem = None;
        progress.record = Some(record);
    });
    Some(Ok(()))
}

/// Reads the wire in order and hashes what it reads.
struct WireReader<'a> {
    blob: &'a LayerBlob,
    hasher: Sha256,
    buf: Vec<u8>,
    used: usize,
    next: u64,
}

impl<'a> WireReader<'a> {
    fn new(blob: &'a LayerBlob) -> Self {
        Self {
            blob,
            hasher: Sha256::new(),
            buf: Vec::new(),
            used: 0,
            next: 0,
        }
    }
}

impl io::Read for WireReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.used == self.buf.len() {
            if self.blob.wire.is_closed() {
                return Err(io::Error::other("the cache was closed"));
            }
            let left = self.blob.wire.blob_len() - self.next;
            let step = STEP.min(to_index(left));
            self.buf.resize(step, 0);
            self.used = 0;
            self.blob.wire.read(&mut self.buf, self.next)?;
            self.hasher.update(&self.buf);
            self.next += step as u64;
            self.blob
                .hydration
                .update(|progress| progress.passed_bytes = self.next);
        }
        let rest = &self.buf[self.used..];
        let n = rest.len().min(out.len());
        out[..n].copy_from_slice(&rest[..n]);
        self.used += n;
        Ok(n)
    }
}

impl LayerBlob {
    /// Writes a chunk that the pass has verified, unless it is there.
    fn fill(&self, number: ChunkIdx, bytes: &[u8]) -> io::Result<()> {
        let Some(chunk) = self.map.chunk(number) else {
            return Err(io::Error::other(format!("there is no chunk {}", number.0)));
        };
        if bytes.len() as u64 != u64::from(chunk.len) {
            return Err(io::Error::other(format!(
                "chunk {} has {} bytes, not {}",
                number.0,
                bytes.len(),
                chunk.len
            )));
        }
        if self.store.bits.get(u64::from(number.0)) {
            return Ok(());
        }
        self.keep(number.index(), chunk, bytes)
    }
}
