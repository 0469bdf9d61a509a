//! A program that reads and says what it saw, as one JSON line.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::process::{Signal, getpid, kill_process};
use serde_json::json;

use crate::{Args, Outcome, pattern, sys};

/// Options: `--path`, `--node` (whose pattern is expected; none for no check), `--base` (where the
/// file lies in its node), `--offset`, `--len`, `--block`, `--random` (number of blocks),
/// `--until` (repeat until that file exists), `--threads`, `--stride` (each thread reads one block,
/// that far from the one before), `--mmap 1` (by page faults), `--signal-us` (a SIGURG every so
/// often, with a handler, as Go's runtime does it).
pub(crate) fn run(args: &Args) -> Outcome {
    let job = Arc::new(Job {
        path: args.path("--path")?,
        node: args.text("--node").map(str::parse).transpose()?,
        base: args.number("--base", 0)?,
        offset: args.number("--offset", 0)?,
        len: args.number("--len", u64::MAX)?,
        block: usize::try_from(args.number("--block", 128 << 10)?)?,
        random: args.number("--random", 0)?,
        stride: args.number("--stride", 0)?,
        mapped: args.number("--mmap", 0)? == 1,
        until: args.text("--until").map(PathBuf::from),
        seen: Seen::default(),
    });
    let signal_us = args.number("--signal-us", 0)?;
    // A process' signal goes to its main thread, which therefore reads too.
    let _handler = (signal_us > 0)
        .then(|| signal_storm(signal_us))
        .transpose()?;
    let started = Instant::now();
    let threads: Vec<_> = (1..args.number("--threads", 1)?)
        .map(|seed| {
            let job = Arc::clone(&job);
            thread::spawn(move || job.work(seed))
        })
        .collect();
    job.work(0);
    for thread in threads {
        let _ = thread.join();
    }
    let seen = &job.seen;
    let errors = seen.errors.lock();
    println!(
        "{}",
        json!({
            "bytes": seen.bytes.load(Ordering::Relaxed),
            "reads": seen.reads.load(Ordering::Relaxed),
            "longest_us": seen.longest_us.load(Ordering::Relaxed),
            "median_us": seen.median_us(),
            "elapsed_us": micros(started.elapsed()),
            "errors": *errors,
            "wrong": *seen.wrong.lock(),
        })
    );
    Ok(())
}

struct Job {
    path: PathBuf,
    node: Option<u64>,
    base: u64,
    offset: u64,
    len: u64,
    block: usize,
    random: u64,
    stride: u64,
    mapped: bool,
    until: Option<PathBuf>,
    seen: Seen,
}

#[derive(Default)]
struct Seen {
    bytes: AtomicU64,
    reads: AtomicU64,
    longest_us: AtomicU64,
    sample_us: Mutex<Vec<u64>>,
    errors: Mutex<Vec<String>>,
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    fn median_us(&self) -> u64 {
        let mut sample = self.sample_us.lock();
        sample.sort_unstable();
        sample.get(sample.len() / 2).copied().unwrap_or(0)
    }
}

impl Job {
    fn work(&self, seed: u64) {
        let mut buffer = vec![0; self.block];
        loop {
            let outcome = File::open(&self.path).and_then(|file| {
                drop_cache(&file);
                if self.mapped {
                    self.by_faults(&file)
                } else if self.stride > 0 {
                    self.read(&file, &mut buffer, seed * self.stride).map(drop)
                } else if self.random > 0 {
                    self.random_blocks(&file, &mut buffer, seed)
                } else {
                    self.in_order(&file, &mut buffer)
                }
            });
            if let Err(e) = outcome {
                self.seen.errors.lock().push(format!("{e}"));
                return;
            }
            if self.until.as_ref().is_none_or(|path| path.exists()) {
                return;
            }
        }
    }

    fn in_order(&self, file: &File, buffer: &mut [u8]) -> io::Result<()> {
        let end = self.offset.saturating_add(self.len);
        let mut at = self.offset;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(usize::MAX);
            let want = want.min(buffer.len());
            let n = self.read(file, &mut buffer[..want], at)?;
            if n == 0 {
                break;
            }
            at += n as u64;
        }
        Ok(())
    }

    fn random_blocks(&self, file: &File, buffer: &mut [u8], seed: u64) -> io::Result<()> {
        let block = self.block as u64;
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        for _ in 0..self.random {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let index = (state >> 33) % (self.len / block).max(1);
            self.read(file, buffer, self.offset + index * block)?;
        }
        Ok(())
    }

    fn by_faults(&self, file: &File) -> io::Result<()> {
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let bytes = sys::read_mapped(file, len)?;
        self.seen.bytes.fetch_add(len as u64, Ordering::Relaxed);
        self.check(0, &bytes);
        Ok(())
    }

    fn read(&self, file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let started = Instant::now();
        let n = loop {
            match file.read_at(buffer, at) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let took = micros(started.elapsed());
        let seen = &self.seen;
        let reads = seen.reads.fetch_add(1, Ordering::Relaxed);
        seen.bytes.fetch_add(n as u64, Ordering::Relaxed);
        seen.longest_us.fetch_max(took, Ordering::Relaxed);
        if reads.is_multiple_of(16) {
            seen.sample_us.lock().push(took);
        }
        self.check(at, &buffer[..n]);
        Ok(n)
    }

    fn check(&self, at: u64, bytes: &[u8]) {
        if let Some(node) = self.node
            && let Some(first) = pattern::mismatch(node, self.base + at, bytes)
        {
            let (n, zeros) = (bytes.len(), bytes.iter().all(|byte| *byte == 0));
            self.seen.wrong.lock().push(format!(
                "byte {first} of a read of {n} at {at}; all zeros: {zeros}"
            ));
        }
    }
}

/// Handles SIGURG (with SA_RESTART, as tokio and Go install it) and sends it without end.
fn signal_storm(every_us: u64) -> io::Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::from_raw(Signal::URG.as_raw());
        tokio::signal::unix::signal(kind).map(drop)
    })?;
    thread::spawn(move || {
        loop {
            let _ = kill_process(getpid(), Signal::URG);
            thread::sleep(Duration::from_micros(every_us));
        }
    });
    Ok(runtime)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn drop_cache(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}
