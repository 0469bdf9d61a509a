//! `snapctl image …`.

use std::{fs::File, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use formats::oci::HostPlatform;

use super::{Global, daemon, output, reexec};
use crate::{
    convert::{self, ConvertOptions, Step},
    image::{Image, Location, Store},
    inspect,
    pull::{self, Outcome, PullOptions},
    record::{Record, recorder},
    snapshots::Snapshots,
};

/// Subcommands of `snapctl image`.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Convert an image to eStargz, so that it starts before it is downloaded.
    #[command(after_help = "\
Examples:
  snapctl image convert python:3.13 localhost:5000/python:3.13-esgz
  snapctl image record python:3.13 --out start.json
  snapctl image convert --record start.json python:3.13 oci:/tmp/python:optimised")]
    Convert(ConvertArgs),
    /// Copy an image as it is, between registries and image layouts.
    Copy(CopyArgs),
    /// Run an image once and write down which files its start reads, for `convert --record`.
    #[command(after_help = "\
Example:
  snapctl image record localhost:5000/app:1 --until-line ready --out start.json")]
    Record(RecordArgs),
    /// Show an image's layers, which of them start lazily, and why the others do not.
    Inspect(PlaceArgs),
    /// Pull an image into a running snapshotterd.
    Pull(PullArgs),
    /// Show the daemon's layers: lazy or why not, percent local, bytes by cause, verdict.
    Status {
        /// Only layers of this image.
        image: Option<String>,
    },
}

/// An image and a platform.
#[derive(Debug, Args)]
pub(super) struct PlaceArgs {
    /// The image.
    image: Location,
    /// Which platform of a multi-platform image, e.g. linux/arm64 [default: this machine's].
    #[arg(long, value_parser = platform)]
    platform: Option<HostPlatform>,
}

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// The image to convert.
    source: Location,
    /// Where to store the result.
    target: Location,
    /// A record of the files to place first, from `snapctl image record` (or `ctr-remote`).
    #[arg(long)]
    record: Option<PathBuf>,
    /// Split files into chunks of this many bytes.
    #[arg(long, default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(4096..=64 << 20))]
    chunk_size: u32,
    /// Compression level.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u8).range(1..=12))]
    level: u8,
    /// Layers converted at the same time [default: processors].
    #[arg(long)]
    jobs: Option<usize>,
    /// Which platform of a multi-platform image, e.g. linux/arm64 [default: this machine's].
    #[arg(long, value_parser = platform)]
    platform: Option<HostPlatform>,
    /// Directory for temporary files (twice the uncompressed image).
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CopyArgs {
    /// The image to copy.
    source: Location,
    /// Where to.
    target: Location,
    /// Which platform of a multi-platform image, e.g. linux/arm64 [default: this machine's].
    #[arg(long, value_parser = platform)]
    platform: Option<HostPlatform>,
    /// Directory for temporary files.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct RecordArgs {
    /// The image.
    image: Location,
    /// Arguments instead of the image's command.
    #[arg(last = true)]
    args: Vec<String>,
    /// Where to write the record.
    #[arg(long, short, default_value = "record.json")]
    out: PathBuf,
    /// Stop when the container prints a line that contains this.
    #[arg(long, value_name = "TEXT")]
    until_line: Option<String>,
    /// Stop after this many seconds at the latest.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// The daemon's program [default: snapshotterd beside snapctl, or on PATH].
    #[arg(long)]
    snapshotterd: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Download and unpack everything instead of serving lazily.
    #[arg(long)]
    eager: bool,
}

fn platform(text: &str) -> Result<HostPlatform, String> {
    HostPlatform::parse(text)
        .ok_or_else(|| "write os/architecture[/variant], e.g. linux/arm64".to_owned())
}

pub(super) async fn execute(global: &Global, command: ImageCommand) -> Result<ExitCode> {
    match command {
        ImageCommand::Convert(args) => convert(global, args).await,
        ImageCommand::Copy(args) => copy(global, args).await,
        ImageCommand::Record(args) => record(global, args).await,
        ImageCommand::Inspect(args) => inspect(global, args).await,
        ImageCommand::Pull(args) => pull(global, args).await,
        ImageCommand::Status { image } => daemon::status(global, image.as_deref()).await,
    }
}

async fn convert(global: &Global, args: ConvertArgs) -> Result<ExitCode> {
    let access = global.registries()?;
    let source = Arc::new(Store::open(&args.source, &access)?);
    let target = Arc::new(Store::open(&args.target, &access)?);
    let record = match &args.record {
        Some(path) => {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            Some(Record::read(file).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let image = Image::read(
        &source,
        &args.platform.unwrap_or_else(HostPlatform::current),
    )
    .await?;
    let options = ConvertOptions {
        chunk_size_bytes: args.chunk_size,
        level: args.level,
        record,
        jobs: args
            .jobs
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
        scratch: args.scratch,
    };
    let total = image.manifest.layers.iter().map(|layer| layer.size).sum();
    let bar = output::bytes_bar(global.quiet, "converting", total);
    let moving = bar.clone();
    let progress = Arc::new(move |step: Step, bytes: u64| {
        if step == Step::Read {
            moving.inc(bytes);
        }
    });
    let converted = convert::to_estargz(&source, &image, &target, &options, progress).await?;
    bar.finish_and_clear();
    if global.json {
        output::json(&converted)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        ["LAYER", "BEFORE", "AFTER", "PLACED FIRST", "LAZY"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for layer in &converted.layers {
        rows.push(vec![
            output::short(&layer.digest.to_string()).to_owned(),
            output::human(layer.source_bytes),
            output::human(layer.bytes),
            layer.prioritized.to_string(),
            layer
                .not_lazy
                .as_ref()
                .map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
        ]);
    }
    output::table(&rows)?;
    output::line(&format!("{} {}", args.target, converted.digest))?;
    Ok(ExitCode::SUCCESS)
}

async fn copy(global: &Global, args: CopyArgs) -> Result<ExitCode> {
    let access = global.registries()?;
    let source = Store::open(&args.source, &access)?;
    let target = Store::open(&args.target, &access)?;
    let image = Image::read(
        &source,
        &args.platform.unwrap_or_else(HostPlatform::current),
    )
    .await?;
    let total = image.manifest.layers.iter().map(|layer| layer.size).sum();
    let bar = output::bytes_bar(global.quiet, "copying", total);
    let moving = bar.clone();
    let progress: convert::Progress = Arc::new(move |step, bytes| {
        if step == Step::Stored {
            moving.inc(bytes);
        }
    });
    let digest = convert::copy(&source, &image, &target, &args.scratch, &progress).await?;
    bar.finish_and_clear();
    if global.json {
        output::json(&serde_json::json!({ "digest": digest }))?;
    } else {
        output::line(&format!("{} {digest}", args.target))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn record(global: &Global, args: RecordArgs) -> Result<ExitCode> {
    let access = global.registries()?;
    let options = recorder::RecordOptions {
        args: args.args,
        until_line: args.until_line,
        limit: std::time::Duration::from_secs(args.seconds),
        snapshotterd: args.snapshotterd,
        reexec: reexec(),
        quiet: global.quiet,
    };
    let recorded = recorder::record(&args.image, &access, options).await?;
    let file = File::create(&args.out).with_context(|| args.out.display().to_string())?;
    recorded
        .record
        .write(std::io::BufWriter::new(file))
        .with_context(|| args.out.display().to_string())?;
    if global.json {
        output::json(&recorded.summary)?;
    } else {
        output::line(&format!(
            "{}: {} files; {} of {} were fetched in {:.1} s ({})",
            args.out.display(),
            recorded.record.entries.len(),
            output::human(recorded.summary.bytes_local),
            output::human(recorded.summary.payload_bytes),
            recorded.summary.seconds,
            recorded.summary.ended,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn inspect(global: &Global, args: PlaceArgs) -> Result<ExitCode> {
    let store = Store::open(&args.image, &global.registries()?)?;
    let image = Image::read(&store, &args.platform.unwrap_or_else(HostPlatform::current)).await?;
    let report = inspect::inspect(&store, &image).await?;
    if global.json {
        output::json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!(
        "{}  {}  {}",
        report.image, report.platform, report.digest
    ))?;
    output::line(&format!("starts: {}\n", report.command.join(" ")))?;
    let heading = [
        "LAYER",
        "FORMAT",
        "SIZE",
        "FILES",
        "UNPACKED",
        "START LIST",
        "LAZY",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    let maybe = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::human);
    for layer in &report.layers {
        rows.push(vec![
            output::short(&layer.digest.to_string()).to_owned(),
            layer.format.to_owned(),
            output::human(layer.bytes),
            layer
                .entries
                .map_or_else(|| "-".to_owned(), |entries| entries.to_string()),
            maybe(layer.payload_bytes),
            maybe(layer.start_list_bytes),
            layer
                .reason
                .as_ref()
                .map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
        ]);
    }
    output::table(&rows)?;
    Ok(ExitCode::SUCCESS)
}

async fn pull(global: &Global, args: PullArgs) -> Result<ExitCode> {
    let store = Arc::new(Store::open(&args.place.image, &global.registries()?)?);
    let image = Image::read(
        &store,
        &args.place.platform.unwrap_or_else(HostPlatform::current),
    )
    .await?;
    let snapshots = Snapshots::connect(&global.address, "snapctl").await?;
    let options = PullOptions {
        scratch: pull::default_scratch(),
        reexec: reexec(),
        eager: args.eager,
    };
    let total = image.manifest.layers.iter().map(|layer| layer.size).sum();
    let bar = output::bytes_bar(global.quiet, "pulling", total);
    let counting = output::counting(&bar);
    let pulled = pull::pull(
        &store,
        &args.place.image,
        image,
        &snapshots,
        &options,
        &counting,
    )
    .await?;
    bar.finish_and_clear();
    if global.json {
        output::json(&pulled.layers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        ["LAYER", "SIZE", "HOW", "SECONDS"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for layer in &pulled.layers {
        let how = match layer.outcome {
            Outcome::Lazy => "lazy",
            Outcome::Unpacked => "downloaded and unpacked",
            Outcome::Present => "was there",
        };
        let digest = layer.digest.to_string();
        let seconds = format!("{:.2}", layer.millis as f64 / 1000.0);
        rows.push(vec![
            output::short(&digest).to_owned(),
            output::human(layer.bytes),
            how.to_owned(),
            seconds,
        ]);
    }
    output::table(&rows)?;
    output::line(&format!("{} {}", args.place.image, pulled.image.digest))?;
    Ok(ExitCode::SUCCESS)
}
