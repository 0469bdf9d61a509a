//! Steady state: what reading from lazily served layers costs once their content is local, side by
//! side with ordinary overlayfs on the same disk.
//!
//! Every figure compares the same files. They are written to ordinary directories, the lowers of
//! the reference, and packed from there into eStargz layers that the daemon serves. Two
//! presentations are measured: layers whose device is still a file on BlobFs, as a container sees
//! them that started before its image was complete, and layers on the plain cache file, as
//! containers started later see them.
//!
//! All reading through the daemon's mounts happens in child processes under a timeout.

mod group;
mod images;
mod reader;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use core_runtime::runner::Mount;
use harness::workdir::Workdir;
use lab::{Lab, LabOptions};
use serde::Serialize;

use crate::{
    figures::{median, range},
    node::{Node, Sampler, load},
};
use group::{Charge, Group};
use images::{BASE_IMAGES, Corpus};
use reader::{Plan, Task, Tree};

pub use crate::node::Memory;
pub use reader::run_from_stdin;

/// How much to measure.
#[derive(Clone, Debug)]
pub struct SteadyOptions {
    /// Where temporary files go: on the file system that the comparison is about.
    pub scratch: PathBuf,
    /// Rounds.
    pub rounds: usize,
    /// Passes over the large file in each round, for each side.
    pub passes: usize,
    /// Size of the large file in MB.
    pub megabytes: u64,
    /// How many small files.
    pub small_files: usize,
    /// How long the daemon idles before its memory is read.
    pub idle: Duration,
}

/// What the layers' device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A file on BlobFs, nothing local yet but what was read.
    Filling,
    /// A file on BlobFs, all of it local.
    BlobFs,
    /// The plain cache file.
    Plain,
}

impl Device {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Filling => "while downloading",
            Self::BlobFs => "complete, on BlobFs",
            Self::Plain => "plain cache file",
        }
    }
}

/// What a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Throughput of the large file, warm, relative to overlayfs.
    WarmRead,
    /// Rate of small files, warm, relative to overlayfs.
    SmallFiles,
    /// Memory charged to the reader's group, relative to the bytes read.
    Charged,
    /// Page cache of ten images on one base, relative to overlayfs.
    SharedBase,
    /// Anonymous memory of the idle daemon in MB.
    IdleMemory,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub question: Question,
    /// How the layers were presented.
    pub device: Device,
    /// The figure that has a target.
    pub value: f64,
    /// Its smallest and largest over the rounds.
    pub range: (f64, f64),
    /// What it has to reach.
    pub target: f64,
    /// The lazy side: seconds for one pass, or bytes.
    pub lazy: f64,
    /// The reference: the same.
    pub reference: f64,
    /// The ratio in the reader's CPU time, for reads that are timed: tells a slow path from a busy
    /// machine.
    pub cpu_value: Option<f64>,
}

impl Row {
    /// Whether the target is met.
    pub fn met(&self) -> bool {
        match self.question {
            Question::WarmRead | Question::SmallFiles => self.value >= self.target,
            Question::Charged | Question::SharedBase | Question::IdleMemory => {
                self.value <= self.target
            }
        }
    }
}

/// Everything measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The rows, in the order they were measured.
    pub rows: Vec<Row>,
    /// Figures that could not be taken, and why.
    pub skipped: Vec<String>,
    /// The daemon with ten images mounted.
    pub memory: Memory,
    /// The machine's load average (1 minute) at the start and at the end.
    pub load: (f64, f64),
    /// CPUs of the machine.
    pub cpus: usize,
}

/// Measures. `say` is told what is being done.
pub fn run(options: &SteadyOptions, say: &dyn Fn(&str)) -> Result<Report> {
    let work = Workdir::below(&options.scratch);
    let before = load();
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry")))?;
    say("writing files and packing them into eStargz layers");
    let corpus = Corpus::build(&work, &lab, options)?;
    let mut node = Node::start(
        &work.sub("d"),
        &work.sub("pull"),
        "[containerd]\naddress = \"\"\n",
    )?;
    let sampler = Sampler::start(node.pid());

    let mut bench = Bench {
        options,
        work: &work,
        corpus: &corpus,
        rows: Vec::new(),
        skipped: Vec::new(),
    };
    say("pulling and reading the large file while it is being downloaded");
    let large = node.container(&corpus.large.reference, "large")?;
    bench.charged(Device::Filling, &node, &large, 1)?;
    say("pulling ten images on one base");
    let mut shared = Vec::new();
    for (index, image) in corpus.shared.iter().enumerate() {
        shared.push(node.container(&image.reference, &format!("shared-{index}"))?);
    }
    node.wait_until_complete(Duration::from_secs(900))?;
    say(&format!("letting the daemon idle for {:?}", options.idle));
    std::thread::sleep(options.idle);
    let memory = sampler.finish(node.pid());
    bench.rows.push(Row {
        question: Question::IdleMemory,
        device: Device::BlobFs,
        value: memory.idle_bytes as f64 / 1e6,
        range: (
            memory.idle_bytes as f64 / 1e6,
            memory.idle_bytes as f64 / 1e6,
        ),
        target: 60.0,
        lazy: memory.idle_bytes as f64,
        reference: 0.0,
        cpu_value: None,
    });

    say("measuring layers on BlobFs");
    bench.all(Device::BlobFs, &node, &large, &shared, say)?;
    say("mounting the layers again, now on their plain cache files");
    node.remount()?;
    if let Some(layer) = node.not_plain()? {
        bail!("layer {layer} is complete but still mounted from BlobFs");
    }
    bench.all(Device::Plain, &node, &large, &shared, say)?;
    Ok(Report {
        rows: bench.rows,
        skipped: bench.skipped,
        memory,
        load: (before, load()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
    })
}

struct Bench<'a> {
    options: &'a SteadyOptions,
    work: &'a Workdir,
    corpus: &'a Corpus,
    rows: Vec<Row>,
    skipped: Vec<String>,
}

impl Bench<'_> {
    fn all(
        &mut self,
        device: Device,
        node: &Node,
        large: &str,
        shared: &[String],
        say: &dyn Fn(&str),
    ) -> Result<()> {
        say("  warm reads");
        self.warm(device, node, large)?;
        say("  memory charged to a reader");
        self.charged(device, node, large, self.options.rounds)?;
        say("  page cache of ten images");
        self.shared(device, node, shared)
    }

    /// Both sides in one process, alternating: the large file, then the small ones.
    fn warm(&mut self, device: Device, node: &Node, container: &str) -> Result<()> {
        let trees = vec![
            self.tree("lazy", node.mounts(container)?)?,
            self.reference("reference", &self.corpus.large.lowers)?,
        ];
        for (question, files, passes, target) in [
            (
                Question::WarmRead,
                vec![images::LARGE_FILE.to_owned()],
                self.options.passes,
                0.9,
            ),
            (
                Question::SmallFiles,
                self.corpus.small_files.clone(),
                3,
                0.8,
            ),
        ] {
            let mut rounds = Vec::new();
            for _ in 0..self.options.rounds {
                let plan = Plan {
                    group: None,
                    trees: trees.clone(),
                    files: files.clone(),
                    task: Task::Alternate { passes },
                };
                rounds.push(reader::spawn(&plan, Duration::from_secs(300))?);
            }
            let seconds = |side: usize| {
                let rounds = rounds.iter().flat_map(move |round| &round.passes[side]);
                median(rounds.map(|pass| pass.seconds))
            };
            let cpu = |side: usize| {
                let rounds = rounds.iter().flat_map(move |round| &round.passes[side]);
                median(rounds.map(|pass| pass.cpu_seconds))
            };
            let of_round = rounds.iter().map(|round| {
                let side = |side: usize| median(round.passes[side].iter().map(|pass| pass.seconds));
                side(1) / side(0)
            });
            self.rows.push(Row {
                question,
                device,
                value: seconds(1) / seconds(0),
                range: range(of_round),
                target,
                lazy: seconds(0),
                reference: seconds(1),
                cpu_value: Some(cpu(1) / cpu(0)),
            });
        }
        Ok(())
    }

    /// What a fresh group is charged for reading the large file once, cold.
    fn charged(
        &mut self,
        device: Device,
        node: &Node,
        container: &str,
        rounds: usize,
    ) -> Result<()> {
        let what = format!("memory charged to a reader, {}", device.describe());
        let mut sides = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for lazy in [true, false] {
                let tree = if lazy {
                    self.tree("lazy", node.mounts(container)?)?
                } else {
                    self.reference("reference", &self.corpus.large.lowers)?
                };
                if device != Device::Filling || !lazy {
                    self.drop_caches(node, std::slice::from_ref(&tree), &[images::LARGE_FILE])?;
                }
                let Some(group) = self.group(&what) else {
                    return Ok(());
                };
                let charge = Self::read_once(&group, vec![tree], &[images::LARGE_FILE])?;
                let side = if lazy { &mut sides.0 } else { &mut sides.1 };
                side.push(charge.used as f64);
            }
        }
        let bytes = (self.options.megabytes << 20) as f64;
        let value = median(sides.0.iter().copied()) / bytes;
        if value < 0.95 {
            self.skipped.push(format!(
                "{what}: only {value:.2} of the file was charged, so it was not cold"
            ));
        }
        self.rows.push(Row {
            question: Question::Charged,
            device,
            value,
            range: range(sides.0.iter().map(|used| used / bytes)),
            target: 1.1,
            lazy: median(sides.0.iter().copied()),
            reference: median(sides.1.iter().copied()),
            cpu_value: None,
        });
        Ok(())
    }

    /// All base files read in each of ten containers: page cache of reader and daemon together.
    fn shared(&mut self, device: Device, node: &Node, containers: &[String]) -> Result<()> {
        let what = format!("page cache of ten images, {}", device.describe());
        let files: Vec<&str> = self.corpus.base_files.iter().map(String::as_str).collect();
        let mut sides = (Vec::new(), Vec::new());
        for _ in 0..self.options.rounds {
            for lazy in [true, false] {
                let mut trees = Vec::new();
                for (index, container) in containers.iter().enumerate() {
                    trees.push(if lazy {
                        self.tree(&format!("lazy-{index}"), node.mounts(container)?)?
                    } else {
                        self.reference(&format!("r-{index}"), &self.corpus.shared[index].lowers)?
                    });
                }
                self.drop_caches(node, &trees, &files)?;
                let (Some(group), Some(daemons)) = (self.group(&what), self.group(&what)) else {
                    return Ok(());
                };
                // What the daemon reads for the reader is part of the cost.
                let _moved = daemons.visit(node.pid())?;
                let charge = Self::read_once(&group, trees, &files)?;
                let side = if lazy { &mut sides.0 } else { &mut sides.1 };
                let daemon_cache = if lazy { daemons.charge()?.cache } else { 0 };
                side.push((charge.cache + daemon_cache) as f64);
            }
        }
        let (lazy, reference) = (
            median(sides.0.iter().copied()),
            median(sides.1.iter().copied()),
        );
        self.rows.push(Row {
            question: Question::SharedBase,
            device,
            value: lazy / reference,
            range: range(
                sides
                    .0
                    .iter()
                    .zip(&sides.1)
                    .map(|(lazy, other)| lazy / other),
            ),
            target: 1.1,
            lazy,
            reference,
            cpu_value: None,
        });
        Ok(())
    }

    fn read_once(group: &Group, trees: Vec<Tree>, files: &[&str]) -> Result<Charge> {
        let plan = Plan {
            group: Some(group.clone()),
            trees,
            files: files.iter().map(|&file| file.to_owned()).collect(),
            task: Task::Once,
        };
        let done = reader::spawn(&plan, Duration::from_secs(300))?;
        done.charged.context("the reader reported no charge")
    }

    /// Nothing of `files` stays in the page cache, on either side of the daemon.
    fn drop_caches(&self, node: &Node, trees: &[Tree], files: &[&str]) -> Result<()> {
        let plan = Plan {
            group: None,
            trees: trees.to_vec(),
            files: files.iter().map(|&file| file.to_owned()).collect(),
            task: Task::Drop,
        };
        // Dirty pages cannot be dropped.
        rustix::fs::syncfs(std::fs::File::open(self.work.path())?)?;
        reader::spawn(&plan, Duration::from_secs(120))?;
        node.drop_caches()
    }

    /// A fresh group, or the reason why there is none, said once.
    fn group(&mut self, what: &str) -> Option<Group> {
        match Group::make() {
            Ok(group) => Some(group),
            Err(error) => {
                let why = format!("SKIP: {what}: {error:#}");
                eprintln!("{why}");
                self.skipped.push(why);
                None
            }
        }
    }

    fn tree(&self, name: &str, mounts: Vec<Mount>) -> Result<Tree> {
        let root = self.work.sub("m").join(name);
        std::fs::create_dir_all(&root)?;
        Ok(Tree { mounts, root })
    }

    /// Ordinary overlayfs over ordinary directories, bottom first.
    fn reference(&self, name: &str, lowers: &[PathBuf]) -> Result<Tree> {
        let shown = |path: &Path| path.display().to_string();
        let list: Vec<_> = lowers.iter().rev().map(|lower| shown(lower)).collect();
        let upper = self.work.sub("upper").join(name);
        for part in ["fs", "work"] {
            std::fs::create_dir_all(upper.join(part))?;
        }
        let mount = Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                "index=off".into(),
                format!("lowerdir={}", list.join(":")),
                format!("upperdir={}", shown(&upper.join("fs"))),
                format!("workdir={}", shown(&upper.join("work"))),
            ],
        };
        self.tree(name, vec![mount])
    }
}

/// How many images share one base.
pub const SHARED_IMAGES: usize = BASE_IMAGES;

#[cfg(test)]
mod tests {
    use super::*;

    fn row(question: Question, value: f64, target: f64) -> Row {
        Row {
            question,
            device: Device::Plain,
            value,
            range: (value, value),
            target,
            lazy: 1.0,
            reference: 1.0,
            cpu_value: None,
        }
    }

    #[test]
    fn speeds_have_a_floor_and_memory_has_a_ceiling() {
        assert!(row(Question::WarmRead, 0.9, 0.9).met());
        assert!(!row(Question::WarmRead, 0.89, 0.9).met());
        assert!(row(Question::Charged, 1.1, 1.1).met());
        assert!(!row(Question::SharedBase, 1.2, 1.1).met());
        assert!(!row(Question::IdleMemory, f64::NAN, 60.0).met());
    }
}
