//! Private memory control groups, version 1 or 2.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A group; its maker removes it again when dropped.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Group {
    dir: PathBuf,
    #[serde(skip)]
    ours: bool,
}

/// What a group is charged with.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Charge {
    /// Everything, in bytes.
    pub(super) used: u64,
    /// Of these, page cache.
    pub(super) cache: u64,
}

impl Group {
    /// A fresh, empty group beside all others.
    pub(super) fn make() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "sd-steady-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let parent = if Path::new(V1).join("memory.usage_in_bytes").exists() {
            Path::new(V1)
        } else {
            let control = Path::new(V2).join("cgroup.controllers");
            let controllers = fs::read_to_string(control).unwrap_or_default();
            if !controllers.split_whitespace().any(|name| name == "memory") {
                bail!("the machine has no memory controller below {V2}");
            }
            // Where this is refused, making the group's files below tells.
            let _ = fs::write(Path::new(V2).join("cgroup.subtree_control"), "+memory");
            Path::new(V2)
        };
        let dir = parent.join(name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let group = Self { dir, ours: true };
        group.charge()?;
        Ok(group)
    }

    /// Moves a process into it. What the process was charged with before stays where it is.
    pub(super) fn enter(&self, pid: u32) -> Result<()> {
        let procs = self.dir.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).with_context(|| procs.display().to_string())
    }

    /// Moves a process into it until the answer is dropped.
    pub(super) fn visit(&self, pid: u32) -> Result<Visit> {
        let home = home(pid)?;
        self.enter(pid)?;
        Ok(Visit { home, pid })
    }

    /// What it is charged with.
    pub(super) fn charge(&self) -> Result<Charge> {
        let read = |name: &str| {
            let path = self.dir.join(name);
            fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let v1 = self.dir.join("memory.usage_in_bytes").exists();
        let used = read(if v1 {
            "memory.usage_in_bytes"
        } else {
            "memory.current"
        })?;
        let stat = read("memory.stat")?;
        let key = if v1 { "cache" } else { "file" };
        let cache = stat.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key).then(|| value.parse().ok())?
        });
        Ok(Charge {
            used: used.trim().parse()?,
            cache: cache.with_context(|| format!("no {key} in memory.stat"))?,
        })
    }
}

impl Clone for Group {
    /// Another handle, which does not remove the group.
    fn clone(&self) -> Self {
        Self {
            dir: self.dir.clone(),
            ours: false,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_dir(&self.dir)
        {
            eprintln!("{}: {error}", self.dir.display());
        }
    }
}

/// A process in another group; it goes home when this is dropped.
#[derive(Debug)]
pub(super) struct Visit {
    home: Group,
    pid: u32,
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Err(error) = self.home.enter(self.pid) {
            eprintln!(
                "process {} stays in the benchmark's group: {error:#}",
                self.pid
            );
        }
    }
}

/// The group a process is in.
fn home(pid: u32) -> Result<Group> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let find = |wanted: &str| {
        table.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let mut controllers = controllers.split(',');
            controllers
                .any(|name| name == wanted)
                .then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let v1 = find("memory").map(|path| Path::new(V1).join(path));
    let dir = v1.or_else(|| find("").map(|path| Path::new(V2).join(path)));
    let dir = dir.with_context(|| format!("the memory group of process {pid}"))?;
    Ok(Group { dir, ours: false })
}
