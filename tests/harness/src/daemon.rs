//! `snapshotterd` on private directories.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    machine::binary,
    process::{Process, wait_for},
    workdir::Workdir,
};

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    dir: PathBuf,
    /// Short, whatever the directory's name is: all lowers have to fit into one mount call.
    lowers: Workdir,
    config: String,
    process: Option<Process>,
}

impl Daemon {
    /// Starts it below `dir` with the given config file text.
    ///
    /// # Panics
    /// When it does not listen within 20 s; its log is printed.
    pub fn start(dir: &Path, config: &str) -> Self {
        let mut daemon = Self {
            dir: dir.to_owned(),
            lowers: Workdir::below(Path::new("/tmp")),
            config: config.to_owned(),
            process: None,
        };
        daemon.restart();
        daemon
    }

    /// Starts it again after [`Self::kill`] or [`Self::terminate`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn restart(&mut self) {
        std::fs::create_dir_all(&self.dir).expect("the daemon's directory");
        let config = self.dir.join("config.toml");
        std::fs::write(&config, &self.config).expect("the config file");
        let mut command = Command::new(binary("snapshotterd"));
        command.arg("--config").arg(config).args(self.dir_args());
        command.args(["--log-level", "debug"]);
        let process = Process::start("snapshotterd", &mut command, &self.log_path())
            .expect("snapshotterd starts");
        let process = self.process.insert(process);
        let socket = self.dir.join("sd.sock");
        let log = self.dir.join("daemon.log");
        wait_for("snapshotterd to listen", Duration::from_secs(20), || {
            assert!(process.is_running(), "snapshotterd exited:\n{}", tail(&log));
            listens(&socket, process.pid())
        });
    }

    fn dir_args(&self) -> Vec<std::ffi::OsString> {
        let pairs = [
            ("--root", self.dir.join("root")),
            ("--state", self.dir.join("run")),
            ("--lowers", self.lowers()),
            ("--address", self.socket()),
        ];
        pairs
            .into_iter()
            .flat_map(|(flag, path)| [flag.into(), path.into()])
            .collect()
    }

    /// The gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("sd.sock")
    }

    /// The admin socket (HTTP).
    pub fn admin(&self) -> PathBuf {
        self.dir.join("run/admin.sock")
    }

    /// Where layers are mounted.
    pub fn lowers(&self) -> PathBuf {
        self.lowers.path().join("l")
    }

    /// The persistent directory.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The log file.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// The whole log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Its pid.
    ///
    /// # Panics
    /// When it is not running.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").pid()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM and wait: keeps mounts.
    pub fn terminate(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate(Duration::from_secs(15));
        }
    }

    /// `snapshotterd --unmount`: unmounts everything and ends the holder.
    pub fn unmount(&mut self) -> std::process::Output {
        self.terminate();
        Command::new("timeout")
            .args(["-k", "5", "30"])
            .arg(binary("snapshotterd"))
            .args(self.dir_args())
            .arg("--unmount")
            .output()
            .expect("snapshotterd --unmount starts")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let output = self.unmount();
        if !output.status.success() {
            eprintln!(
                "snapshotterd --unmount: {}\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        if std::thread::panicking() {
            eprintln!(
                "--- end of the daemon's log ---\n{}",
                tail(&self.log_path())
            );
        }
    }
}

/// The last 60 lines of a log.
pub fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Whether this very process listens. A child that a killed daemon was just forking may hold the old
/// socket a moment longer; what connects to that is reset.
fn listens(socket: &Path, pid: u32) -> bool {
    let Ok(stream) = UnixStream::connect(socket) else {
        return false;
    };
    rustix::net::sockopt::socket_peercred(&stream)
        .is_ok_and(|peer| u32::try_from(peer.pid.as_raw_pid()) == Ok(pid))
}
