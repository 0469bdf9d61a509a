//! Reads of one image beside thousands of reads that are stuck in another one.

use std::path::PathBuf;

use anyhow::{Result, bail};
use benches::{
    isolation::{self, Held, IsolationOptions, Report},
    signals,
};
use clap::{Parser, Subcommand};
use lab::LinkModel;

/// Measure what readers of one lazy image notice of thousands of reads that are stuck in another
/// one, whose registry accepts requests and never answers: 99th percentile of reads of local
/// content past the page cache, and of reads that ask their own registry; alone, beside the stuck
/// ones, and alone again. Then the registry answers, and every stuck read has to return its bytes.
#[derive(Debug, Parser)]
#[command(
    name = "isolation",
    max_term_width = 100,
    after_help = "\
Examples:
  isolation
  isolation --stuck 500 --rounds 2
  isolation --link lan --rounds 9 --json

Needs root, Linux 6.12 and room for as many threads as reads are stuck. Exits with 1 when a target
is missed and --strict is given."
)]
struct Options {
    #[command(subcommand)]
    stage: Option<Stage>,
    /// Rounds; figures are medians over them.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Reads that are stuck at the same time.
    #[arg(long, default_value_t = 5000)]
    stuck: u64,
    /// Timed reads of local content, three times a round.
    #[arg(long, default_value_t = 8000)]
    local_reads: usize,
    /// Timed reads that ask the registry, three times a round.
    #[arg(long, default_value_t = 150)]
    remote_reads: usize,
    /// Size of the local file in MB.
    #[arg(long, default_value_t = 64)]
    megabytes: u64,
    /// The line to the registry of the image that is measured: wan, cloud, lan or RATE,RTT.
    #[arg(long, default_value = "cloud")]
    link: LinkModel,
    /// Where temporary files go (about two megabytes for each remote read of each round).
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
        return isolation::run_from_stdin();
    }
    if !rustix::process::geteuid().is_root() {
        bail!("this benchmark mounts file systems: run it as root");
    }
    let report = isolation::run(
        &IsolationOptions {
            scratch: options.scratch,
            rounds: options.rounds.max(1),
            stuck: options.stuck.max(1),
            local_reads: options.local_reads.max(1),
            remote_reads: options.remote_reads.max(1),
            megabytes: options.megabytes.max(1),
            link: options.link,
            stop: signals::watch("isolation"),
        },
        &|line| eprintln!("isolation: {line}"),
    )?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report, &options.link);
    }
    let missed = report.rows.iter().filter(|row| !row.met()).count();
    let missed = missed + report.kept.len();
    if options.strict && missed > 0 {
        bail!("{missed} targets are missed");
    }
    Ok(())
}

fn print(report: &Report, link: &LinkModel) {
    let stuck = report.stuck;
    println!("latency of one read in ms; remote ones over {link}");
    println!(
        "{:8} {:>12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>7} {:>8}",
        "reads",
        "samples",
        "p50",
        "stuck",
        "p99",
        "stuck",
        "least",
        "stuck",
        "ratio",
        "noise",
        "target"
    );
    for row in &report.rows {
        let ms = |seconds: f64| format!("{:.3}", seconds * 1e3);
        println!(
            "{:8} {:>12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:6.2} {:7.2} {:>8}  {}",
            row.reads,
            format!("{}/{}", row.samples.0, row.samples.1),
            ms(row.p50.0),
            ms(row.p50.1),
            ms(row.p99.0),
            ms(row.p99.1),
            ms(row.quietest_p99.0),
            ms(row.quietest_p99.1),
            row.ratio,
            row.noise,
            format!("<= {:.1}", row.target),
            if row.met() { "met" } else { "MISSED" },
        );
    }
    println!(
        "stuck: beside {stuck} reads stuck in an image whose registry is silent, by the daemon's count, for\n\
         at most {:.1} s; the same threads sleep while the others are timed alone\n\
         p50, p99: medians over the measurements; least: smallest p99 of one measurement; ratio: of the\n\
         p99s; noise: p99 alone after the stuck reads over the one before",
        report.stuck_seconds
    );
    println!(
        "all {} reads that were stuck returned the right bytes",
        report.right
    );
    println!(
        "{:26} {:>8} {:>10} {:>12} {:>22} {:>18}",
        "daemon", "threads", "anon. MB", "descriptors", "connections (silent)", "(answering)"
    );
    let rows: [(&str, &Held); 4] = [
        ("before, idle", &report.before),
        ("while reads are stuck", &report.during),
        ("after the first round", &report.after_first),
        ("after the last round, idle", &report.after),
    ];
    for (when, held) in rows {
        println!(
            "{when:26} {:8} {:10.1} {:12} {:22} {:18}",
            held.threads,
            held.anonymous_bytes as f64 / 1e6,
            held.descriptors,
            held.stalling_connections,
            held.answering_connections
        );
    }
    for kept in &report.kept {
        println!("NOT GIVEN BACK: {kept}");
    }
    println!(
        "load average {:.1} before, {:.1} after, on {} CPUs",
        report.load.0, report.load.1, report.cpus
    );
}
