//! `./run demo`: a container starts before its image is downloaded.

use std::{path::PathBuf, process::ExitCode};

use benches::{
    demo::{self, DemoOptions, Figures, Talk},
    sample::SampleOptions,
    signals,
};
use clap::Parser;
use lab::LinkModel;

/// Show a container starting before its image is downloaded.
#[derive(Debug, Parser)]
#[command(name = "demo", max_term_width = 100)]
struct Options {
    /// The simulated link: wan (100 Mbit/s, 40 ms), cloud (1 Gbit/s, 2 ms) or lan.
    #[arg(long, default_value = "wan")]
    link: LinkModel,
    /// Uncompressed size of the sample image in MB.
    #[arg(long, default_value_t = 420)]
    megabytes: u64,
    /// Where temporary files go (about five times the image).
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let talk = Talk::new(signals::watch("demo"));
    let demo_options = DemoOptions {
        link: options.link,
        sample: SampleOptions {
            payload_bytes: options.megabytes << 20,
            ..SampleOptions::default()
        },
        scratch: options.scratch,
    };
    match demo::run(&demo_options, &talk) {
        Ok(figures) if options.json => {
            println!(
                "{}",
                figures.iter().map(as_json).collect::<serde_json::Value>()
            );
            ExitCode::SUCCESS
        }
        Ok(figures) => {
            print_table(&figures);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn as_json(figures: &Figures) -> serde_json::Value {
    serde_json::json!({
        "way": figures.way.describe(),
        "seconds_to_ready": figures.seconds,
        "served_bytes": figures.served_bytes,
        "demand_bytes": figures.demand_bytes,
        "prefetch_bytes": figures.prefetch_bytes,
        "requests": figures.requests,
        "percent_local": figures.percent_local,
    })
}

fn print_table(figures: &[Figures]) {
    let megabytes = |bytes: Option<u64>| {
        bytes.map_or_else(
            || "-".to_owned(),
            |bytes| format!("{:.1}", bytes as f64 / 1e6),
        )
    };
    println!();
    println!("                    seconds   MB before ready                 requests   image");
    println!("                    to ready     total   demand  prefetch    answered   local");
    for row in figures {
        println!(
            "{:18}  {:8.2}  {:>8}  {:>7}  {:>8}    {:8}  {:4.0} %",
            row.way.describe(),
            row.seconds,
            megabytes(Some(row.served_bytes)),
            megabytes(row.demand_bytes),
            megabytes(row.prefetch_bytes),
            row.requests,
            row.percent_local,
        );
    }
    let (Some(full), Some(best)) = (figures.first(), figures.last()) else {
        return;
    };
    if figures.len() > 1 {
        println!();
        println!(
            "The optimised image was ready {:.1} times sooner than the full pull.",
            full.seconds / best.seconds
        );
    }
}
