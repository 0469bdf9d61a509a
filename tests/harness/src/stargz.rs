//! Upstream's stargz-snapshotter, the daemon, on private directories.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    containerd::Proxy,
    daemon::tail,
    machine::cache_dir,
    process::{Process, wait_for},
};

/// The version driven.
pub const VERSION: &str = "0.19.1";

/// The name under which it is registered.
pub const PLUGIN: &str = "stargz";

/// A running stargz-snapshotter.
#[derive(Debug)]
pub struct StargzSnapshotter {
    dir: PathBuf,
    process: Process,
}

/// Its program, when this machine has it.
fn program() -> Option<PathBuf> {
    let path = cache_dir()
        .join("peers")
        .join(format!("stargz-snapshotter-{VERSION}/stargz-snapshotter"));
    path.is_file().then_some(path)
}

/// Why it cannot be started here, for a skip message.
pub fn missing() -> Option<String> {
    if program().is_none() {
        return Some(format!(
            "no stargz-snapshotter {VERSION} (tests/peers/build builds it; needs Go)"
        ));
    }
    (!Path::new("/dev/fuse").exists()).then(|| "no /dev/fuse".to_owned())
}

impl StargzSnapshotter {
    /// Starts it below `dir` with the given config file text (upstream's format).
    ///
    /// # Panics
    /// When its program is missing (ask [`missing`] first) or it does not listen in 20 s.
    pub fn start(dir: &Path, config: &str) -> Self {
        let program = program().expect("asked missing() first");
        std::fs::create_dir_all(dir.join("root")).expect("stargz-snapshotter's directory");
        let file = dir.join("config.toml");
        std::fs::write(&file, config).expect("the config file");
        let log = dir.join("stargz.log");
        let socket = dir.join("s.sock");
        let mut command = Command::new(program);
        command.arg("--address").arg(&socket);
        command.arg("--root").arg(dir.join("root"));
        command.arg("--config").arg(file);
        command.args(["--log-level", "debug"]);
        let mut process = Process::start("stargz-snapshotter", &mut command, &log)
            .expect("stargz-snapshotter starts");
        wait_for(
            "stargz-snapshotter to listen",
            Duration::from_secs(20),
            || {
                assert!(
                    process.is_running(),
                    "stargz-snapshotter exited:\n{}",
                    tail(&log)
                );
                UnixStream::connect(&socket).is_ok()
            },
        );
        Self {
            dir: dir.to_owned(),
            process,
        }
    }

    /// How containerd is told about it.
    pub fn proxy(&self) -> Proxy {
        Proxy {
            name: PLUGIN.into(),
            socket: self.dir.join("s.sock"),
            root: self.dir.join("root"),
        }
    }

    /// Its log file: JSON lines.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("stargz.log")
    }

    /// The whole log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

impl Drop for StargzSnapshotter {
    fn drop(&mut self) {
        // SIGINT unmounts everything, which SIGTERM does not.
        self.process.signal(rustix::process::Signal::INT);
        let until = Instant::now() + Duration::from_secs(10);
        while self.process.is_running() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Whoever still reads from its mounts gets an error once it is gone.
        self.process.kill();
        if std::thread::panicking() {
            eprintln!(
                "--- end of stargz-snapshotter's log ---\n{}",
                tail(&self.log_path())
            );
        }
    }
}
