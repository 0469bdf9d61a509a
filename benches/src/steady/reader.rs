//! The child process that mounts privately and reads.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use core_runtime::runner::{Mount, mount_privately};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::group::{Charge, Group};
use crate::node::drop_pages;

const BUFFER: usize = 256 << 10;

/// A root file system.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Tree {
    pub(super) mounts: Vec<Mount>,
    pub(super) root: PathBuf,
}

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Join this group first.
    pub(super) group: Option<Group>,
    /// What to mount.
    pub(super) trees: Vec<Tree>,
    /// Paths below each tree's root.
    pub(super) files: Vec<String>,
    pub(super) task: Task,
}

/// What to do with the files.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Read all, tree by tree, once.
    Once,
    /// Read them once to warm up, then take passes by turns, one tree after the other.
    Alternate { passes: usize },
    /// Drop their pages.
    Drop,
}

/// What it took.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Done {
    /// By tree.
    pub(super) passes: Vec<Vec<Pass>>,
    /// What the group was charged with for reading.
    pub(super) charged: Option<Charge>,
}

/// One pass over all files.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Pass {
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
}

/// Carries a plan out in a child process, which is killed after `limit`.
pub(super) fn spawn(plan: &Plan, limit: Duration) -> Result<Done> {
    let mut child = Command::new("timeout")
        .args(["-s", "KILL", &limit.as_secs().to_string()])
        .arg(std::env::current_exe()?)
        .arg("reader")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("timeout(1)")?;
    let mut stdin = child.stdin.take().context("the reader's input")?;
    stdin.write_all(&serde_json::to_vec(plan)?)?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "the reader failed ({}; killed after {limit:?})",
            output.status
        );
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The child: takes its plan from standard input, says on standard output what it took.
pub fn run_from_stdin() -> Result<()> {
    let plan: Plan = serde_json::from_reader(io::stdin().lock())?;
    let mut buffer = vec![1; BUFFER];
    for tree in &plan.trees {
        mount_privately(&tree.mounts, &tree.root)?;
    }
    if let Some(group) = &plan.group {
        group.enter(std::process::id())?;
    }
    let before = plan.group.as_ref().map(Group::charge).transpose()?;
    let mut done = Done::default();
    match plan.task {
        Task::Drop => {
            for tree in &plan.trees {
                for file in &plan.files {
                    drop_pages(&tree.root.join(file))?;
                }
            }
        }
        Task::Once => {
            for tree in &plan.trees {
                read_all(&paths(tree, &plan.files), &mut buffer)?;
            }
        }
        Task::Alternate { passes } => {
            let trees: Vec<_> = plan
                .trees
                .iter()
                .map(|tree| paths(tree, &plan.files))
                .collect();
            for files in &trees {
                read_all(files, &mut buffer)?;
            }
            done.passes = vec![Vec::new(); trees.len()];
            for _ in 0..passes {
                for (files, taken) in trees.iter().zip(&mut done.passes) {
                    taken.push(timed(|| read_all(files, &mut buffer))?);
                }
            }
        }
    }
    if let (Some(group), Some(before)) = (&plan.group, before) {
        let after = group.charge()?;
        done.charged = Some(Charge {
            used: after.used.saturating_sub(before.used),
            cache: after.cache.saturating_sub(before.cache),
        });
    }
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &done)?;
    out.flush()?;
    Ok(())
}

fn paths(tree: &Tree, files: &[String]) -> Vec<PathBuf> {
    files.iter().map(|file| tree.root.join(file)).collect()
}

fn read_all(files: &[PathBuf], buffer: &mut [u8]) -> Result<()> {
    for path in files {
        let named = || path.display().to_string();
        let mut file = File::open(path).with_context(named)?;
        while file.read(buffer).with_context(named)? > 0 {}
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Pass> {
    let cpu = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime));
    let (wall, before) = (Instant::now(), cpu()?);
    work()?;
    Ok(Pass {
        seconds: wall.elapsed().as_secs_f64(),
        cpu_seconds: cpu()?.saturating_sub(before).as_secs_f64(),
    })
}
