//! The other processes of this crate's tests: a daemon with scripted sources, its holder and mount
//! helpers, and readers that report what they saw. Not installed, not part of the product.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "its output is what the tests read"
)]

mod pattern;
mod reader;
mod script;
mod sys;

use std::{error::Error, io::BufRead, path::PathBuf, process::ExitCode, time::Duration};

use fuse::{BlobFs, BlobFsOptions, CommandLine, holder, mounts};
use serde_json::json;

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.is_empty() {
        eprintln!("usage: blobfs-fixture holder|mount-helper|serve|read ...");
        return ExitCode::FAILURE;
    }
    let command = args.remove(0);
    let args = Args(args);
    let outcome = match command.as_str() {
        "holder" => {
            let socket = args.path("--socket");
            return match socket {
                Ok(socket) => holder::run(&holder::HolderOptions { socket }),
                Err(_) => ExitCode::FAILURE,
            };
        }
        "mount-helper" => return mounts::run_child(),
        "serve" => serve(&args),
        "read" => reader::run(&args),
        other => Err(format!("unknown subcommand {other}").into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{command}: {e}");
            let mut source = e.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// `--name value` pairs.
struct Args(Vec<String>);

impl Args {
    fn text(&self, name: &str) -> Option<&str> {
        let at = self.0.iter().position(|arg| arg == name)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn path(&self, name: &str) -> Result<PathBuf, Box<dyn Error>> {
        let text = self
            .text(name)
            .ok_or_else(|| format!("{name} is missing"))?;
        Ok(text.into())
    }

    fn number(&self, name: &str, default: u64) -> Result<u64, Box<dyn Error>> {
        match self.text(name) {
            Some(text) => Ok(text.parse()?),
            None => Ok(default),
        }
    }
}

/// A daemon: says `ready {...}` once it serves, then obeys lines on stdin: `stats`, `holds`,
/// `settle`, `mount IMAGE NODE TARGET`, `abandon NODE`, `stop` (mounts stay), `unmount`. The end of stdin means nothing, so that it can be killed at any time.
fn serve(args: &Args) -> Outcome {
    let exe = std::env::current_exe()?;
    let state = args.path("--state")?;
    let script = script::Script::load(&args.path("--script")?)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let helper = mounts::Helper::new(CommandLine::new(&exe, ["mount-helper"]))
        .with_claims(state.join("helpers"));
    let mut options = BlobFsOptions::new(
        args.path("--mount")?,
        &state,
        CommandLine::new(&exe, ["holder"]),
        helper.clone(),
        runtime.handle().clone(),
    );
    options.read_deadline = Duration::from_millis(args.number("--deadline-ms", 60_000)?);
    options.fence_timeout = Duration::from_millis(args.number("--fence-ms", 20_000)?);
    options.max_read_bytes = u32::try_from(args.number("--max-read", 128 << 10)?)?;
    options.readers = usize::try_from(args.number("--readers", 2)?)?;
    let blobfs = runtime.block_on(BlobFs::start(options, script.nodes()))?;
    println!(
        "ready {}",
        json!({
            "adopted": blobfs.adopted(),
            "resent": blobfs.condition().resent,
            "replayed": blobfs.stats().replayed,
            "locked": blobfs.condition().replies_locked,
        })
    );
    for line in std::io::stdin().lock().lines() {
        match line?.trim() {
            "stats" => {
                let stats = blobfs.stats();
                println!(
                    "stats {}",
                    json!({
                        "reads": stats.reads,
                        "read_bytes": stats.read_bytes,
                        "errors": stats.errors,
                        "waiting": stats.waiting,
                        "used": stats.nodes_in_use,
                        "opened": script.opened(),
                        "closed": script.closed(),
                        "alive": blobfs.is_alive(),
                    })
                );
            }
            "holds" => {
                // An error is a holder that is being replaced.
                let sessions = blobfs.held_sessions().ok();
                println!("holds {}", json!({ "sessions": sessions }));
            }
            "settle" => {
                let left = runtime.block_on(helper.settle(Duration::from_secs(5)));
                let stuck = left.iter().filter(|l| l.running).count();
                println!("settled {}", json!({ "left": left.len(), "stuck": stuck }));
            }
            line @ ("stop" | "unmount") => {
                runtime.block_on(blobfs.stop(line == "stop"))?;
                println!("stopped {{}}");
                return Ok(());
            }
            line => {
                if let Some(node) = line.strip_prefix("abandon ") {
                    let count = blobfs.abandon(node.parse()?);
                    println!("abandoned {}", json!({ "count": count }));
                }
                if let ["mount", image, node, target] = line.split(' ').collect::<Vec<_>>()[..] {
                    let mount = mounts::ErofsMount {
                        metadata: image.into(),
                        devices: vec![blobfs.path(node.parse()?)],
                        target: target.into(),
                        direct_io: false,
                    };
                    let helper = helper.clone();
                    runtime.spawn(async move {
                        let done = helper.mount_erofs(&mount, Duration::from_secs(20)).await;
                        println!(
                            "mounted {}",
                            json!({ "error": done.err().map(|e| e.to_string()) })
                        );
                    });
                }
            }
        }
    }
    loop {
        std::thread::park();
    }
}
