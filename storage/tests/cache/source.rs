//! A source in memory that logs what it is asked for and can be told to misbehave.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use storage::{
    ranges::{FetchError, FetchFailure, Meter, RangeBody, RangeSource},
    source::{BoxFuture, Cause},
};
use tokio::sync::watch;

/// What one fetch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// What was asked for.
    Serve,
    /// Breaks off after that many bytes.
    Truncate(u64),
    /// Flips a bit of the byte at this blob offset, if it is in the range.
    Flip(u64),
    /// Other bytes altogether.
    Garbage,
    /// The whole blob, as a server does that ignores ranges.
    Whole,
    /// An error instead of a body.
    Refuse,
}

#[derive(Debug)]
pub(crate) struct Scripted {
    bytes: Bytes,
    piece: usize,
    log: Mutex<Vec<(Range<u64>, Cause)>>,
    script: Mutex<VecDeque<Act>>,
    always: Mutex<Act>,
    /// How many body pieces all fetches together may still deliver.
    open: watch::Sender<u64>,
    delivered: Arc<AtomicU64>,
    served: Arc<AtomicU64>,
}

impl Scripted {
    pub(crate) fn new(bytes: Bytes) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            piece: 9_999,
            log: Mutex::default(),
            script: Mutex::default(),
            always: Mutex::new(Act::Serve),
            open: watch::Sender::new(u64::MAX),
            delivered: Arc::default(),
            served: Arc::default(),
        })
    }

    /// The next fetches do this, in this order.
    pub(crate) fn script(&self, acts: impl IntoIterator<Item = Act>) {
        self.script.lock().extend(acts);
    }

    /// Every fetch without a script does this.
    pub(crate) fn always(&self, act: Act) {
        *self.always.lock() = act;
    }

    /// From now on no body delivers anything.
    pub(crate) fn stall(&self) {
        let delivered = self.delivered.load(Ordering::SeqCst);
        self.open.send_replace(delivered);
    }

    /// Bodies deliver `pieces` more pieces.
    pub(crate) fn let_through(&self, pieces: u64) {
        self.open.send_modify(|open| *open += pieces);
    }

    /// Whether all pieces that may be delivered have been.
    pub(crate) fn is_used_up(&self) -> bool {
        self.delivered.load(Ordering::SeqCst) >= *self.open.borrow()
    }

    pub(crate) fn resume(&self) {
        self.open.send_replace(u64::MAX);
    }

    pub(crate) fn log(&self) -> Vec<(Range<u64>, Cause)> {
        self.log.lock().clone()
    }

    pub(crate) fn requests(&self) -> usize {
        self.log.lock().len()
    }

    /// Body bytes delivered.
    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }

    fn slice(&self, range: &Range<u64>) -> Bytes {
        self.bytes
            .slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap())
    }
}

/// The source as the cache sees it.
#[derive(Clone, Debug)]
pub(crate) struct Handle(pub(crate) Arc<Scripted>);

impl RangeSource for Handle {
    fn len(&self) -> u64 {
        self.0.bytes.len() as u64
    }

    fn origin(&self) -> String {
        "memory:layer".to_owned()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        let source = Arc::clone(&self.0);
        source.log.lock().push((range.clone(), cause));
        let act = source
            .script
            .lock()
            .pop_front()
            .unwrap_or(*source.always.lock());
        Box::pin(async move {
            let origin = "memory:layer".to_owned();
            let error = |what: &str| FetchError::Source {
                origin: "memory:layer".to_owned(),
                range: range.clone(),
                failure: FetchFailure::Unreachable,
                source: Arc::new(io::Error::other(what.to_owned())),
            };
            let mut served = range.clone();
            let mut body = source.slice(&range).to_vec();
            let mut broken = None;
            match act {
                Act::Serve => {}
                Act::Truncate(n) => {
                    body.truncate(usize::try_from(n).unwrap());
                    broken = Some(error("connection reset"));
                }
                Act::Flip(at) => {
                    if range.contains(&at) {
                        body[usize::try_from(at - range.start).unwrap()] ^= 0x10;
                    }
                }
                Act::Garbage => body.fill(0xA5),
                Act::Whole => {
                    served = 0..source.bytes.len() as u64;
                    body = source.bytes.to_vec();
                }
                Act::Refuse => return Err(error("refused")),
            }
            let meter = Arc::new(Meter::default());
            meter.add_request();
            let body = Bytes::from(body);
            let pieces: VecDeque<Result<Bytes, FetchError>> = (0..body.len())
                .step_by(source.piece)
                .map(|at| Ok(body.slice(at..body.len().min(at + source.piece))))
                .chain(broken.map(Err))
                .collect();
            let state = (pieces, Arc::clone(&source), Arc::clone(&meter));
            let chunks = stream::unfold(state, |(mut pieces, source, meter)| async move {
                let piece = pieces.pop_front()?;
                let mut open = source.open.subscribe();
                let turn = source.delivered.clone();
                open.wait_for(|open| {
                    let take = |done| (done < *open).then_some(done + 1);
                    turn.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
                        .is_ok()
                })
                .await
                .ok()?;
                // As a network does: the receiver gets to work between pieces.
                tokio::task::yield_now().await;
                if let Ok(piece) = &piece {
                    meter.add_bytes(piece.len() as u64);
                    source
                        .served
                        .fetch_add(piece.len() as u64, Ordering::SeqCst);
                }
                Some((piece, (pieces, source, meter)))
            });
            Ok(RangeBody::new(origin, served, meter, chunks.boxed()))
        })
    }
}
