//! A source that ignores ranges, or does so now and then: every fetch may be answered with the
//! whole blob from byte 0. However the answers interleave, each reader gets its bytes.

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use formats::units::RemoteOffset;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use storage::{
    cache::{CacheOptions, LayerBlob, PlanOptions, Wire, WireOptions},
    hydrate::Mode,
    ranges::{FetchError, FetchFailure, Meter, RangeBody, RangeSource},
    source::{BlobSource as _, BoxFuture, Cause},
};

use crate::fixture::{Layer, options, read, scheduler};

/// Pseudo-random numbers from a seed (xorshift).
#[derive(Debug)]
struct Dice(Mutex<u64>);

impl Dice {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(
            seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        )))
    }

    fn below(&self, end: u64) -> u64 {
        let mut state = self.0.lock();
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 11) % end.max(1)
    }

    /// Lets others run, for a while of random length.
    async fn dither(&self) {
        match self.below(8) {
            0 => tokio::time::sleep(Duration::from_micros(self.below(900))).await,
            n => {
                for _ in 0..n * self.below(6) {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

/// What share of the answers are odd, in percent.
#[derive(Clone, Copy, Debug)]
struct Odds {
    whole: u64,
    breaks: u64,
    flips: u64,
}

struct Careless {
    bytes: Bytes,
    dice: Arc<Dice>,
    odds: Odds,
    served: Arc<AtomicU64>,
    requests: AtomicUsize,
}

impl RangeSource for Careless {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn origin(&self) -> String {
        "memory:careless".to_owned()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let (dice, odds) = (Arc::clone(&self.dice), self.odds);
        let (bytes, served) = (self.bytes.clone(), Arc::clone(&self.served));
        Box::pin(async move {
            dice.dither().await;
            let range = if dice.below(100) < odds.whole {
                0..bytes.len() as u64
            } else {
                range
            };
            let mut body = bytes
                .slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap())
                .to_vec();
            if dice.below(100) < odds.flips {
                let at = usize::try_from(dice.below(body.len() as u64)).unwrap();
                body[at] ^= 1;
            }
            let broken = dice.below(100) < odds.breaks;
            if broken {
                body.truncate(usize::try_from(dice.below(body.len() as u64)).unwrap());
            }
            let error = broken.then(|| {
                Err(FetchError::Source {
                    origin: "memory:careless".to_owned(),
                    range: range.clone(),
                    failure: FetchFailure::Unreachable,
                    source: Arc::new(io::Error::other("connection reset")),
                })
            });
            let mut pieces = Vec::new();
            let mut rest = Bytes::from(body);
            while !rest.is_empty() {
                let size = usize::try_from(1 + dice.below(40_000)).unwrap();
                pieces.push(Ok(rest.split_to(size.min(rest.len()))));
            }
            pieces.extend(error);
            let meter = Arc::new(Meter::default());
            meter.add_request();
            let chunks = stream::iter(pieces).then({
                let meter = Arc::clone(&meter);
                move |piece: Result<Bytes, FetchError>| {
                    let (dice, served) = (Arc::clone(&dice), Arc::clone(&served));
                    let meter = Arc::clone(&meter);
                    async move {
                        dice.dither().await;
                        if let Ok(piece) = &piece {
                            meter.add_bytes(piece.len() as u64);
                            served.fetch_add(piece.len() as u64, Ordering::SeqCst);
                        }
                        piece
                    }
                }
            });
            let origin = "memory:careless".to_owned();
            Ok(RangeBody::new(origin, range, meter, chunks.boxed()))
        })
    }
}

/// Several readers at random places at random times. Returns (requests, bytes served, stuck).
async fn run(seed: u64, odds: Odds, prefetch: bool) -> Result<(usize, u64, u64), String> {
    let layer = Layer::new(&[90_000; 12], 30_000, 1);
    let dice = Dice::new(seed);
    let source = Arc::new(Careless {
        bytes: layer.blob.clone(),
        dice: Arc::clone(&dice),
        odds,
        served: Arc::default(),
        requests: AtomicUsize::new(0),
    });
    let dir = tempfile::tempdir().unwrap();
    let wire = Wire::open(
        WireOptions {
            dir: dir.path().to_owned(),
            identity: layer.digest(),
            name: "test/image layer 1".to_owned(),
        },
        Arc::clone(&source) as Arc<dyn RangeSource>,
        scheduler(),
    )
    .unwrap();
    let cache = CacheOptions {
        // Small requests: several at once, next to and across each other.
        plan: PlanOptions {
            grid_bytes: 4096,
            window_bytes: Some(32 << 10),
            gap_bytes: 0,
        },
        readahead: false,
        ..options()
    };
    let blob = LayerBlob::open(wire, Arc::clone(&layer.map), cache).unwrap();
    blob.set_hydration_mode(Mode::Off);
    if prefetch {
        blob.prefetch(RemoteOffset(dice.below(layer.blob.len() as u64)));
    }
    let readers = 2 + dice.below(9);
    let tasks: Vec<_> = (0..readers)
        .map(|_| {
            let at = dice.below(blob.len());
            let len = dice.below(60_000).min(blob.len() - at);
            let (blob, dice) = (Arc::clone(&blob), Arc::clone(&dice));
            tokio::spawn(async move {
                for _ in 0..dice.below(16) {
                    dice.dither().await;
                }
                (
                    at,
                    len,
                    read(&blob, at, usize::try_from(len).unwrap()).await,
                )
            })
        })
        .collect();
    for task in tasks {
        // Only to say more than a test runner does when it gives up.
        let Ok(ended) = tokio::time::timeout(Duration::from_secs(20), task).await else {
            return Err(format!(
                "seed {seed}: a reader is stuck: {:?} {:?}",
                blob.status(),
                blob.wire()
            ));
        };
        let (at, len, outcome) = ended.map_err(|e| e.to_string())?;
        match outcome {
            Ok(bytes) if bytes == layer.expected(at..at + len) => {}
            Ok(_) => return Err(format!("seed {seed}: wrong bytes at {at}+{len}")),
            // A body that breaks off or lies more often than is retried.
            Err(_) if odds.breaks + odds.flips > 0 => {}
            Err(error) => return Err(format!("seed {seed}: {at}+{len}: {error}")),
        }
    }
    let requests = source.requests.load(Ordering::SeqCst);
    Ok((
        requests,
        source.served.load(Ordering::SeqCst),
        layer.blob.len() as u64,
    ))
}

async fn many(cases: u64, odds: Odds) -> (u64, u64) {
    let (mut served, mut len) = (0, 0);
    for seed in 0..cases {
        match run(seed, odds, seed % 3 == 2).await {
            Ok((_, bytes, blob)) => {
                served += bytes;
                len += blob;
            }
            Err(what) => panic!("{what}"),
        }
    }
    (served, len)
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_source_that_ignores_ranges_are_never_stuck() {
    let odds = Odds {
        whole: 100,
        breaks: 0,
        flips: 0,
    };
    let (served, len) = many(300, odds).await;
    // Fetches that began before the first answer showed what the source does cost their beginning;
    // nobody starts the blob again.
    assert!(served < 2 * len, "{served} bytes served of {len}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_of_one_that_ignores_them_now_and_then_or_breaks_off_or_lies() {
    for odds in [
        Odds {
            whole: 50,
            breaks: 0,
            flips: 0,
        },
        Odds {
            whole: 60,
            breaks: 40,
            flips: 0,
        },
        Odds {
            whole: 60,
            breaks: 20,
            flips: 30,
        },
    ] {
        many(100, odds).await;
    }
}
