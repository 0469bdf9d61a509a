//! The daemon's program.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use fuse::{
    CommandLine,
    holder::{self, HolderOptions},
    mounts,
};
use snapshotterd::{
    config::{Config, Overrides},
    daemon::Daemon,
    logging,
    notify::Notify,
    sys,
};
use tokio::signal::unix::{SignalKind, signal};

/// Starts containers before their images are downloaded: a proxy snapshotter for containerd.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Command {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    flags: Flags,
    /// Unmount everything of this root and state, stop the holder, and exit. Containers that still
    /// use these mounts get errors.
    #[arg(long)]
    unmount: bool,
}

#[derive(Debug, Args)]
struct Flags {
    /// The configuration file [default: /etc/snapshotterd/config.toml, if there].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The gRPC socket [default: snapshotterd.sock in the state directory].
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Persistent data [default: /var/lib/snapshotterd].
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Sockets, locks and mount points [default: /run/snapshotterd].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// A short directory for lower directories [default: /run/sd/l].
    #[arg(long, value_name = "DIR")]
    lowers: Option<PathBuf>,
    /// error, warn, info, debug, trace, or directives such as info,snapshotterd::store=debug.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Show or check the configuration.
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
    /// Keep FUSE sessions alive over restarts of the daemon (started by it).
    Holder {
        /// Its socket; lock and log lie beside it.
        #[arg(long, value_name = "SOCKET")]
        socket: PathBuf,
    },
    /// Mount and unmount on behalf of the daemon (started by it).
    MountHelper,
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Print the effective configuration.
    Dump(Flags),
    /// Say what is wrong with the configuration.
    Check(Flags),
}

fn main() -> ExitCode {
    sys::limit_heaps();
    let command = Command::parse();
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("snapshotterd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command.part {
        Some(Part::Config { action }) => configure(action)?,
        Some(Part::Holder { socket }) => return Ok(holder::run(&HolderOptions { socket })),
        Some(Part::MountHelper) => return Ok(mounts::run_child()),
        None if command.unmount => unmount(command.flags)?,
        None => serve(command.flags)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn configure(action: ConfigAction) -> anyhow::Result<()> {
    match action {
        ConfigAction::Dump(flags) => print!("{}", load(flags)?.dump()?),
        ConfigAction::Check(flags) => {
            load(flags)?;
            println!("ok");
        }
    }
    Ok(())
}

fn load(flags: Flags) -> anyhow::Result<Config> {
    let overrides = Overrides {
        root: flags.root,
        state: flags.state,
        lowers: flags.lowers,
        address: flags.address,
        log_level: flags.log_level,
    };
    Ok(Config::load(flags.config.as_deref(), &overrides)?)
}

fn unmount(flags: Flags) -> anyhow::Result<()> {
    let config = load(flags)?;
    logging::start(&config.log)
        .map_err(anyhow::Error::msg)
        .context("cannot start logging")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    runtime()?.block_on(Daemon::unmount(
        config,
        CommandLine::new(program, ["mount-helper"]),
    ))?;
    Ok(())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

fn serve(flags: Flags) -> anyhow::Result<()> {
    let config = load(flags)?;
    logging::start(&config.log)
        .map_err(anyhow::Error::msg)
        .context("cannot start logging")?;
    let notify = Notify::new(std::env::var_os("NOTIFY_SOCKET"));
    runtime()?.block_on(async {
        // Before anything is started, so that an early signal is not lost.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let daemon = Daemon::start_with(config, proxies()).await?;
        notify.ready();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; mounts stay");
        notify.stopping();
        daemon.stop(true).await?;
        Ok(())
    })
}

/// The variables that name proxies, upper and lower case.
fn proxies() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.to_ascii_lowercase().ends_with("_proxy"))
        .collect()
}
