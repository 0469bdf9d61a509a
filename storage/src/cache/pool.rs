//! The threads that inflate and verify: bounded, never waiting for the network, most urgent first.

use std::{collections::VecDeque, fmt};

use libdeflater::Decompressor;
use parking_lot::Mutex;
use tokio::runtime::Handle;

/// Extra workers that only readers' jobs may use, so that a reader never queues behind two large
/// background chunks.
const RESERVED: usize = 2;

/// What a worker keeps between jobs. Buffers hold leftovers and never shrink within a job.
pub(crate) struct Scratch {
    pub(crate) compressed: Vec<u8>,
    pub(crate) decoded: Vec<u8>,
    pub(crate) piece: Vec<u8>,
    pub(crate) decompressor: Decompressor,
}

/// The buffers that decoding writes to.
pub(crate) struct Outputs<'a> {
    pub(crate) decoded: &'a mut Vec<u8>,
    pub(crate) piece: &'a mut Vec<u8>,
    pub(crate) decompressor: &'a mut Decompressor,
}

impl Scratch {
    pub(crate) fn outputs(&mut self) -> Outputs<'_> {
        Outputs {
            decoded: &mut self.decoded,
            piece: &mut self.piece,
            decompressor: &mut self.decompressor,
        }
    }

    const KEEP: usize = 8 << 20;

    fn new() -> Self {
        Self {
            compressed: Vec::new(),
            decoded: Vec::new(),
            piece: Vec::new(),
            decompressor: Decompressor::new(),
        }
    }

    fn trim(&mut self) {
        for buf in [&mut self.compressed, &mut self.decoded, &mut self.piece] {
            if buf.len() > Self::KEEP {
                *buf = Vec::new();
            }
        }
    }
}

/// The first `len` bytes of a buffer that only grows: what is there is not zeroed again.
pub(crate) fn room(buf: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buf.len() < len {
        buf.resize(len, 0);
    }
    &mut buf[..len]
}

/// How urgent a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// A reader waits.
    Reader = 0,
    /// A start list names it.
    Soon = 1,
    /// It came along.
    Spare = 2,
}

type Job = Box<dyn FnOnce(&mut Scratch) + Send>;

struct Queues {
    jobs: [VecDeque<Job>; 3],
    running: usize,
}

impl Queues {
    fn next(&mut self, workers: usize) -> Option<Job> {
        let lowest = if self.running > workers { 1 } else { 3 };
        self.jobs[..lowest].iter_mut().find_map(VecDeque::pop_front)
    }
}

pub(crate) struct Pool {
    runtime: Handle,
    workers: usize,
    queues: Mutex<Queues>,
}

impl Pool {
    pub(crate) fn new(runtime: Handle, workers: usize) -> Self {
        Self {
            runtime,
            workers: workers.max(1),
            queues: Mutex::new(Queues {
                jobs: Default::default(),
                running: 0,
            }),
        }
    }

    /// Queues a job; it runs on a blocking thread of the runtime. Jobs must not panic.
    pub(crate) fn submit(
        self: &std::sync::Arc<Self>,
        urgency: Urgency,
        job: impl FnOnce(&mut Scratch) + Send + 'static,
    ) {
        let mut queues = self.queues.lock();
        queues.jobs[urgency as usize].push_back(Box::new(job));
        let limit = match urgency {
            Urgency::Reader => self.workers + RESERVED,
            Urgency::Soon | Urgency::Spare => self.workers,
        };
        if queues.running < limit {
            queues.running += 1;
            drop(queues);
            let pool = std::sync::Arc::clone(self);
            self.runtime.spawn_blocking(move || pool.work());
        }
    }

    /// Jobs not yet begun.
    pub(crate) fn queued(&self) -> usize {
        self.queues.lock().jobs.iter().map(VecDeque::len).sum()
    }

    fn work(&self) {
        let mut scratch = Scratch::new();
        loop {
            let job = {
                let mut queues = self.queues.lock();
                let Some(job) = queues.next(self.workers) else {
                    queues.running -= 1;
                    return;
                };
                job
            };
            job(&mut scratch);
            scratch.trim();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("workers", &self.workers)
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}
