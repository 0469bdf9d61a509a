//! Layers with known bytes, and caches over them.

use std::{io, ops::Range, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use formats::{
    blobmap::{BlobMap, Chunk},
    digest::Digest,
    units::{ChunkIdx, DecodedOffset, RemoteOffset},
};
use storage::{
    cache::{CacheOptions, Codec, LayerBlob, Scheduler, SchedulerOptions, Wire, WireOptions},
    hydrate::{ChunkSink, HydrateOptions, Judged, Mode, Prove, Verdict},
    source::{BlobSource as _, Cause, ReadNow},
};

use crate::source::{Handle, Scripted};

/// Bytes that tell where they come from: any misplaced read shows.
pub(crate) fn ramp(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

/// A layer: its blob, its map and what a reader must see.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) blob: Bytes,
    pub(crate) map: Arc<BlobMap>,
    pub(crate) decoded: Arc<Vec<u8>>,
}

impl Layer {
    /// One file per length, cut into chunks; a member per chunk, or one for `shared` chunks; 512
    /// bytes of what no reader sees after each member, and some more at the end.
    pub(crate) fn new(files: &[usize], chunk_size: usize, shared: usize) -> Self {
        let mut blob = ramp(1, 512);
        let mut decoded = Vec::new();
        let mut members: Vec<Vec<Chunk>> = Vec::new();
        let mut open: Option<(usize, usize)> = None;
        for (number, len) in files.iter().enumerate() {
            decoded.resize(decoded.len().next_multiple_of(4096), 0);
            let payload = ramp(number as u64 + 7, *len);
            for part in payload.chunks(chunk_size) {
                let (start, count) = match open {
                    Some((start, count)) if count < shared => (start, count),
                    _ => {
                        blob.extend_from_slice(&ramp(3, 512));
                        members.push(Vec::new());
                        (blob.len(), 0)
                    }
                };
                members.last_mut().unwrap().push(Chunk {
                    decoded: DecodedOffset(decoded.len() as u64),
                    len: u32::try_from(part.len()).unwrap(),
                    remote: RemoteOffset(start as u64),
                    remote_end: RemoteOffset(0),
                    inner: (blob.len() - start) as u64,
                    digest: Digest::of(part),
                });
                blob.extend_from_slice(part);
                decoded.extend_from_slice(part);
                open = Some((start, count + 1));
            }
        }
        decoded.resize(decoded.len().next_multiple_of(4096), 0);
        let toc = blob.len() as u64;
        blob.extend_from_slice(&ramp(5, 9_000));
        let starts: Vec<u64> = members.iter().map(|m| m[0].remote.0).collect();
        let mut chunks = Vec::new();
        for (number, member) in members.into_iter().enumerate() {
            let end = starts.get(number + 1).copied().unwrap_or(toc);
            chunks.extend(member.into_iter().map(|chunk| Chunk {
                remote_end: RemoteOffset(end),
                ..chunk
            }));
        }
        let map = BlobMap::new(chunks, decoded.len() as u64).unwrap();
        Self {
            blob: blob.into(),
            map: Arc::new(map),
            decoded: Arc::new(decoded),
        }
    }

    /// A few MB in files of all sizes.
    pub(crate) fn medium() -> Self {
        let sizes: Vec<usize> = (0..120)
            .map(|i| [1, 500, 4096, 5_000, 40_000, 130_000, 300_001][i % 7])
            .collect();
        Self::new(&sizes, 100_000, 1)
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    pub(crate) fn source(&self) -> Arc<Scripted> {
        Scripted::new(self.blob.clone())
    }

    pub(crate) fn expected(&self, range: Range<u64>) -> &[u8] {
        &self.decoded[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
    }

    pub(crate) fn hydrate_options(&self) -> HydrateOptions {
        HydrateOptions {
            layer_digest: self.digest(),
            mode: Mode::Full,
            prover: Arc::new(Slices(Arc::clone(&self.map))),
        }
    }
}

/// Judges a stored layer: every chunk must be where the map says.
pub(crate) struct Slices(pub(crate) Arc<BlobMap>);

impl Prove for Slices {
    fn prove(&self, compressed: &mut dyn io::Read, sink: &mut ChunkSink<'_>) -> io::Result<Judged> {
        let mut all = Vec::new();
        compressed.read_to_end(&mut all)?;
        let mut reasons = Vec::new();
        for (number, chunk) in self.0.chunks().iter().enumerate() {
            let at = usize::try_from(chunk.remote.0 + chunk.inner).unwrap();
            let bytes = &all[at..at + chunk.len as usize];
            if Digest::of(bytes) == chunk.digest {
                sink(ChunkIdx(u32::try_from(number).unwrap()), bytes);
            } else {
                reasons.push(format!("chunk {number}"));
            }
        }
        let verdict = if reasons.is_empty() {
            Verdict::Proven
        } else {
            Verdict::Refuted { reasons }
        };
        Ok(verdict.into())
    }
}

pub(crate) fn scheduler() -> Arc<Scheduler> {
    Scheduler::new(
        tokio::runtime::Handle::current(),
        SchedulerOptions::default(),
    )
}

pub(crate) fn options() -> CacheOptions {
    CacheOptions {
        codec: Codec::Stored,
        ..CacheOptions::default()
    }
}

pub(crate) fn open_with(
    dir: &Path,
    layer: &Layer,
    source: &Arc<Scripted>,
    scheduler: &Arc<Scheduler>,
    options: CacheOptions,
) -> Arc<LayerBlob> {
    let wire = loop {
        let wire = Wire::open(
            WireOptions {
                dir: dir.to_owned(),
                identity: layer.digest(),
                name: "test/image layer 1".to_owned(),
            },
            Arc::new(Handle(Arc::clone(source))),
            Arc::clone(scheduler),
        );
        match wire {
            Ok(wire) => break wire,
            // An earlier one is just going.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
    };
    LayerBlob::open(wire, Arc::clone(&layer.map), options).unwrap()
}

pub(crate) fn open(dir: &Path, layer: &Layer, source: &Arc<Scripted>) -> Arc<LayerBlob> {
    open_with(dir, layer, source, &scheduler(), options())
}

/// Reads as a presenter does: what is local at once, else after waiting.
pub(crate) async fn read(
    blob: &Arc<LayerBlob>,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, String> {
    let mut buf = vec![0; len];
    loop {
        match blob.try_read(offset, &mut buf).map_err(|e| e.to_string())? {
            ReadNow::Ready(n) => {
                buf.truncate(n);
                return Ok(buf);
            }
            ReadNow::Pending => Arc::clone(blob)
                .ensure(offset, len as u64, Cause::Demand)
                .await
                .map_err(|e| e.to_string())?,
        }
    }
}

/// Waits (without a deadline of its own: the runner has one) until `condition` holds.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
