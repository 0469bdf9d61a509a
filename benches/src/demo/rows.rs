//! One row: a fresh daemon, one cold start, and what it cost.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use harness::{daemon::Daemon, machine::binary, workdir::Workdir};
use lab::Lab;
use serde_json::Value;

use super::Talk;
use crate::sample::READY_LINE;

/// How the image is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Everything is downloaded and unpacked first.
    Eager,
    /// Lazily, from an image nobody optimised.
    Lazy,
    /// Lazily, with the files of the start placed first.
    Optimised,
}

impl Way {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Eager => "full pull",
            Self::Lazy => "lazy",
            Self::Optimised => "lazy, optimised",
        }
    }
}

/// What one start cost.
#[derive(Clone, Debug)]
pub struct Figures {
    /// How it was started.
    pub way: Way,
    /// From `snapctl run` to the workload's line.
    pub seconds: f64,
    /// Bytes the registry had sent until then.
    pub served_bytes: u64,
    /// Requests it had answered until then.
    pub requests: u64,
    /// Bytes fetched because a reader waited; `None` for a full pull.
    pub demand_bytes: Option<u64>,
    /// Bytes fetched ahead from the start list.
    pub prefetch_bytes: Option<u64>,
    /// How much of the image was local, in percent.
    pub percent_local: f64,
}

const LIMIT: Duration = Duration::from_secs(300);

pub(super) fn measure(
    way: Way,
    image: &str,
    work: &Workdir,
    registry: &Lab,
    talk: &Talk,
) -> Result<Figures> {
    let dir = work.sub(&format!("{way:?}").to_lowercase());
    let daemon = Daemon::start(&dir, "[containerd]\naddress = \"\"\n");
    let before = registry.log().mark();
    let started = Instant::now();
    let mut command = Command::new(binary("snapctl"));
    command
        .arg("--quiet")
        .arg("--address")
        .arg(daemon.socket())
        .arg("--admin")
        .arg(daemon.admin());
    command.arg("run");
    if way == Way::Eager {
        command.arg("--eager");
    }
    let mut child = command
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("the container's output")?;
    let (lines, received) = std::sync::mpsc::channel();
    let reader = std::thread::Builder::new()
        .name("container output".into())
        .spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        })?;
    let ready = loop {
        match received.recv_timeout(Duration::from_millis(50)) {
            Ok(line) if line.contains(READY_LINE) => break true,
            Ok(_) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                if started.elapsed() < LIMIT && talk.check().is_ok() => {}
            Err(_) => break false,
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let served = registry.log().totals_since(&before);
    let layers = crate::client::layers(&daemon.admin());
    if !ready {
        let _ = child.kill();
    }
    let output = child.wait_with_output().context("snapctl run")?;
    let _ = reader.join();
    talk.check()?;
    if !ready || !output.status.success() {
        bail!(
            "{}: the container did not get ready ({}):\n{}\n{}",
            way.describe(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            harness::daemon::tail(&daemon.log_path()),
        );
    }
    let mut figures = Figures {
        way,
        seconds,
        served_bytes: served.bytes,
        requests: served.requests,
        demand_bytes: None,
        prefetch_bytes: None,
        percent_local: 100.0,
    };
    if way != Way::Eager {
        let layers = layers?;
        let sum = |pointer: &str| {
            layers
                .iter()
                .filter_map(|layer| layer.pointer(pointer).and_then(Value::as_u64))
                .sum()
        };
        figures.demand_bytes = Some(sum("/cache/traffic/demand/bytes"));
        figures.prefetch_bytes = Some(sum("/cache/traffic/prefetch/bytes"));
        let (local, payload): (u64, u64) = (sum("/local_bytes"), sum("/payload_bytes"));
        figures.percent_local = 100.0 * local as f64 / payload.max(1) as f64;
    }
    Ok(figures)
}
