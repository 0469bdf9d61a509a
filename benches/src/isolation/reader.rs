//! The child processes that mount privately and read. They die with the benchmark and at the end
//! of their time, whatever they wait for.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, OnceLock, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use core_runtime::runner::{Mount, mount_privately};
use rustix::{
    fs::{Advice, fadvise},
    process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    content::{self, BLOCK, BLOCK_LEN},
    figures::percentile,
    images::Waited,
};

/// Of each of the thousands of threads; what they need is a buffer on the heap.
const STACK_BYTES: usize = 64 << 10;

/// What a child does.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) mounts: Vec<Mount>,
    pub(super) root: PathBuf,
    pub(super) task: Task,
}

/// With the files below the root.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Reads and checks all of a file: [`Warmed`].
    Warm { file: String, len: u64 },
    /// Measures one read after the other: [`Measured`].
    Measure {
        /// Offsets in a file that is local.
        local: (String, Vec<u64>),
        /// Offsets in a file that is not.
        remote: (String, Vec<u64>),
    },
    /// Reads each file in a thread of its own once it is told to: [`Outcome`].
    Block { files: Vec<Waited> },
}

/// How much was read.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Warmed {
    pub(super) bytes: u64,
}

/// Seconds, read by read. Every byte was right.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) local: Vec<f64>,
    pub(super) remote: Vec<f64>,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |seconds: &[f64], percent| percentile(seconds, percent) * 1e3;
        write!(
            f,
            "local p50 {:.3} p99 {:.3} max {:.3} ms, remote p50 {:.3} p99 {:.3} max {:.3} ms",
            ms(&self.local, 50),
            ms(&self.local, 99),
            ms(&self.local, 100),
            ms(&self.remote, 50),
            ms(&self.remote, 99),
            ms(&self.remote, 100),
        )
    }
}

/// What the threads got.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Reads that returned exactly the file.
    pub(super) right: u64,
    /// The others.
    pub(super) wrong: Vec<String>,
}

/// A running child; killed when dropped.
#[derive(Debug)]
pub(super) struct Reader {
    child: Child,
    stdin: Option<ChildStdin>,
    output: PathBuf,
    until: Instant,
}

impl Reader {
    /// Starts it. What it says goes to a file below `scratch`; it is killed after `limit`.
    pub(super) fn start(plan: &Plan, scratch: &Path, limit: Duration) -> Result<Self> {
        std::fs::create_dir_all(&plan.root)?;
        let output = scratch.join(format!("{}.json", plan.task.name()));
        let mut child = Command::new(std::env::current_exe()?)
            .arg("reader")
            .stdin(Stdio::piped())
            .stdout(File::create(&output)?)
            .spawn()
            .context("starting a reader")?;
        let stdin = child.stdin.take();
        let mut reader = Self {
            child,
            stdin,
            output,
            until: Instant::now() + limit,
        };
        reader.tell(&serde_json::to_string(plan)?)?;
        Ok(reader)
    }

    /// Runs it to its end.
    pub(super) fn run<T: DeserializeOwned>(
        plan: &Plan,
        scratch: &Path,
        limit: Duration,
    ) -> Result<T> {
        Self::start(plan, scratch, limit)?.finish()
    }

    /// Sends it a line.
    pub(super) fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the reader's input")?;
        Ok(writeln!(stdin, "{line}")?)
    }

    /// Its threads.
    pub(super) fn threads(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/task", self.child.id()))?.count())
    }

    /// What it has said, once it has.
    pub(super) fn said<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&std::fs::read(&self.output).ok()?).ok()
    }

    /// Waits for its end.
    pub(super) fn finish<T: DeserializeOwned>(mut self) -> Result<T> {
        drop(self.stdin.take());
        while self.is_running()? {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.said().context("a reader said nothing")
    }

    /// Whether it still reads. Fails when it has failed, or when its time is over.
    pub(super) fn is_running(&mut self) -> Result<bool> {
        match self.child.try_wait()? {
            Some(status) if status.success() => Ok(false),
            Some(status) => bail!("a reader failed: {status}"),
            None if Instant::now() > self.until => bail!("a reader did not end in its time"),
            None => Ok(true),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Task {
    fn name(&self) -> &'static str {
        match self {
            Self::Warm { .. } => "warm",
            Self::Measure { .. } => "measure",
            Self::Block { .. } => "block",
        }
    }
}

/// The child: takes its plan from standard input, says on standard output what came of it.
pub fn run_from_stdin() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut input = io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    let plan: Plan = serde_json::from_str(&line)?;
    mount_privately(&plan.mounts, &plan.root)?;
    match plan.task {
        Task::Warm { file, len } => say(&warm(&plan.root, &file, len)?),
        Task::Measure { local, remote } => {
            let local = measure(&plan.root, &local.0, &local.1)?;
            let remote = measure(&plan.root, &remote.0, &remote.1)?;
            say(&Measured { local, remote })
        }
        Task::Block { files } => block(&plan.root, files, input),
    }
}

fn say(what: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.flush()?;
    Ok(())
}

fn warm(root: &Path, name: &str, len: u64) -> Result<Warmed> {
    let file = open(root, name)?;
    for index in 0..len / BLOCK {
        let mut buffer = [0; BLOCK_LEN];
        file.read_exact_at(&mut buffer, index * BLOCK)?;
        ensure!(
            buffer[..] == content::block(name, index),
            "{name}: block {index} is wrong"
        );
    }
    Ok(Warmed {
        bytes: len / BLOCK * BLOCK,
    })
}

/// Times reads of single blocks that the page cache does not have.
fn measure(root: &Path, name: &str, offsets: &[u64]) -> Result<Vec<f64>> {
    let file = open(root, name)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    fadvise(&file, 0, None, Advice::Random)?;
    let mut seconds = Vec::with_capacity(offsets.len());
    for &offset in offsets {
        let mut buffer = [0; BLOCK_LEN];
        let began = Instant::now();
        file.read_exact_at(&mut buffer, offset)
            .with_context(|| format!("{name} at {offset}"))?;
        seconds.push(began.elapsed().as_secs_f64());
        ensure!(
            buffer[..] == content::block(name, offset / BLOCK),
            "{name} at {offset}: wrong bytes"
        );
    }
    Ok(seconds)
}

/// The threads sleep until a line comes, read, and sleep again until standard input ends: they are
/// there all the time, so that what is measured beside them differs by their reads alone.
fn block(root: &Path, files: Vec<Waited>, mut orders: impl BufRead) -> Result<()> {
    allow_open_files(files.len() as u64 + 64)?;
    let count = files.len();
    let opened = files
        .into_iter()
        .map(|file| Ok((open(root, &file.path)?, file)))
        .collect::<Result<Vec<_>>>()?;
    let (go, end) = (Arc::new(OnceLock::<bool>::new()), Arc::new(OnceLock::new()));
    let (report, results) = mpsc::channel();
    let mut threads = Vec::with_capacity(count);
    let mut failed = None;
    for (file, waited) in opened {
        let (go, end) = (Arc::clone(&go), Arc::clone(&end));
        let report = report.clone();
        let read = move || {
            // All of them, or none.
            if *go.wait() {
                let checked = check(&file, &waited);
                let _ = report.send(checked.map_err(|e| format!("{}: {e:#}", waited.path)));
                end.wait();
            }
        };
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        match thread.spawn(read) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                let started = threads.len();
                failed = Some(anyhow::Error::from(error).context(format!(
                    "only {started} of {count} threads (see RLIMIT_NPROC and the pids cgroup)"
                )));
                break;
            }
        }
    }
    drop(report);
    let mut line = String::new();
    let told = failed.is_none() && orders.read_line(&mut line)? > 0;
    let _ = go.set(told);
    if told {
        let mut outcome = Outcome::default();
        for result in results.iter().take(count) {
            match result {
                Ok(()) => outcome.right += 1,
                Err(wrong) => outcome.wrong.push(wrong),
            }
        }
        say(&outcome)?;
        orders.read_line(&mut line)?;
    }
    let _ = end.set(());
    for thread in threads {
        ensure!(thread.join().is_ok(), "a reading thread panicked");
    }
    failed.map_or(Ok(()), Err)
}

/// One read has to return the whole file.
fn check(file: &File, waited: &Waited) -> Result<()> {
    let len = usize::try_from(waited.len)?;
    let mut got = vec![0; len];
    file.read_exact_at(&mut got, 0)?;
    let mut wanted = Vec::with_capacity(len);
    io::copy(&mut content::file(&waited.path, waited.len), &mut wanted)?;
    ensure!(got == wanted, "wrong bytes");
    Ok(())
}

fn open(root: &Path, name: &str) -> Result<File> {
    File::open(root.join(name)).with_context(|| name.to_owned())
}

fn allow_open_files(count: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= count) {
        return Ok(());
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).context("raising RLIMIT_NOFILE")
}
