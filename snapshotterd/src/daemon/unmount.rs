//! `--unmount`: leaving nothing mounted and nothing running.

use std::{fs, io, path::Path, time::Duration};

use fuse::{
    CommandLine,
    mounts::{Helper, mountinfo},
};
use rustix::{
    net::sockopt::socket_peercred,
    process::{Pid, Signal, kill_process},
};

use super::{Daemon, DaemonError, open};
use crate::{
    admin::Routes,
    config::Config,
    drivers::{Context, Drivers},
    lock, logging,
    metrics::Metrics,
};

const BOUND: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

impl Daemon {
    /// Takes down everything that daemons of this root and state have mounted and started: first
    /// as the drivers know it, then whatever mountinfo still shows below `lowers` and `state`,
    /// then the holder. Snapshots stay; a daemon started later mounts again. Fails while a daemon
    /// is running.
    ///
    /// `helper` starts `snapshotterd mount-helper`.
    pub async fn unmount(config: Config, helper: CommandLine) -> Result<(), DaemonError> {
        let config = std::sync::Arc::new(config);
        let (store, _locks) = {
            let config = std::sync::Arc::clone(&config);
            tokio::task::spawn_blocking(move || open(&config)).await??
        };
        let context = Context {
            config: std::sync::Arc::clone(&config),
            store: store.clone(),
            metrics: Metrics::default(),
            routes: Routes::default(),
            environment: std::sync::Arc::from([]),
        };
        // What a driver cannot do is left to the sweep; a mount that stays is reported by it.
        match Drivers::start(&context) {
            Ok(drivers) => {
                for driver in drivers.iter() {
                    if let Err(error) = driver.unmount().await {
                        let error = logging::chain(&error);
                        tracing::warn!(driver = driver.name(), error, "unmount");
                    }
                }
            }
            Err(error) => tracing::warn!(error = logging::chain(&error), "start the drivers"),
        }
        store.flush().await?;
        sweep(&config, &Helper::new(helper)).await?;
        let state = config.state.clone();
        tokio::task::spawn_blocking(move || end_holders(&state)).await?;
        Ok(())
    }
}

/// Unmounts what is still mounted below our directories, latest first: an upper mount hides and
/// pins what is below it. A mount in use is detached: it goes with its last user.
async fn sweep(config: &Config, helper: &Helper) -> Result<(), DaemonError> {
    let ours = [&config.lowers, &config.state];
    let wrap = |source| DaemonError::Directory {
        path: config.state.clone(),
        source,
    };
    let mut mounted = mountinfo().map_err(wrap)?;
    mounted.retain(|mount| {
        ours.iter()
            .any(|directory| mount.target.starts_with(directory))
    });
    for mount in mounted.iter().rev() {
        let target = &mount.target;
        if helper.umount(target, false, BOUND).await.is_ok() {
            continue;
        }
        helper
            .umount(target, true, BOUND)
            .await
            .map_err(|error| wrap(io::Error::other(logging::chain(&error))))?;
    }
    Ok(())
}

/// Ends holders that still listen below `state`. With nothing mounted they hold nothing that
/// anybody could use.
fn end_holders(state: &Path) {
    for socket in holder_sockets(state, 2) {
        let Some(pid) = peer(&socket) else {
            continue;
        };
        if !end(pid, Signal::TERM) && !end(pid, Signal::KILL) {
            tracing::warn!(pid = pid.as_raw_nonzero(), "the holder does not end");
        }
    }
}

/// Signals a process and waits up to two seconds for its end.
fn end(pid: Pid, signal: Signal) -> bool {
    // Gone already is what we want.
    let _ = kill_process(pid, signal);
    (0..100).any(|_| {
        let gone = !lock::process_is_alive(pid.as_raw_nonzero().get().unsigned_abs());
        if !gone {
            std::thread::sleep(POLL);
        }
        gone
    })
}

fn holder_sockets(directory: &Path, depth: u32) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && depth > 0 {
            found.extend(holder_sockets(&entry.path(), depth - 1));
        } else if entry.file_name() == "holder.sock" {
            found.push(entry.path());
        }
    }
    found
}

/// The process that listens on a holder's socket, if it really is a holder: a pid is only
/// signalled when its command line says so.
fn peer(socket: &Path) -> Option<Pid> {
    let stream = crate::service::socket::connect(socket).ok()?;
    let pid = socket_peercred(&stream).ok()?.pid;
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    arguments
        .split(|byte| *byte == 0)
        .any(|argument| argument == b"holder")
        .then_some(pid)
}
