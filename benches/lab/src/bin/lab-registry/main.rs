//! `lab-registry`: the lab registry as a program.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use lab::{Auth, Credentials, LabOptions, LinkModel, Server, Tls};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

mod selftest;

const EXAMPLES: &str = "\
Examples:
  A registry on a directory, as fast as the machine:
    lab-registry --dir /srv/lab --listen 127.0.0.1:5000

  The same behind 100 Mbit/s and 40 ms, with TLS and a request log:
    lab-registry --dir /srv/lab --listen 127.0.0.1:5000 --link wan --tls --log requests.jsonl

  Another line, tokens for everyone that live 30 seconds, blobs by redirect:
    lab-registry --dir /srv/lab --link 20mbit,150ms --auth bearer --token-life 30 --redirect 20

  Hold the next three requests for one blob, then let them go (PORT is the admin port printed at
  start; docs/lab.md lists all controls):
    curl -d '{\"match\":{\"digest\":\"sha256:...\"},\"times\":3,\"action\":{\"do\":\"stall\"}}' \\
      http://127.0.0.1:PORT/_lab/rules
    curl -X DELETE http://127.0.0.1:PORT/_lab/rules/1

  Measure throughput and the accuracy of the link model on this machine:
    lab-registry selftest";

/// An OCI registry with a link model, scripted faults and a request log.
#[derive(Debug, Parser)]
#[command(
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure throughput and the accuracy of the link model
    Selftest(selftest::Options),
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
struct Serve {
    /// Directory of the content; created where missing
    #[arg(long, required = true)]
    dir: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Line in front of it: wan, cloud, lan, or RATE,RTT such as 100mbit,40ms
    #[arg(long)]
    link: Option<LinkModel>,
    /// Uploads take their time on the line too
    #[arg(long, requires = "link")]
    shape_uploads: bool,
    /// Serve TLS with a private CA, written to DIR/ca.pem
    #[arg(long)]
    tls: bool,
    /// Serve TLS with a certificate that nobody can trust
    #[arg(long, conflicts_with = "tls")]
    tls_untrusted: bool,
    /// Further names for the certificate
    #[arg(long, value_name = "NAME")]
    tls_name: Vec<String>,
    /// Who may pull and push
    #[arg(long, value_enum, default_value_t = AuthMode::None)]
    auth: AuthMode,
    /// Credentials for basic; optional for bearer, which without them gives tokens to anyone
    #[arg(long, value_name = "USER:PASSWORD")]
    user: Option<String>,
    /// Life of a token in seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    token_life: u64,
    /// Answer GETs of blobs with a redirect signed for so long
    #[arg(long, value_name = "SECONDS")]
    redirect: Option<u64>,
    /// Append a JSON line per request to this file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Address of the control port
    #[arg(long, default_value = "127.0.0.1:0")]
    admin: SocketAddr,
    /// No control endpoints at all
    #[arg(long)]
    no_admin: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AuthMode {
    None,
    Basic,
    Bearer,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Runtime::new().context("start the runtime")?;
    match cli.command {
        Some(Command::Selftest(options)) => runtime.block_on(selftest::run(&options)),
        None => runtime.block_on(serve(cli.serve.into_options()?)),
    }
}

/// Serves until SIGINT or SIGTERM. The first line printed says where, as JSON.
async fn serve(options: LabOptions) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let server = Server::bind(options)?;
    let handle = server.handle();
    let ready = json!({
        "url": handle.url(),
        "admin": handle.admin_addr().map(|addr| format!("http://{addr}/_lab/")),
        "link": handle.link().map(|link| link.to_string()),
        "ca_pem": handle.ca_pem_path(),
    });
    println!("{ready}");
    server
        .run(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await;
    Ok(())
}

impl Serve {
    fn into_options(self) -> anyhow::Result<LabOptions> {
        // The command line parser wants it unless there is a subcommand.
        let dir = self.dir.context("--dir is needed")?;
        let credentials = self
            .user
            .as_deref()
            .map(|text| {
                let (user, password) = text
                    .split_once(':')
                    .context("--user is not USER:PASSWORD")?;
                anyhow::Ok(Credentials {
                    user: user.into(),
                    password: password.into(),
                })
            })
            .transpose()?;
        let auth = match self.auth {
            AuthMode::None => Auth::None,
            AuthMode::Basic => Auth::Basic(credentials.context("--auth basic needs --user")?),
            AuthMode::Bearer => Auth::Bearer {
                credentials,
                expires_in: Duration::from_secs(self.token_life),
            },
        };
        let tls = match (self.tls, self.tls_untrusted) {
            (true, _) => Tls::PrivateCa,
            (_, true) => Tls::SelfSigned,
            _ => Tls::Off,
        };
        Ok(LabOptions {
            listen: self.listen,
            link: self.link.map(|link| LinkModel {
                shape_uploads: self.shape_uploads,
                ..link
            }),
            tls,
            tls_names: self.tls_name,
            auth,
            redirect: self.redirect.map(Duration::from_secs),
            log_file: self.log,
            admin: (!self.no_admin).then_some(self.admin),
            ..LabOptions::new(dir)
        })
    }
}
