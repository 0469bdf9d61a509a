//! What runs beside a test in a process of its own: readers that check every byte they get. A read
//! that hangs or a process that has to die takes nothing else with it.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use formats::digest::Digest;
use rustix::{fs::Advice, io::Errno};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use suite::process::wait_for;

const JOB: &str = "SNAPSHOTTERD_TEST_JOB";
const BUFFER_BYTES: usize = 128 << 10;

/// Files and what SHA-256 their content must have.
pub(crate) type Sums = BTreeMap<PathBuf, Digest>;

/// What a worker does.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Reads and checks all files, again and again, until the file `stop` is there; at least once.
    /// With `hold`, through descriptors opened once.
    Passes { stop: PathBuf, hold: bool },
    /// One thread for each file reads it; all have to get the right bytes, and no error whatever
    /// signals come.
    Threads,
    /// The same, but each has to get an error, and no byte.
    ThreadsFail,
}

#[derive(Debug, Serialize, Deserialize)]
struct Work {
    job: Job,
    root: PathBuf,
    sums: Sums,
    report: PathBuf,
}

/// What a worker says about itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Whole passes, or threads that have ended.
    pub(crate) passes: u64,
    /// Read calls that returned.
    pub(crate) reads: u64,
    /// The longest of them.
    pub(crate) longest_ms: u64,
    /// Signals that were handled.
    pub(crate) signals: u64,
}

/// A running worker; killed when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    report: PathBuf,
    log: PathBuf,
}

impl Worker {
    pub(crate) fn start(work: &Path, name: &str, job: Job, root: &Path, sums: &Sums) -> Self {
        let report = work.join(format!("{name}.report"));
        let log = work.join(format!("{name}.log"));
        let file = work.join(format!("{name}.job"));
        let _ = fs::remove_file(&report);
        let text = serde_json::to_vec(&Work {
            job,
            root: root.to_owned(),
            sums: sums.clone(),
            report: report.clone(),
        });
        fs::write(&file, text.expect("a job")).expect("the job's file");
        let out = File::create(&log).expect("a log");
        let child = Command::new(env::current_exe().expect("this program"))
            .args(["--exact", "worker::run", "--ignored", "--nocapture"])
            .env(JOB, &file)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a descriptor"))
            .stderr(out)
            .spawn()
            .expect("a worker");
        Self { child, report, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn report(&self) -> Report {
        let text = fs::read(&self.report).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(crate) fn assert_running(&mut self, when: &str) {
        if let Some(status) = self.child.try_wait().expect("wait") {
            panic!("the reader ended ({status}) {when}:\n{}", self.log());
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end, which has to be a good one.
    pub(crate) fn finish(&mut self, limit: Duration) -> Report {
        let status = self.ended(limit);
        assert!(status.success(), "a reader: {status}\n{}", self.log());
        self.report()
    }

    pub(crate) fn ended(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        wait_for("a reader to end", limit, || {
            status = self.child.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("it has ended")
    }

    pub(crate) fn send_kill(&mut self) {
        self.child.kill().expect("kill");
    }

    /// Its threads that sleep in the kernel in a read call. Their state says too little: for an
    /// answer of FUSE one sleeps lightly, for another's page deeply.
    pub(crate) fn blocked(&self) -> usize {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let reading = tasks.into_iter().flatten().flatten().filter(|task| {
            let call = fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            let number = call.split(' ').next().and_then(|word| word.parse().ok());
            number == Some(libc::SYS_pread64)
        });
        reading.count()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test: what [`Worker::start`] runs.
#[test]
#[ignore = "runs as a part of the other tests"]
fn run() {
    let Some(file) = env::var_os(JOB) else { return };
    let work: Work =
        serde_json::from_slice(&fs::read(file).expect("the job")).expect("a known job");
    match &work.job {
        Job::Passes { stop, hold } => passes(&work, stop, *hold),
        Job::Threads => threads(&work, true),
        Job::ThreadsFail => threads(&work, false),
    }
}

fn write_report(work: &Work, report: &Report) {
    let new = work.report.with_extension("new");
    fs::write(&new, serde_json::to_vec(report).expect("a report")).expect("written");
    fs::rename(&new, &work.report).expect("renamed");
}

fn passes(work: &Work, stop: &Path, hold: bool) {
    let mut report = Report::default();
    let mut held = BTreeMap::new();
    loop {
        for (path, expected) in &work.sums {
            let file = held.remove(path).unwrap_or_else(|| open(&work.root, path));
            let sum = sum(&file, &mut report)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(sum, *expected, "{}", path.display());
            // So that the next pass asks again.
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("fadvise");
            if hold {
                held.insert(path, file);
            }
        }
        report.passes += 1;
        write_report(work, &report);
        if stop.exists() {
            return;
        }
    }
}

fn open(root: &Path, path: &Path) -> File {
    File::open(root.join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Single read calls: nothing here hides an EINTR.
fn sum(file: &File, report: &mut Report) -> Result<Digest, Errno> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut hasher = Sha256::new();
    let mut at = 0;
    loop {
        let began = Instant::now();
        let length = rustix::io::pread(file, &mut buffer, at)?;
        report.reads += 1;
        let waited = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        report.longest_ms = report.longest_ms.max(waited);
        if length == 0 {
            return Ok(Digest::finish(hasher));
        }
        hasher.update(&buffer[..length]);
        at += length as u64;
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Handlers without SA_RESTART: a call that can be interrupted returns EINTR.
fn handle_signals() {
    let count: extern "C" fn(libc::c_int) = count;
    for signal in [libc::SIGALRM, libc::SIGURG] {
        // SAFETY: all-zero is a valid sigaction: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = count as usize;
        // SAFETY: the handler only adds to an atomic; the old action is not asked for.
        let done = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        assert_eq!(done, 0, "sigaction");
    }
}

fn threads(work: &Work, succeed: bool) {
    handle_signals();
    let files: Vec<_> = work
        .sums
        .iter()
        .map(|(path, sum)| (path.clone(), open(&work.root, path), *sum))
        .collect();
    let count = files.len();
    let barrier = Arc::new(Barrier::new(count));
    let readers: Vec<_> = files
        .into_iter()
        .map(|(path, file, expected)| {
            let barrier = Arc::clone(&barrier);
            let read = move || {
                let mut report = Report::default();
                barrier.wait();
                match (sum(&file, &mut report), succeed) {
                    (Ok(sum), true) => assert_eq!(sum, expected, "{}", path.display()),
                    (Err(error), false) => {
                        assert_eq!(report.reads, 0, "bytes came before {error}");
                        println!("{}: {error}", path.display());
                    }
                    (Err(error), true) => panic!("{}: {error}", path.display()),
                    (Ok(sum), false) => panic!("{}: read, sum {sum}", path.display()),
                }
                report
            };
            thread::Builder::new()
                .stack_size(256 << 10)
                .spawn(read)
                .expect("a thread")
        })
        .collect();
    let mut whole = Report::default();
    for reader in readers {
        let one = reader.join().expect("a reader");
        whole.passes += 1;
        whole.reads += one.reads;
        whole.longest_ms = whole.longest_ms.max(one.longest_ms);
    }
    whole.signals = SIGNALS.load(Ordering::Relaxed);
    write_report(work, &whole);
}
