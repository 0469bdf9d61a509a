//! `snapctl doctor` and `snapctl registry`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Subcommand};

use super::{Global, output};
use crate::doctor::{self, Outcome, Places};

#[derive(Debug, Args)]
#[command(after_help = "Exits with 1 when something keeps layers from starting lazily.")]
pub(super) struct DoctorArgs {
    /// containerd's gRPC socket.
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    containerd: PathBuf,
    /// containerd's config file.
    #[arg(long, default_value = "/etc/containerd/config.toml")]
    containerd_config: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(super) enum RegistryCommand {
    /// Serve an OCI registry on a directory, for trying things out.
    #[command(after_help = "\
Examples:
  snapctl registry serve --dir /var/tmp/registry
  snapctl registry serve --dir /var/tmp/registry --link wan --log requests.jsonl")]
    Serve(ServeArgs),
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Where blobs and manifests are kept.
    #[arg(long)]
    dir: PathBuf,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Pretend to be behind a link: wan (100 Mbit/s, 40 ms), cloud (1 Gbit/s, 2 ms) or lan.
    #[arg(long)]
    link: Option<lab::LinkModel>,
    /// Append a JSON line for each request to this file.
    #[arg(long)]
    log: Option<PathBuf>,
}

pub(super) async fn doctor(global: &Global, args: DoctorArgs) -> Result<ExitCode> {
    let places = Places {
        address: global.address.clone(),
        admin: global.admin.clone(),
        containerd: args.containerd,
        containerd_config: args.containerd_config,
    };
    let checks = doctor::examine(&places).await;
    let bad = checks.iter().any(|check| check.outcome == Outcome::Bad);
    if global.json {
        output::json(&checks)?;
    } else {
        let width = checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        for check in &checks {
            let mark = match check.outcome {
                Outcome::Good => "ok  ",
                Outcome::Warning => "WARN",
                Outcome::Bad => "FAIL",
                Outcome::Unknown => "?   ",
            };
            output::line(&format!("{mark}  {:width$}  {}", check.name, check.found))?;
            for line in check.fix.iter().flat_map(|fix| fix.lines()) {
                output::line(&format!("      {:width$}  {line}", ""))?;
            }
        }
    }
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

pub(super) async fn registry(command: RegistryCommand) -> Result<ExitCode> {
    let RegistryCommand::Serve(args) = command;
    let options = lab::LabOptions {
        listen: args.listen,
        link: args.link,
        log_file: args.log,
        ..lab::LabOptions::new(args.dir)
    };
    let lab = lab::Lab::start(options).await?;
    output::line(&format!("serving {} (Ctrl-C ends)", lab.url()))?;
    tokio::signal::ctrl_c().await?;
    lab.stop().await;
    Ok(ExitCode::SUCCESS)
}
