//! Cold starts through a real containerd: pull, then run, until the workload says it is ready.

use std::{
    cell::RefCell,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use harness::{
    containerd::{Containerd, Line, PLUGIN, Setup},
    daemon::Daemon,
    workdir::Workdir,
};
use lab::{Lab, LinkModel};
use serde::Serialize;
use serde_json::Value;

use crate::{client, sample::READY_LINE};

/// How the image gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// containerd's overlayfs snapshotter, tuned: parallel downloads in ranges, parallel unpack.
    Overlayfs,
    /// snapshotterd, an eStargz image nobody optimised.
    Lazy,
    /// snapshotterd, an eStargz image optimised for this very workload.
    Optimised,
}

impl System {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Overlayfs => "containerd overlayfs, tuned",
            Self::Lazy => "snapshotterd",
            Self::Optimised => "snapshotterd, optimised image",
        }
    }
}

/// One cold start.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// Which system.
    pub system: System,
    /// From the start of the pull to the workload's line, in seconds.
    pub seconds: f64,
    /// Of these, the pull.
    pub pull_seconds: f64,
    /// Of the pull, what snapshotterd took to answer containerd's requests (0 without one).
    pub answer_seconds: f64,
    /// Bytes of blobs the registry had served when the line came.
    pub served_bytes: u64,
    /// Requests it had answered.
    pub requests: u64,
    /// Bytes fetched because a reader waited.
    pub demand_bytes: u64,
    /// Bytes fetched from the start list.
    pub prefetch_bytes: u64,
    /// Bytes fetched by the background pass.
    pub hydration_bytes: u64,
    /// Bytes of footers and TOCs.
    pub metadata_bytes: u64,
    /// The same container started again, everything local, in seconds.
    pub warm_seconds: f64,
    /// Anonymous memory of the daemon at the end, in bytes (0 without one).
    pub daemon_rss_bytes: u64,
}

/// Where and how to measure.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The registry, with the images in it.
    pub lab: &'a Lab,
    /// Where temporary files go.
    pub scratch: &'a Path,
    /// Which containerd.
    pub line: Line,
    /// The daemon's configuration besides containerd's address.
    pub daemon_config: String,
    /// What the starts leave behind, removed with the bench: ext4 unpacks several times slower
    /// right after a tree was deleted, which would flatter whoever does not unpack.
    pub kept: RefCell<Vec<Workdir>>,
}

impl Bench<'_> {
    /// Measures one cold start on fresh directories.
    pub fn start(&self, system: System, image: &str, link: LinkModel) -> Result<Start> {
        let work = Workdir::below(self.scratch);
        let lazy = system != System::Overlayfs;
        let socket = work.path().join("c/c.sock");
        let daemon = lazy.then(|| {
            let config = format!(
                "{}\n[containerd]\naddress = {:?}\n",
                self.daemon_config,
                socket.display().to_string()
            );
            Daemon::start(&work.sub("d"), &config)
        });
        let setup = tuned(self.line, &work, daemon.as_ref());
        let containerd = Containerd::start(&work.sub("c"), setup);
        let snapshotter = if lazy { PLUGIN } else { "overlayfs" };
        if let Some(daemon) = &daemon {
            client::wait_until_settled(&daemon.admin())?;
        }

        self.lab.set_link(Some(link));
        let before = self.lab.log().mark();
        let started = Instant::now();
        let pull_seconds = pull(&containerd, snapshotter, image)?;
        let answers = daemon
            .as_ref()
            .map(|daemon| client::requests(&daemon.admin()))
            .transpose()?
            .unwrap_or_default();
        let mut container = run_until_ready(&containerd, snapshotter, image, "cold")?;
        let seconds = started.elapsed().as_secs_f64();
        let served = self.lab.log().totals_since(&before);
        let layers = match &daemon {
            Some(daemon) => client::lazy_layers(&daemon.admin())?,
            None => Vec::new(),
        };
        self.lab.set_link(None);
        container.wait().context("ctr run")?;
        let warm = Instant::now();
        let mut container = run_until_ready(&containerd, snapshotter, image, "warm")?;
        let warm_seconds = warm.elapsed().as_secs_f64();
        container.wait().context("ctr run")?;
        let sum = |cause: &str| {
            let pointer = format!("/cache/traffic/{cause}/bytes");
            layers
                .iter()
                .filter_map(|layer| layer.pointer(&pointer).and_then(Value::as_u64))
                .sum()
        };
        let daemon_rss_bytes = daemon
            .as_ref()
            .map_or(0, |daemon| anonymous_bytes(daemon.pid()));
        drop(containerd);
        drop(daemon);
        self.kept.borrow_mut().push(work);
        Ok(Start {
            system,
            seconds,
            pull_seconds,
            answer_seconds: answers
                .values()
                .fold(0.0, |sum, answered| sum + answered.seconds),
            served_bytes: served.blob_bytes,
            requests: served.requests,
            demand_bytes: sum("demand"),
            prefetch_bytes: sum("prefetch"),
            hydration_bytes: sum("hydration"),
            metadata_bytes: sum("metadata"),
            warm_seconds,
            daemon_rss_bytes,
        })
    }
}

/// containerd tuned for pulls, with the daemon as a snapshotter if there is one.
pub fn tuned(line: Line, work: &Workdir, daemon: Option<&Daemon>) -> Setup {
    Setup {
        line,
        snapshotter: daemon.map(|daemon| (daemon.socket(), daemon.root())),
        cri_snapshotter: "overlayfs".into(),
        sandbox_image: "none/none:1".into(),
        hosts_dir: work.sub("hosts"),
        tuned: true,
    }
}

/// `ctr images pull`; how many seconds it took.
pub fn pull(containerd: &Containerd, snapshotter: &str, image: &str) -> Result<f64> {
    let started = Instant::now();
    let flags = ["images", "pull", "--plain-http", "--snapshotter"];
    let pulled = containerd.ctr_within(600, flags.into_iter().chain([snapshotter, image]));
    let seconds = started.elapsed().as_secs_f64();
    if !pulled.status.success() {
        bail!(
            "ctr images pull: {}",
            String::from_utf8_lossy(&pulled.stderr).trim()
        );
    }
    Ok(seconds)
}

/// Starts `ctr run` and returns as soon as the line has come; the workload then ends by itself.
fn run_until_ready(
    containerd: &Containerd,
    snapshotter: &str,
    image: &str,
    id: &str,
) -> Result<Child> {
    let mut command: Command = containerd.ctr_command();
    command
        .args(["run", "--rm", "--snapshotter", snapshotter])
        .args(containerd.run_flags())
        .args([image, &format!("{id}-{}", std::process::id())]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("ctr")?;
    let stdout = child.stdout.take().context("the container's output")?;
    let limit = Instant::now() + Duration::from_secs(600);
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        if line.contains(READY_LINE) {
            return Ok(child);
        }
        if Instant::now() > limit {
            break;
        }
    }
    let output = child.wait_with_output()?;
    bail!(
        "the container did not get ready: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )
}

/// `RssAnon` of a process.
pub fn anonymous_bytes(pid: u32) -> u64 {
    let status =
        std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/status"))).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}
