//! `snapctl run`.

use std::{
    path::PathBuf,
    process::{ExitCode, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use clap::Args;
use formats::oci::HostPlatform;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use super::{Global, output, reexec};
use crate::{
    image::{Image, Location, Store},
    process::Process,
    pull::{self, PullOptions},
    runner::{self, Container, Engine},
    snapshots::Snapshots,
};

/// Arguments of `snapctl run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  snapctl run localhost:5000/app:esgz
  snapctl run --env MODE=test python:3.13 -- python3 -c 'print(1)'

The container has no network but loopback, and its changes are dropped when it ends. Its exit code
is snapctl's; 125 means that it could not be started.")]
pub(super) struct RunArgs {
    /// The image.
    image: Location,
    /// Arguments instead of the image's command.
    #[arg(last = true)]
    args: Vec<String>,
    /// Set NAME=VALUE in the environment. Repeatable.
    #[arg(long, short)]
    env: Vec<String>,
    /// Bind a host path: HOST:CONTAINER or HOST:CONTAINER:ro. Repeatable.
    #[arg(long, short)]
    volume: Vec<String>,
    /// The container's name and host name.
    #[arg(long)]
    name: Option<String>,
    /// `embedded`, or an OCI runtime's path [default: runc, crun or youki on PATH, else embedded].
    #[arg(long)]
    engine: Option<PathBuf>,
    /// Download and unpack the whole image first, for comparison.
    #[arg(long)]
    eager: bool,
}

pub(super) async fn execute(global: &Global, args: RunArgs) -> Result<ExitCode> {
    let binds = args
        .volume
        .iter()
        .map(|text| parse_bind(text))
        .collect::<Result<Vec<_>>>()?;
    let store = Arc::new(Store::open(&args.image, &global.registries()?)?);
    let image = Image::read(&store, &HostPlatform::current()).await?;
    let process = Process::from_image(&image.config.config, &args.args, &args.env)?;
    let snapshots = Snapshots::connect(&global.address, "snapctl").await?;
    let options = PullOptions {
        scratch: pull::default_scratch(),
        reexec: reexec(),
        eager: args.eager,
    };
    let total = image.manifest.layers.iter().map(|layer| layer.size).sum();
    let bar = output::bytes_bar(global.quiet, "pulling", total);
    let counting = output::counting(&bar);
    let pulled = pull::pull(&store, &args.image, image, &snapshots, &options, &counting).await?;
    bar.finish_and_clear();

    let id = args
        .name
        .unwrap_or_else(|| format!("run-{}", std::process::id()));
    let key = format!("snapctl/{}/{id}", std::process::id());
    let mounts = snapshots.prepare(&key, &pulled.top).await?;
    let bundle = tempfile::tempdir().context("a directory for the container")?;
    let container = Container {
        id: id.clone(),
        bundle: bundle.path().to_owned(),
        mounts,
        process,
        hostname: id,
        binds,
        engine: engine(args.engine),
    };
    let result = foreground(&container).await;
    // Also after an error: the snapshot would stay otherwise.
    snapshots.remove(&key).await?;
    result
}

fn engine(chosen: Option<PathBuf>) -> Engine {
    match chosen {
        Some(name) if name.as_os_str() == "embedded" => Engine::Embedded,
        Some(program) => Engine::Oci(program),
        None => Engine::detect(&std::env::var_os("PATH").unwrap_or_default()),
    }
}

fn parse_bind(text: &str) -> Result<(PathBuf, PathBuf, bool)> {
    let parts: Vec<_> = text.split(':').collect();
    match parts.as_slice() {
        [from, to] => Ok((from.into(), to.into(), false)),
        [from, to, "ro"] => Ok((from.into(), to.into(), true)),
        _ => anyhow::bail!("{text:?}: write HOST:CONTAINER or HOST:CONTAINER:ro"),
    }
}

async fn foreground(container: &Container) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut running = runner::start(container, &reexec(), Stdio::inherit())?;
    let pid = i32::try_from(running.pid()).ok().and_then(Pid::from_raw);
    let mut ended = tokio::task::spawn_blocking(move || running.wait());
    loop {
        tokio::select! {
            status = &mut ended => return Ok(ExitCode::from(runner::exit_code(status??))),
            // On a terminal the container's processes get SIGINT themselves; it is process 1 there,
            // so without a handler of its own only SIGKILL ends it.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                if let Some(pid) = pid {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
    }
}
