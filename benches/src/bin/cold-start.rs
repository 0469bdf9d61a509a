//! Cold starts of the python image through containerd 2.4.2, side by side in one run.

use std::{cell::RefCell, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};
use benches::{
    containerd::{Bench, Start, System},
    figures::{median, range},
    floor::floor,
    sample::{self, SampleOptions},
};
use clap::Parser;
use harness::{containerd::Line, machine::binary, workdir::Workdir};
use lab::{Lab, LabOptions, LinkModel};

/// Measure cold starts through containerd, side by side: containerd's tuned overlayfs pull,
/// snapshotterd with an image nobody optimised, and with an optimised one.
#[derive(Debug, Parser)]
#[command(name = "cold-start", max_term_width = 100)]
struct Options {
    /// Links to measure.
    #[arg(long, value_delimiter = ',', default_values = ["wan", "cloud"])]
    links: Vec<LinkModel>,
    /// Rounds; each measures every system once, on fresh directories.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Uncompressed size of the image in MB.
    #[arg(long, default_value_t = 420)]
    megabytes: u64,
    /// `full`, `idle` or `off`.
    #[arg(long, default_value = "full")]
    hydration: String,
    /// Where temporary files go.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Print every start as JSON lines as well.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(why) = Line::V2_4.missing() {
        bail!("this benchmark needs containerd 2.4.2: {why}");
    }
    let work = Workdir::below(&options.scratch);
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry")))?;
    let size = SampleOptions {
        payload_bytes: options.megabytes << 20,
        ..SampleOptions::default()
    };
    let layout = sample::build(&work.sub("image"), size, &mut |line| {
        eprintln!("cold-start: {line}");
    })?;
    let source = format!("oci:{}", layout.dir.display());
    let named = |tag: &str| format!("{}/python:{tag}", lab.host());
    let record = work.path().join("record.json").display().to_string();
    snapctl(&["image", "copy", &source, &named("plain")])?;
    snapctl(&["image", "convert", &source, &named("esgz")])?;
    snapctl(&[
        "image",
        "record",
        &source,
        "--until-line",
        sample::READY_LINE,
        "--out",
        &record,
    ])?;
    snapctl(&[
        "image",
        "convert",
        "--record",
        &record,
        &source,
        &named("optimised"),
    ])?;
    let start_list = start_list_bytes(&named("optimised"))?;

    let config = format!("[lazy]\nhydration = {:?}\n", options.hydration);
    let bench = Bench {
        lab: &lab,
        scratch: &options.scratch,
        line: Line::V2_4,
        daemon_config: config,
        kept: RefCell::default(),
    };
    println!(
        "python image: {:.1} MB compressed, {} entries; the start needs {:.1} MB; containerd {}; hydration {}",
        layout.compressed_bytes as f64 / 1e6,
        layout.entries,
        start_list as f64 / 1e6,
        Line::V2_4.version(),
        options.hydration,
    );
    for link in &options.links {
        let mut starts = Vec::new();
        for round in 1..=options.rounds {
            for (system, tag) in [
                (System::Overlayfs, "plain"),
                (System::Lazy, "esgz"),
                (System::Optimised, "optimised"),
            ] {
                eprintln!("cold-start: {link}, round {round}: {}", system.describe());
                let start = bench.start(system, &named(tag), *link)?;
                if options.json {
                    println!("{}", serde_json::to_string(&start)?);
                }
                starts.push(start);
            }
        }
        report(link, &starts, start_list, layout.compressed_bytes);
    }
    Ok(())
}

fn report(link: &LinkModel, starts: &[Start], start_list: u64, image_bytes: u64) {
    let of = |system: System| starts.iter().filter(move |start| start.system == system);
    let warm = median(of(System::Overlayfs).map(|start| start.warm_seconds));
    let floor = floor(link, Duration::from_secs_f64(warm), start_list).as_secs_f64();
    let eager = median(of(System::Overlayfs).map(|start| start.seconds));
    println!(
        "\n{link} (of these: inside snapshotterd's answers): floor {floor:.2} s (local start {warm:.2} s)"
    );
    println!(
        "{:31} {:>22} {:>9} {:>8} {:>7} {:>8}  {:>26} {:>8}",
        "",
        "seconds (min..max)",
        "of eager",
        "of floor",
        "pull",
        "of these",
        "MB demand+prefetch (image)",
        "requests"
    );
    for system in [System::Overlayfs, System::Lazy, System::Optimised] {
        let seconds = median(of(system).map(|start| start.seconds));
        let (low, high) = range(of(system).map(|start| start.seconds));
        let needed =
            median(of(system).map(|start| (start.demand_bytes + start.prefetch_bytes) as f64));
        let needed = if system == System::Overlayfs {
            image_bytes as f64
        } else {
            needed
        };
        println!(
            "{:31} {:6.2} ({:5.2}..{:5.2}) {:9.2} {:8.2} {:7.2} {:8.2}  {:15.1} ({:4.1} %) {:8.0}",
            system.describe(),
            seconds,
            low,
            high,
            seconds / eager,
            seconds / floor,
            median(of(system).map(|start| start.pull_seconds)),
            median(of(system).map(|start| start.answer_seconds)),
            needed / 1e6,
            100.0 * needed / image_bytes as f64,
            median(of(system).map(|start| start.requests as f64)),
        );
    }
}

fn snapctl(args: &[&str]) -> Result<Vec<u8>> {
    eprintln!("cold-start: snapctl {}", args.join(" "));
    let output = Command::new(binary("snapctl"))
        .args(args)
        .output()
        .context("snapctl")?;
    if !output.status.success() {
        bail!(
            "snapctl {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

fn start_list_bytes(image: &str) -> Result<u64> {
    let report: serde_json::Value =
        serde_json::from_slice(&snapctl(&["--json", "image", "inspect", image])?)?;
    let layers = report["layers"].as_array().context("layers")?;
    Ok(layers
        .iter()
        .filter_map(|layer| layer["start_list_bytes"].as_u64())
        .sum())
}
