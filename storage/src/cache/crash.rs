//! Power loss at any point of the sequence of writes, with syncs that fail among them: what the maps
//! and the record on disk say is true.

use std::{
    fs, io,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use formats::{
    blobmap::{BlobMap, Chunk},
    digest::Digest,
    units::{ChunkIdx, DecodedOffset, RemoteOffset},
};

use super::{
    CacheOptions, Codec, LayerBlob, Scheduler, SchedulerOptions, Wire, WireOptions,
    files::journal::{self, Journal},
};
use crate::{
    hydrate::{ChunkSink, HydrateOptions, Judged, Mode, Prove, Verdict},
    ranges::{FetchError, FetchFailure, MemorySource, RangeBody, RangeSource},
    source::{BlobSource as _, BoxFuture, Cause, ReadNow},
};

/// Runs recorded, and crashes of each.
const RUNS: u64 = 3;
const CRASHES: u64 = 60;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n.max(1)
    }
}

#[derive(Clone)]
struct Layer {
    blob: Bytes,
    map: Arc<BlobMap>,
    decoded: Arc<Vec<u8>>,
}

fn layer(seed: u64) -> Layer {
    let mut random = Random(seed * 2 + 1);
    let (mut blob, mut decoded, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
    for file in 0..30 {
        decoded.resize(decoded.len().next_multiple_of(4096), 0);
        let mut left = [60, 3000, 4096, 20_000, 70_000][file % 5];
        while left > 0 {
            let len = left.min(30_000);
            // No byte is 0: a hole shows.
            let part: Vec<u8> = (0..len)
                .map(|_| random.next().to_le_bytes()[3] | 1)
                .collect();
            chunks.push(Chunk {
                decoded: DecodedOffset(decoded.len() as u64),
                len: u32::try_from(len).unwrap(),
                remote: RemoteOffset(blob.len() as u64),
                remote_end: RemoteOffset((blob.len() + len) as u64),
                inner: 0,
                digest: Digest::of(&part),
            });
            blob.extend_from_slice(&part);
            decoded.extend_from_slice(&part);
            left -= len;
        }
    }
    decoded.resize(decoded.len().next_multiple_of(4096), 0);
    Layer {
        blob: blob.into(),
        map: Arc::new(BlobMap::new(chunks, decoded.len() as u64).unwrap()),
        decoded: Arc::new(decoded),
    }
}

impl Prove for Layer {
    fn prove(&self, compressed: &mut dyn io::Read, sink: &mut ChunkSink<'_>) -> io::Result<Judged> {
        let mut all = Vec::new();
        compressed.read_to_end(&mut all)?;
        assert!(all == self.blob, "what hydration reads is what was fetched");
        for (number, chunk) in self.map.chunks().iter().enumerate() {
            let at = chunk.remote_range();
            let number = ChunkIdx(u32::try_from(number).unwrap());
            sink(number, &all[usize_range(&at)]);
        }
        Ok(Verdict::Proven.into())
    }
}

fn usize_range(range: &Range<u64>) -> Range<usize> {
    super::to_index(range.start)..super::to_index(range.end)
}

/// A registry that is gone.
struct Gone(u64);

impl RangeSource for Gone {
    fn len(&self) -> u64 {
        self.0
    }

    fn origin(&self) -> String {
        "gone".to_owned()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        Box::pin(async move {
            Err(FetchError::Source {
                origin: "gone".to_owned(),
                range,
                failure: FetchFailure::Unreachable,
                source: Arc::new(io::Error::other("gone")),
            })
        })
    }
}

fn open(dir: &Path, layer: &Layer, source: Arc<dyn RangeSource>) -> Arc<LayerBlob> {
    let options = WireOptions {
        dir: dir.to_owned(),
        identity: Digest::of(&layer.blob),
        name: "crash test".to_owned(),
    };
    let runtime = tokio::runtime::Handle::current();
    let scheduler = Scheduler::new(runtime, SchedulerOptions::default());
    let wire = Wire::open(options, source, scheduler).unwrap();
    let options = CacheOptions {
        codec: Codec::Stored,
        ..CacheOptions::default()
    };
    LayerBlob::open(wire, Arc::clone(&layer.map), options).unwrap()
}

async fn read(blob: &Arc<LayerBlob>, layer: &Layer, range: Range<u64>) {
    let mut buf = vec![0; super::to_index(range.end - range.start)];
    while blob.try_read(range.start, &mut buf).unwrap() == ReadNow::Pending {
        let len = buf.len() as u64;
        let ready = Arc::clone(blob).ensure(range.start, len, Cause::Demand);
        ready.await.unwrap();
    }
    assert!(
        buf == layer.decoded[usize_range(&range)],
        "wrong bytes in {range:?}"
    );
}

fn flush(blob: &LayerBlob) {
    // A sync that fails is part of the test.
    let _ = blob.wire.flush(true);
    let _ = blob.flush_held(true);
}

/// The life of a cache from the first read to its completion, with a journal.
async fn live(dir: &Path, layer: &Layer, random: &mut Random) -> Arc<Journal> {
    let journal = journal::begin(dir);
    let source: Arc<dyn RangeSource> = Arc::new(MemorySource::new("memory", layer.blob.clone()));
    let blob = open(dir, layer, Arc::clone(&source));
    let over = Arc::new(AtomicBool::new(false));
    for turn in 0..3 {
        over.store(false, Ordering::SeqCst);
        let flusher = tokio::task::spawn_blocking({
            let (blob, over) = (Arc::clone(&blob), Arc::clone(&over));
            move || {
                while !over.load(Ordering::SeqCst) {
                    flush(&blob);
                }
            }
        });
        for _ in 0..8 {
            let chunk = random.below(layer.map.chunks().len() as u64);
            let range = layer.map.chunks()[super::to_index(chunk)].decoded_range();
            read(&blob, layer, range).await;
        }
        over.store(true, Ordering::SeqCst);
        flusher.await.unwrap();
        // Not while somebody reads: for a moment what the disk lost cannot be told from the rest.
        journal.fail_sync(["data", "wire", "data.map"][turn]);
        let lost = Arc::clone(&blob);
        tokio::task::spawn_blocking(move || flush(&lost))
            .await
            .unwrap();
    }
    journal.fail_sync("data");
    blob.hydrate(HydrateOptions {
        layer_digest: Digest::of(&layer.blob),
        mode: Mode::Full,
        prover: Arc::new(layer.clone()),
    });
    assert!(blob.hydrated().await.unwrap().complete);
    read(&blob, layer, 0..layer.decoded.len() as u64).await;
    blob.close().await.unwrap();
    journal
}

/// What a daemon finds after the crash; how many chunks, and whether it is complete.
async fn examine(dir: &Path, layer: &Layer) -> (usize, bool) {
    let blob = open(dir, layer, Arc::new(Gone(layer.blob.len() as u64)));
    let mut present = 0;
    for (number, chunk) in layer.map.chunks().iter().enumerate() {
        if blob.store.bits.get(number as u64) {
            present += 1;
            let mut buf = vec![0; chunk.len as usize];
            blob.store.read(&mut buf, chunk.decoded.0).unwrap();
            let right = &layer.decoded[usize_range(&chunk.decoded_range())];
            assert!(buf == right, "chunk {number} is said to be there");
        }
    }
    let len = layer.blob.len() as u64;
    for start in (0..len).step_by(4096) {
        let block = start..len.min(start + 4096);
        if blob.wire.has(block.clone()) {
            let mut buf = vec![0; super::to_index(block.end - block.start)];
            blob.wire.read(&mut buf, start).unwrap();
            assert!(buf == layer.blob[usize_range(&block)], "block at {start}");
        }
    }
    let record = blob.hydration_progress().record;
    let complete = record.is_some_and(|record| record.complete);
    if complete {
        // Then the file is used without its map, too.
        let data = fs::read(dir.join("data")).unwrap();
        assert!(data == *layer.decoded, "said to be complete");
    }
    blob.close().await.unwrap();
    drop(blob);
    let source = MemorySource::new("memory", layer.blob.clone());
    let blob = open(dir, layer, Arc::new(source));
    read(&blob, layer, 0..layer.decoded.len() as u64).await;
    (present, complete)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_at_any_point_what_is_said_to_be_there_is() {
    let (mut partly, mut completes) = (0, 0);
    for seed in 1..=RUNS {
        let layer = layer(seed);
        let mut random = Random(seed * 7919);
        let dir = tempfile::tempdir().unwrap();
        let journal = live(dir.path(), &layer, &mut random).await;
        let end = journal.len() as u64;
        for crash in 0..CRASHES {
            // Every third one in the last steps: recording the outcome and dropping the wire.
            let from = if crash % 3 == 0 {
                end.saturating_sub(40)
            } else {
                0
            };
            let cut = from + random.below(end + 1 - from);
            // Of what is not durable, all, most, half, little or none is there.
            let odds = crash % 5;
            let left = tempfile::tempdir().unwrap();
            let mut coin = || random.below(4) < odds;
            journal
                .crash(super::to_index(cut), left.path(), &mut coin)
                .unwrap();
            eprintln!("seed {seed}, crash {crash}, after {cut} of {end}, odds {odds}/4");
            let (present, complete) = examine(left.path(), &layer).await;
            partly += u64::from(present > 0 && !complete);
            completes += u64::from(complete);
        }
        // And the end, where everything is durable but what was not synced last.
        let left = tempfile::tempdir().unwrap();
        journal
            .crash(super::to_index(end), left.path(), &mut || false)
            .unwrap();
        let (present, complete) = examine(left.path(), &layer).await;
        assert_eq!((present, complete), (layer.map.chunks().len(), true));
    }
    assert!(partly > 0 && completes > 0, "{partly}, {completes}");
}
