//! Isolation: what readers of one image notice of thousands of reads that are stuck in another
//! image, whose registry accepts requests and never answers.
//!
//! One daemon serves two lazy images of two registries. In each round a reader of image B is timed
//! alone, then beside the stuck reads of image A, then alone again; the two times alone tell how
//! far the machine's noise goes. In between the registry of A answers, and every stuck read has to
//! return exactly its bytes. The threads of the stuck reads exist, asleep, while B is timed alone
//! too: what differs are their reads.
//!
//! All reading through the daemon's mounts happens in child processes with a time limit.

mod content;
mod figures;
mod images;
mod reader;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use harness::workdir::Workdir;
use lab::{Lab, LabOptions, LinkModel};
use serde::Serialize;
use serde_json::Value;

use crate::{
    client,
    node::{Node, load},
};
use figures::Samples;
use images::{LOCAL_FILE, Pushed, REMOTE_FILE, REMOTE_STEP, Round};
use reader::{Measured, Outcome, Plan, Reader, Task, Warmed};

pub use figures::{Held, Row};
pub use reader::run_from_stdin;

/// What the daemon runs with.
const CONFIG: &str = "[containerd]\naddress = \"\"\n[lazy]\nhydration = \"off\"\n";
/// A registry that is silent for this long is given up by the daemon, and reads fail.
const PATIENCE: Duration = Duration::from_secs(14);
/// Lets what the last step set in motion end.
const SETTLE: Duration = Duration::from_millis(500);
/// Threads of the daemon without work end after ten seconds.
const IDLE: Duration = Duration::from_secs(11);
/// What a cache and the allocator may keep, beyond what they kept after the first round.
const KEPT_BYTES: u64 = 16 << 20;
const KEPT_THREADS: u64 = 4;
const KEPT_DESCRIPTORS: u64 = 4;
const READER_LIMIT: Duration = Duration::from_secs(90);

/// How much to measure.
#[derive(Clone, Debug)]
pub struct IsolationOptions {
    /// Where temporary files go.
    pub scratch: PathBuf,
    /// Rounds.
    pub rounds: usize,
    /// Reads that are stuck at the same time.
    pub stuck: u64,
    /// Timed reads of local content, three times a round.
    pub local_reads: usize,
    /// Timed reads that ask the registry, three times a round.
    pub remote_reads: usize,
    /// Size of the local file in MB.
    pub megabytes: u64,
    /// The line to the registry of image B.
    pub link: LinkModel,
    /// Becomes true when the user wants an end.
    pub stop: Arc<AtomicBool>,
}

/// Everything measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Local and remote reads of image B.
    pub rows: Vec<Row>,
    /// Reads stuck, in the daemon's own words: the fewest over the rounds.
    pub stuck: u64,
    /// Longest time for which they were, in seconds.
    pub stuck_seconds: f64,
    /// Reads of image A that returned the right bytes after all.
    pub right: u64,
    /// The daemon before the first round, idle.
    pub before: Held,
    /// While reads are stuck: the most over the rounds.
    pub during: Held,
    /// After the first round.
    pub after_first: Held,
    /// After the last round, idle.
    pub after: Held,
    /// What it should have given back by then and has not.
    pub kept: Vec<String>,
    /// The machine's load average (1 minute) at the start and at the end.
    pub load: (f64, f64),
    /// CPUs of the machine.
    pub cpus: usize,
}

/// Measures. `say` is told what is being done.
pub fn run(options: &IsolationOptions, say: &dyn Fn(&str)) -> Result<Report> {
    let loaded = load();
    let work = Workdir::below(&options.scratch);
    let stalling = Lab::start_blocking(LabOptions::new(work.sub("registry-a")))?;
    let answering = Lab::start_blocking(LabOptions::new(work.sub("registry-b")))?;
    say("packing and pushing two images");
    let rounds = images::rounds(options.rounds, options.stuck);
    let a = images::push_stalling(&work, &stalling, &rounds)?;
    options.check()?;
    let local_blocks = (options.megabytes << 20) / content::BLOCK;
    ensure!(
        options.local_reads as u64 <= local_blocks,
        "the local file has only {local_blocks} blocks to read"
    );
    let remote_steps = (options.rounds * 3 * options.remote_reads) as u64;
    let b = images::push_measured(
        &work,
        &answering,
        local_blocks * content::BLOCK,
        remote_steps * REMOTE_STEP,
    )?;
    options.check()?;

    // Nothing of this is written to disk while reads are timed.
    rustix::fs::syncfs(std::fs::File::open(work.path())?)?;
    // Before the first connection: one keeps the line it began on.
    answering.set_link(Some(options.link));
    let mut node = Node::start(&work.sub("d"), &work.sub("pull"), CONFIG)?;
    let bench = Bench {
        options,
        work: &work,
        node: &node,
        stalling: &stalling,
        answering: &answering,
        a_key: node.container(&a.reference, "a")?,
        b_key: node.container(&b.reference, "b")?,
        a: &a,
        local: content::shuffled(local_blocks, 1),
        remote: content::shuffled(remote_steps, 2),
    };
    let report = bench.all(&rounds, loaded, say);
    if report.is_err() && options.check().is_ok() {
        eprintln!(
            "--- end of the daemon's log ---\n{}",
            harness::daemon::tail(&node.log_path())
        );
    }
    let report = report?;
    node.unmount()?;
    Ok(report)
}

impl IsolationOptions {
    fn check(&self) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}

struct Bench<'a> {
    options: &'a IsolationOptions,
    work: &'a Workdir,
    node: &'a Node,
    stalling: &'a Lab,
    answering: &'a Lab,
    a: &'a Pushed,
    a_key: String,
    b_key: String,
    /// Blocks of the local file and steps of the remote one, in the order in which they are read.
    local: Vec<u64>,
    remote: Vec<u64>,
}

/// How a round went, beside the latencies.
struct Stuck {
    readers: u64,
    seconds: f64,
    right: u64,
    held: Held,
}

impl Bench<'_> {
    fn all(&self, rounds: &[Round], loaded: f64, say: &dyn Fn(&str)) -> Result<Report> {
        say("reading the local file of image B once");
        let len = self.local.len() as u64 * content::BLOCK;
        let warm = self.plan(
            &self.b_key,
            "b",
            Task::Warm {
                file: LOCAL_FILE.to_owned(),
                len,
            },
        )?;
        let warmed: Warmed = Reader::run(&warm, self.work.path(), READER_LIMIT)?;
        ensure!(warmed.bytes == len, "only {} bytes are local", warmed.bytes);
        // Not counted: the first one finds nothing ready.
        self.measure(0, self.options.local_reads.min(100), 0)?;
        let before = self.idle()?;

        let (mut local, mut remote) = (Samples::default(), Samples::default());
        let mut stuck: Vec<Stuck> = Vec::new();
        let mut after = Vec::new();
        for (number, round) in rounds.iter().enumerate() {
            say(&format!("round {} of {}", number + 1, rounds.len()));
            let (timed, how) = self.round(number, round)?;
            say(&format!(
                "  {} reads were stuck for {:.1} s; daemon: {}",
                how.readers, how.seconds, how.held
            ));
            stuck.push(how);
            for (when, measured) in ["alone", "beside", "alone"].iter().zip(&timed) {
                say(&format!("  {when}: {measured}"));
            }
            let [first, beside, second] = timed;
            local.push(first.local, beside.local, second.local);
            remote.push(first.remote, beside.remote, second.remote);
            after.push(self.held()?);
        }
        let most = stuck.iter().map(|how| how.held);
        let after_first = after.first().copied().unwrap_or_default();
        let after = self.idle()?;
        Ok(Report {
            rows: vec![local.row("local", 1.2), remote.row("remote", 1.2)],
            stuck: stuck.iter().map(|how| how.readers).min().unwrap_or(0),
            stuck_seconds: stuck.iter().map(|how| how.seconds).fold(0.0, f64::max),
            right: stuck.iter().map(|how| how.right).sum(),
            before,
            during: most.reduce(Held::max).unwrap_or_default(),
            after_first,
            after,
            kept: self.kept(&before, &after_first, &after),
            load: (loaded, load()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        })
    }

    /// Measures alone, while the files of this round are waited for, and when they have been read.
    /// The threads that read them are there all the time.
    fn round(&self, number: usize, round: &Round) -> Result<([Measured; 3], Stuck)> {
        let wanted = round.files.len() as u64;
        let files = round.files.clone();
        let plan = self.plan(&self.a_key, "a", Task::Block { files })?;
        let mut readers = Reader::start(&plan, self.work.path(), READER_LIMIT)?;
        self.wait("threads to start", &mut readers, |readers| {
            Ok(readers.threads()? > round.files.len())
        })?;
        settle();
        let first = self.timed(number * 3)?;

        let digests = &self.a.layers[round.layers.clone()];
        let rules: Vec<_> = digests.iter().map(|d| self.stalling.stall(*d)).collect();
        let began = Instant::now();
        readers.tell("read")?;
        self.wait("reads to get stuck", &mut readers, |_| {
            Ok(self.waiting()? >= wanted)
        })?;
        settle();
        let beside = self.timed(number * 3 + 1)?;
        let held = self.held()?;
        let stuck = self.waiting()?;
        ensure!(
            stuck == wanted,
            "{} of {wanted} reads ended while their registry was silent",
            wanted.saturating_sub(stuck)
        );
        let seconds = began.elapsed().as_secs_f64();
        for rule in rules {
            self.stalling.release(rule);
        }
        self.wait("reads to return", &mut readers, |readers| {
            Ok(readers.said::<Outcome>().is_some())
        })?;
        ensure!(self.waiting()? == 0, "somebody still waits");
        settle();
        let second = self.timed(number * 3 + 2)?;

        let outcome: Outcome = readers.finish()?;
        if let Some(wrong) = outcome.wrong.first() {
            bail!(
                "{} of {wanted} reads failed, the first: {wrong}",
                outcome.wrong.len()
            );
        }
        ensure!(outcome.right == wanted, "a reader said nothing");
        let how = Stuck {
            readers: stuck,
            seconds,
            right: outcome.right,
            held,
        };
        Ok(([first, beside, second], how))
    }

    fn wait(
        &self,
        what: &str,
        readers: &mut Reader,
        mut done: impl FnMut(&Reader) -> Result<bool>,
    ) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !done(readers)? {
            self.options.check()?;
            ensure!(readers.is_running()?, "the readers ended too soon");
            ensure!(
                Instant::now() < until,
                "waited {PATIENCE:?} for {what}; {} reads wait",
                self.waiting()?
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// The `nth` measurement. Every one gets steps of the remote file that no other one has.
    fn timed(&self, nth: usize) -> Result<Measured> {
        self.options.check()?;
        let (local, remote) = (self.options.local_reads, self.options.remote_reads);
        let mark = self.answering.log().mark();
        let calls = self.node.read_calls()?;
        let measured = self.measure(nth, local, remote)?;
        let calls = self.node.read_calls()?.saturating_sub(calls);
        ensure!(
            calls >= local as u64,
            "the daemon made {calls} read calls for {local} local reads: they never reached it"
        );
        let asked = self.answering.log().entries_since(&mark).len();
        ensure!(
            asked * 100 >= remote * 98,
            "the registry was asked {asked} times for {remote} reads: some were local"
        );
        Ok(measured)
    }

    fn measure(&self, nth: usize, local: usize, remote: usize) -> Result<Measured> {
        let blocks = self.local.iter().cycle().skip(nth * local).take(local);
        let steps = self.remote.iter().skip(nth * remote).take(remote);
        let task = Task::Measure {
            local: (
                LOCAL_FILE.to_owned(),
                blocks.map(|block| block * content::BLOCK).collect(),
            ),
            remote: (
                REMOTE_FILE.to_owned(),
                steps.map(|step| step * REMOTE_STEP).collect(),
            ),
        };
        let plan = self.plan(&self.b_key, "b", task)?;
        Reader::run(&plan, self.work.path(), READER_LIMIT)
    }

    fn plan(&self, key: &str, name: &str, task: Task) -> Result<Plan> {
        Ok(Plan {
            mounts: self.node.mounts(key)?,
            root: self.work.sub("m").join(name),
            task,
        })
    }

    /// Reads that wait for bytes, as the daemon counts them.
    fn waiting(&self) -> Result<u64> {
        let layers = client::layers(&self.node.admin())?;
        let counts = layers
            .iter()
            .filter_map(|layer| layer.pointer("/cache/waiting_readers"));
        Ok(counts.filter_map(Value::as_u64).sum())
    }

    fn held(&self) -> Result<Held> {
        let [a, b] = [self.stalling, self.answering].map(|lab| lab.addr().port());
        Held::of(self.node.pid(), a, b).context("looking at the daemon")
    }

    /// The daemon once it has given back what it needed only for a while.
    fn idle(&self) -> Result<Held> {
        let until = Instant::now() + IDLE;
        while Instant::now() < until {
            self.options.check()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        self.held()
    }

    /// What the daemon should have given back and has not.
    fn kept(&self, before: &Held, after_first: &Held, after: &Held) -> Vec<String> {
        // Each layer that was read has its data file open.
        let files = self.a.layers.len() as u64;
        let kept = [
            ("threads", after.threads, before.threads + KEPT_THREADS),
            (
                "descriptors",
                after.descriptors,
                before.descriptors + files + KEPT_DESCRIPTORS,
            ),
            (
                "bytes of anonymous memory",
                after.anonymous_bytes,
                after_first.anonymous_bytes + KEPT_BYTES,
            ),
        ];
        let over = kept.into_iter().filter(|(_, has, most)| has > most);
        over.map(|(what, has, most)| format!("{has} {what}, at most {most} expected"))
            .collect()
    }
}

fn settle() {
    std::thread::sleep(SETTLE);
}
