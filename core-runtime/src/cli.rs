//! `snapctl`: everything a person types.

mod daemon;
mod image;
mod machine;
mod output;
mod run;

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use storage::registry::{
    Anonymous, ClientOptions, Credentials, DockerConfig, DockerConfigOptions, ProxyConfig,
    RegistryClient,
};

use crate::{
    image::RegistryAccess,
    runner::{self, Reexec, Stage},
    unpack,
};

/// Pull, convert, inspect and run images, and look into a running snapshotterd.
#[derive(Debug, Parser)]
#[command(
    name = "snapctl",
    version,
    max_term_width = 100,
    after_help = "An IMAGE is a registry reference (python:3.13, localhost:5000/app:1) or an OCI image layout \
                  (oci:DIR or oci:DIR:TAG)."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
struct Global {
    /// The daemon's gRPC socket.
    #[arg(
        long,
        global = true,
        env = "SNAPSHOTTERD_ADDRESS",
        default_value = "/run/snapshotterd/snapshotterd.sock"
    )]
    address: PathBuf,
    /// The daemon's admin socket.
    #[arg(
        long,
        global = true,
        env = "SNAPSHOTTERD_ADMIN",
        default_value = "/run/snapshotterd/admin.sock"
    )]
    admin: PathBuf,
    /// Directory of registry host configurations, as containerd's `config_path`.
    #[arg(long, global = true, default_value = "/etc/containerd/certs.d")]
    hosts_dir: PathBuf,
    /// Docker's configuration with credentials [default: $DOCKER_CONFIG/config.json or
    /// ~/.docker/config.json].
    #[arg(long, global = true)]
    docker_config: Option<PathBuf>,
    /// A registry host (HOST:PORT) to speak plain HTTP with; loopback hosts always are. Repeatable.
    #[arg(long, global = true, value_name = "HOST")]
    plain_http: Vec<String>,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// Print no progress.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Work with images.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Run a container in the foreground, starting before its image is downloaded.
    Run(run::RunArgs),
    /// Show what readers are waiting for: which blob, range and source, and for how long.
    Why,
    /// Check this machine and its containerd for everything lazy starts need.
    Doctor(machine::DoctorArgs),
    /// Serve or try registries.
    #[command(subcommand)]
    Registry(machine::RegistryCommand),
    /// Print a completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory.
    Man {
        /// The directory.
        dir: PathBuf,
    },
    /// A stage of starting a container or unpacking a layer; not for people.
    #[command(hide = true)]
    Stage {
        /// Which.
        name: String,
        /// Its description.
        file: PathBuf,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Stages are single-threaded on purpose: they unshare namespaces.
    if let Command::Stage { name, file } = &cli.command {
        return stage(name, file);
    }
    output::init_logging(cli.global.quiet);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = runtime.context("starting the runtime").and_then(|runtime| {
        let result = runtime.block_on(async {
            tokio::select! {
                result = execute(cli) => result,
                // Dropping what runs cleans up: private daemons, scratch directories.
                () = interrupted() => Err(anyhow::anyhow!("interrupted")),
            }
        });
        // Tasks drop their scratch directories here. Blocking work (a hash, a write) that goes on
        // after an error or Ctrl-C is not worth waiting for.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn stage(name: &str, file: &std::path::Path) -> ExitCode {
    if name == unpack::STAGE {
        return unpack::run_stage(file);
    }
    Stage::parse(name).map_or(ExitCode::from(2), |stage| runner::run_stage(stage, file))
}

/// Ctrl-C, except where a command handles signals itself by ending in time.
async fn interrupted() {
    let _ = tokio::signal::ctrl_c().await;
}

async fn execute(cli: Cli) -> Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Image(command) => image::execute(&global, command).await,
        Command::Run(args) => run::execute(&global, args).await,
        Command::Why => daemon::why(&global).await,
        Command::Doctor(args) => machine::doctor(&global, args).await,
        Command::Registry(command) => machine::registry(command).await,
        Command::Completion { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "snapctl",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
            clap_mangen::generate_to(Cli::command(), &dir)
                .with_context(|| dir.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Stage { .. } => Ok(ExitCode::from(2)),
    }
}

impl Global {
    /// One registry client for the whole command.
    fn registries(&self) -> Result<RegistryAccess> {
        let docker_config = self.docker_config.clone().or_else(|| {
            let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
            let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
            Some(dir.or_else(home)?.join("config.json"))
        });
        let credentials: Arc<dyn Credentials> = match docker_config {
            Some(path) => Arc::new(DockerConfig::new(DockerConfigOptions {
                path,
                ..DockerConfigOptions::default()
            })),
            None => Arc::new(Anonymous),
        };
        let proxy = ProxyConfig::from_vars(std::env::vars()).context("the proxy variables")?;
        Ok(RegistryAccess::new(RegistryClient::new(ClientOptions {
            hosts_dirs: vec![self.hosts_dir.clone()],
            plain_http: self.plain_http.clone(),
            proxy,
            credentials,
            ..ClientOptions::default()
        })))
    }
}

/// How this program starts its own stages.
fn reexec() -> Reexec {
    Reexec {
        program: "/proc/self/exe".into(),
        args: vec!["stage".into()],
    }
}
