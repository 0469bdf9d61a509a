//! Reads and memory in the steady state, against ordinary overlayfs in the same run.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use benches::steady::{self, Question, Report, Row, SHARED_IMAGES, SteadyOptions};
use clap::{Parser, Subcommand};

/// Measure what lazily served layers cost once they are local: warm reads, small files, memory
/// charged to readers, page cache of images on one base, and the idle daemon's memory. Everything
/// is compared with ordinary overlayfs over the same files on the same disk, interleaved.
#[derive(Debug, Parser)]
#[command(
    name = "steady",
    max_term_width = 100,
    after_help = "\
Examples:
  steady
  steady --rounds 9 --scratch /mnt/disk --json

Needs root, Linux 6.12 and a memory controller (cgroup v1 or v2). Exits with 1 when a target is
missed and --strict is given."
)]
struct Options {
    #[command(subcommand)]
    stage: Option<Stage>,
    /// Rounds; every figure is a median over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Passes over the large file in each round, for each side.
    #[arg(long, default_value_t = 8)]
    passes: usize,
    /// Size of the large file in MB.
    #[arg(long, default_value_t = 256)]
    megabytes: u64,
    /// How many small files.
    #[arg(long, default_value_t = 10_000)]
    small_files: usize,
    /// Seconds the daemon idles before its memory is read.
    #[arg(long, default_value_t = 10)]
    idle: u64,
    /// Where temporary files go (about five times the large file).
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Print the result as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail when a target is missed.
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Subcommand)]
enum Stage {
    /// Reads; started by this program itself.
    #[command(hide = true)]
    Reader,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(Stage::Reader) = options.stage {
        return steady::run_from_stdin();
    }
    if !rustix::process::geteuid().is_root() {
        bail!("this benchmark mounts file systems: run it as root");
    }
    let report = steady::run(
        &SteadyOptions {
            scratch: options.scratch,
            rounds: options.rounds.max(1),
            passes: options.passes.max(1),
            megabytes: options.megabytes.max(1),
            small_files: options.small_files.max(1),
            idle: Duration::from_secs(options.idle),
        },
        &|line| eprintln!("steady: {line}"),
    )?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let missed = report.rows.iter().filter(|row| !row.met()).count();
    if options.strict && missed > 0 {
        bail!("{missed} targets are missed");
    }
    Ok(())
}

fn print(report: &Report) {
    println!(
        "{:34} {:20} {:>8} {:>15} {:>8}  {:6} {:>10} {:>10} {:>6}",
        "", "layers", "measured", "(rounds)", "target", "", "lazy", "overlayfs", "in CPU"
    );
    for row in &report.rows {
        let (label, sign, digits) = match row.question {
            Question::WarmRead => ("large file warm, speed", ">=", 2),
            Question::SmallFiles => ("small files warm, speed", ">=", 2),
            Question::Charged => ("charged to the reader / file", "<=", 2),
            Question::SharedBase => ("page cache, images on one base", "<=", 2),
            Question::IdleMemory => ("idle daemon, anonymous MB", "<=", 1),
        };
        let (lazy, reference) = sides(row);
        println!(
            "{label:34} {:20} {:8.digits$} {:>15} {sign:>3}{:5.1}  {:6} {lazy:>10} {reference:>10} {:>6}",
            row.device.describe(),
            row.value,
            format!("({:.digits$}..{:.digits$})", row.range.0, row.range.1),
            row.target,
            if row.met() { "met" } else { "MISSED" },
            row.cpu_value
                .map_or(String::new(), |value| format!("{value:.2}")),
        );
    }
    println!(
        "daemon with {} images on it: anonymous {:.1} MB idle, {:.1} MB at its peak; resident peak {:.1} MB",
        SHARED_IMAGES + 1,
        report.memory.idle_bytes as f64 / 1e6,
        report.memory.anonymous_peak_bytes as f64 / 1e6,
        report.memory.resident_peak_bytes as f64 / 1e6,
    );
    for skipped in &report.skipped {
        println!("{skipped}");
    }
    println!(
        "load average {:.1} before, {:.1} after, on {} CPUs",
        report.load.0, report.load.1, report.cpus
    );
    if report.load.0.max(report.load.1) > 2.0 * report.cpus as f64 {
        println!("the machine was busy: speeds in wall time are unreliable, see \"in CPU\"");
    }
}

fn sides(row: &Row) -> (String, String) {
    let shown = |value: f64| match row.question {
        Question::WarmRead | Question::SmallFiles => format!("{:.1} ms", value * 1e3),
        Question::Charged | Question::SharedBase | Question::IdleMemory => {
            format!("{:.1} MB", value / 1e6)
        }
    };
    let reference = match row.question {
        Question::IdleMemory => String::new(),
        _ => shown(row.reference),
    };
    (shown(row.lazy), reference)
}
