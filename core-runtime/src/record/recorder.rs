//! Runs an image once under a private daemon and writes down what its start reads.
//!
//! The image is converted to eStargz into a private registry first (a start list says nothing
//! about how the image is packed), so any image can be recorded. A daemon of its own sees every
//! read: nothing of the image is in the page cache of a layer mount that has just been made.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use formats::oci::HostPlatform;
use serde::Serialize;

use super::{Entry, Record};
use crate::{
    admin,
    convert::{self, ConvertOptions},
    image::{Image, Location, RegistryAccess, Store},
    process::Process,
    pull::{self, Outcome, PullOptions},
    runner::{self, Container, Engine, Reexec, Running},
    snapshots::Snapshots,
};

/// How to record.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// Arguments instead of the image's command.
    pub args: Vec<String>,
    /// Stop when a line of the output contains this.
    pub until_line: Option<String>,
    /// Stop after this time at the latest.
    pub limit: Duration,
    /// The daemon's program.
    pub snapshotterd: Option<PathBuf>,
    /// How stages are started.
    pub reexec: Reexec,
    /// Do not pass the container's output on.
    pub quiet: bool,
}

/// What a recording found.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The list.
    pub record: Record,
    /// Figures.
    pub summary: Summary,
}

/// Figures of a recording.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Why it ended: `the line appeared`, `the process ended`, `the time was up`.
    pub ended: &'static str,
    /// How long the container ran.
    pub seconds: f64,
    /// Decoded bytes that were fetched for it, neighbours of what was read included.
    pub bytes_local: u64,
    /// Decoded bytes of the image.
    pub payload_bytes: u64,
}

/// Records the start of the image at `location`.
pub async fn record(
    location: &Location,
    access: &RegistryAccess,
    options: RecordOptions,
) -> Result<Recorded> {
    let program = find_daemon(options.snapshotterd.as_deref())?;
    let work = tempfile::Builder::new()
        .prefix("sd-record-")
        // Not /tmp: that is often a tmpfs, from which EROFS cannot be mounted, and the image goes here.
        .tempdir_in("/var/tmp")
        .context("a private directory")?;
    let source = Store::open(location, access)?;
    let original = Image::read(&source, &HostPlatform::current()).await?;
    let process = Process::from_image(&original.config.config, &options.args, &[])?;

    let registry = lab::Lab::start(lab::LabOptions::new(work.path().join("registry"))).await?;
    let private: Location = format!("{}/recorded:1", registry.host()).parse()?;
    let target = Arc::new(Store::open(&private, access)?);
    let source = Arc::new(source);
    // Speed counts here, not size: the packed image is thrown away.
    let converting = ConvertOptions {
        chunk_size_bytes: 1 << 20,
        level: 1,
        record: None,
        jobs: 2,
        scratch: work.path().to_owned(),
    };
    convert::to_estargz(
        &source,
        &original,
        &target,
        &converting,
        Arc::new(|_, _| {}),
    )
    .await?;
    let image = Image::read(&target, &HostPlatform::current()).await?;

    let daemon = PrivateDaemon::start(&program, work.path())?;
    daemon.wait_until_it_listens().await?;
    let snapshots = Snapshots::connect(&daemon.address(), "snapctl").await?;
    let pulling = PullOptions {
        scratch: work.path().to_owned(),
        reexec: options.reexec.clone(),
        eager: false,
    };
    let pulled = pull::pull(
        &target,
        &private,
        image.clone(),
        &snapshots,
        &pulling,
        &(Arc::new(|_| {}) as pull::Progress),
    )
    .await?;
    if let Some(layer) = pulled
        .layers
        .iter()
        .find(|layer| layer.outcome != Outcome::Lazy)
    {
        let known = admin::get(&daemon.admin(), "/v1/layers").await?;
        let why = known
            .pointer("/not_lazy/0/why_not")
            .and_then(serde_json::Value::as_str)
            .unwrap_or("the daemon gives no reason");
        bail!(
            "layer {} is not served lazily here, so its reads cannot be recorded: {why}",
            layer.digest
        );
    }
    let mounts = snapshots.prepare("record", &pulled.top).await?;
    let container = Container {
        id: format!("record-{}", std::process::id()),
        bundle: work.path().join("bundle"),
        mounts,
        process,
        hostname: "record".into(),
        binds: Vec::new(),
        engine: Engine::detect(&std::env::var_os("PATH").unwrap_or_default()),
    };
    std::fs::create_dir(&container.bundle).context("the container's directory")?;
    let started = Instant::now();
    let running = runner::start(&container, &options.reexec, Stdio::piped())?;
    let (until, limit, quiet) = (options.until_line.clone(), options.limit, options.quiet);
    let ended = tokio::task::spawn_blocking(move || watch(running, until.as_deref(), limit, quiet))
        .await??;
    let seconds = started.elapsed().as_secs_f64();

    let mut recorded = collect(&daemon.admin(), &original, &image).await?;
    recorded.summary.ended = ended;
    recorded.summary.seconds = seconds;
    drop(daemon);
    registry.stop().await;
    Ok(recorded)
}

/// Reads the container's output until one of the ends; then the container is ended.
fn watch(
    mut running: Running,
    until: Option<&str>,
    limit: Duration,
    quiet: bool,
) -> Result<&'static str> {
    let stdout = running.take_stdout().context("the container's output")?;
    let (lines, received) = mpsc::channel();
    std::thread::Builder::new()
        .name("container output".into())
        .spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        })?;
    let deadline = Instant::now() + limit;
    let ended = loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let text = String::from_utf8_lossy(&line);
                if !quiet {
                    let _ = writeln!(std::io::stderr(), "{text}");
                }
                if until.is_some_and(|wanted| text.contains(wanted)) {
                    break "the line appeared";
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break "the process ended",
            Err(mpsc::RecvTimeoutError::Timeout) => break "the time was up",
        }
    };
    if ended == "the process ended" {
        let status = running.wait()?;
        if !status.success() {
            bail!("the container failed ({status}); what it read would be no good start list");
        }
    } else {
        running.kill();
    }
    Ok(ended)
}

#[derive(serde::Deserialize)]
struct Touched {
    files: Vec<TouchedFile>,
}

#[derive(serde::Deserialize)]
struct TouchedFile {
    path: String,
}

async fn collect(socket: &Path, original: &Image, image: &Image) -> Result<Recorded> {
    let digest = original.digest.to_string();
    let mut entries = Vec::new();
    for (layer_index, layer) in image.manifest.layers.iter().enumerate() {
        let answer = admin::get(socket, &format!("/v1/layers/{}/touched", layer.digest)).await?;
        let touched: Touched =
            serde_json::from_value(answer).context("the daemon's list of touched files")?;
        entries.extend(touched.files.into_iter().map(|file| Entry {
            path: file.path,
            manifest_digest: digest.clone(),
            layer_index,
        }));
    }
    let layers = admin::get(socket, "/v1/layers").await?;
    let layers = layers.get("layers").and_then(serde_json::Value::as_array);
    let sum = |key: &str| {
        let values = layers
            .into_iter()
            .flatten()
            .filter_map(|layer| layer.get(key)?.as_u64());
        values.sum()
    };
    let summary = Summary {
        ended: "",
        seconds: 0.0,
        bytes_local: sum("local_bytes"),
        payload_bytes: sum("payload_bytes"),
    };
    Ok(Recorded {
        record: Record { entries },
        summary,
    })
}

fn find_daemon(chosen: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = chosen {
        return Ok(path.to_owned());
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("snapshotterd")));
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .map(|dir| dir.join("snapshotterd"))
            .find(|file| file.is_file())
    };
    beside
        .filter(|path| path.is_file())
        .or_else(on_path)
        .context("snapshotterd is neither beside snapctl nor on PATH; name it with --snapshotterd")
}

/// A daemon on private directories; ended and unmounted when dropped.
#[derive(Debug)]
struct PrivateDaemon {
    program: PathBuf,
    dir: PathBuf,
    /// Short: all lower directories have to fit into one mount call.
    lowers: tempfile::TempDir,
    child: Child,
}

impl PrivateDaemon {
    fn start(program: &Path, dir: &Path) -> Result<Self> {
        let config = dir.join("snapshotterd.toml");
        std::fs::write(
            &config,
            "[lazy]\nhydration = \"off\"\n[containerd]\naddress = \"\"\n",
        )
        .context("the daemon's config")?;
        let log =
            std::fs::File::create(dir.join("snapshotterd.log")).context("the daemon's log")?;
        let lowers = tempfile::Builder::new()
            .prefix("sl-")
            .tempdir_in("/tmp")
            .context("a directory for mounts")?;
        let child = Command::new(program)
            .arg("--config")
            .arg(config)
            .args(flags(dir, lowers.path()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
            lowers,
            child,
        })
    }

    fn address(&self) -> PathBuf {
        self.dir.join("sd.sock")
    }

    fn admin(&self) -> PathBuf {
        self.dir.join("state/admin.sock")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("snapshotterd.log")
    }

    async fn wait_until_it_listens(&self) -> Result<()> {
        for _ in 0..1000 {
            if tokio::net::UnixStream::connect(self.address())
                .await
                .is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        bail!("the daemon does not listen after 10 s:\n{log}")
    }
}

fn flags(dir: &Path, lowers: &Path) -> Vec<std::ffi::OsString> {
    let pairs = [
        ("--root", dir.join("root")),
        ("--state", dir.join("state")),
        ("--lowers", lowers.to_owned()),
        ("--address", dir.join("sd.sock")),
    ];
    pairs
        .into_iter()
        .flat_map(|(flag, path)| [flag.into(), path.into()])
        .collect()
}

impl Drop for PrivateDaemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
        let _ = Command::new(&self.program)
            .args(flags(&self.dir, self.lowers.path()))
            .arg("--unmount")
            .status();
    }
}
