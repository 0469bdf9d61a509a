//! The daemon under measurement: pulling into it, and what it holds.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use core_runtime::{
    image::{Image, Location, RegistryAccess, Store},
    pull::{self, Outcome, PullOptions},
    runner::{Mount, Reexec},
    snapshots::Snapshots,
};
use formats::oci::HostPlatform;
use harness::{daemon::Daemon, machine::binary, workdir::mounts_below};
use parking_lot::Mutex;
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use serde_json::Value;
use storage::registry::{ClientOptions, RegistryClient};
use tokio::runtime::Runtime;

use crate::client;

/// A daemon and what was pulled into it.
pub(crate) struct Node {
    daemon: Daemon,
    runtime: Runtime,
    registries: RegistryAccess,
    scratch: PathBuf,
    pulled: Mutex<BTreeMap<String, String>>,
}

impl Node {
    /// Starts it below `dir` with the given config file text; pulls use `scratch`.
    pub(crate) fn start(dir: &Path, scratch: &Path, config: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        Ok(Self {
            daemon: Daemon::start(dir, config),
            runtime,
            registries: RegistryAccess::new(RegistryClient::new(ClientOptions::default())),
            scratch: scratch.to_owned(),
            pulled: Mutex::default(),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    pub(crate) fn admin(&self) -> PathBuf {
        self.daemon.admin()
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.daemon.log_path()
    }

    /// Read calls that the daemon has made.
    pub(crate) fn read_calls(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/io", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("syscr: "));
        Ok(line.context("/proc/PID/io has no syscr")?.parse()?)
    }

    /// Pulls an image lazily and prepares a container on it; its key.
    pub(crate) fn container(&self, reference: &str, name: &str) -> Result<String> {
        let location: Location = reference.parse()?;
        let key = format!("bench/{name}");
        self.runtime.block_on(async {
            let store = Arc::new(Store::open(&location, &self.registries)?);
            let image = Image::read(&store, &HostPlatform::current()).await?;
            let snapshots = self.snapshots().await?;
            let options = PullOptions {
                scratch: self.scratch.clone(),
                reexec: Reexec {
                    program: binary("snapctl"),
                    args: vec!["stage".into()],
                },
                eager: false,
            };
            let progress: pull::Progress = Arc::new(|_| {});
            let pulled =
                pull::pull(&store, &location, image, &snapshots, &options, &progress).await?;
            let unpacked = pulled
                .layers
                .iter()
                .find(|layer| layer.outcome == Outcome::Unpacked);
            if let Some(layer) = unpacked {
                bail!(
                    "{reference}: layer {} was not served lazily; the daemon's log ends:\n{}",
                    layer.digest,
                    harness::daemon::tail(&self.daemon.log_path())
                );
            }
            snapshots.prepare(&key, &pulled.top).await?;
            Ok(())
        })?;
        self.pulled.lock().insert(key.clone(), reference.to_owned());
        Ok(key)
    }

    /// The mounts of a container; the daemon mounts its layers.
    pub(crate) fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        self.runtime
            .block_on(async { Ok(self.snapshots().await?.mounts(key).await?) })
    }

    /// Waits until all layers are local and proven.
    pub(crate) fn wait_until_complete(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let layers = client::lazy_layers(&self.daemon.admin())?;
            let of = |layer: &Value, key: &str| layer.get(key).cloned().unwrap_or_default();
            if let Some(layer) = layers
                .iter()
                .find(|layer| of(layer, "verdict") == "refuted")
            {
                bail!("a layer was refuted: {layer}");
            }
            let open = layers.iter().find(|layer| of(layer, "complete") != true);
            let Some(open) = open else { return Ok(()) };
            if Instant::now() > until {
                bail!("a layer is not complete after {limit:?}: {open}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Stops the daemon; nothing of it stays mounted.
    pub(crate) fn unmount(&mut self) -> Result<()> {
        let output = self.daemon.unmount();
        if !output.status.success() {
            bail!(
                "snapshotterd --unmount: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let left = mounts_below(&self.daemon.lowers());
        if let Some(left) = left.first() {
            bail!("{} is still mounted", left.display());
        }
        Ok(())
    }

    /// Unmounts everything and starts the daemon again: complete layers then get their plain file.
    pub(crate) fn remount(&mut self) -> Result<()> {
        self.unmount()?;
        self.daemon.restart();
        let keys: Vec<_> = self.pulled.lock().keys().cloned().collect();
        for key in keys {
            self.mounts(&key)?;
        }
        Ok(())
    }

    /// A mounted layer whose device is not its plain file.
    pub(crate) fn not_plain(&self) -> Result<Option<String>> {
        for layer in client::lazy_layers(&self.daemon.admin())? {
            let mounts = layer.get("mounts").and_then(Value::as_array);
            for mount in mounts.into_iter().flatten() {
                let path = mount.get("path").and_then(Value::as_str).unwrap_or("");
                let mounted = mount.get("mounted") == Some(&Value::Bool(true));
                if mounted && !Path::new(&format!("{path}.plain")).exists() {
                    return Ok(Some(path.to_owned()));
                }
            }
        }
        Ok(None)
    }

    /// Drops the pages of all cache files.
    pub(crate) fn drop_caches(&self) -> Result<()> {
        let mut folders = vec![self.daemon.root()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    drop_pages(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    async fn snapshots(&self) -> Result<Snapshots> {
        Ok(Snapshots::connect(&self.daemon.socket(), "snapctl").await?)
    }
}

/// The daemon's memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Anonymous memory after idling with all images mounted, in bytes.
    pub idle_bytes: u64,
    /// The largest anonymous memory seen while it pulled and filled, sampled every 20 ms.
    pub anonymous_peak_bytes: u64,
    /// Peak of all resident memory, mapped files included, as the kernel knows it (`VmHWM`).
    pub resident_peak_bytes: u64,
}

/// Samples a process's anonymous memory.
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Sampler {
    pub(crate) fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            while !stopped.load(Ordering::Relaxed) {
                peak = peak.max(status_bytes(pid, "RssAnon"));
                std::thread::sleep(Duration::from_millis(20));
            }
            peak
        });
        Self { stop, thread }
    }

    pub(crate) fn finish(self, pid: u32) -> Memory {
        self.stop.store(true, Ordering::Relaxed);
        Memory {
            idle_bytes: status_bytes(pid, "RssAnon"),
            // A sampler that panicked has seen nothing.
            anonymous_peak_bytes: self.thread.join().unwrap_or(0),
            resident_peak_bytes: status_bytes(pid, "VmHWM"),
        }
    }
}

/// Drops what the page cache holds of a file, unless it is dirty or mapped.
pub(crate) fn drop_pages(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    fadvise(&file, 0, None, Advice::DontNeed).with_context(|| path.display().to_string())
}

/// A size in `/proc/PID/status`, in bytes; 0 for a process that is gone.
pub(crate) fn status_bytes(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    });
    found.unwrap_or(0) * 1024
}

/// The machine's load average over a minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|first| first.parse().ok())
        .unwrap_or(f64::NAN)
}
