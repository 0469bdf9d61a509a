//! Real containerd of several lines, each on a private socket, root and state directory.

use std::{
    ffi::OsStr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use crate::{
    daemon::tail,
    machine::{cache_dir, deb_program, has_cgroups, runc},
    process::{Process, wait_for},
};

/// The name under which the daemon is registered.
pub const PLUGIN: &str = "snapshotterd";

/// A containerd line the tests can drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// 1.6.20, Debian 12's package.
    V1_6,
    /// 2.3.7, the LTS line.
    V2_3,
    /// 2.4.2.
    V2_4,
}

impl Line {
    /// All lines, newest first.
    pub const ALL: [Self; 3] = [Self::V2_4, Self::V2_3, Self::V1_6];

    /// The version driven.
    pub fn version(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6.20",
            Self::V2_3 => "2.3.7",
            Self::V2_4 => "2.4.2",
        }
    }

    /// The folder with `containerd`, `ctr` and the shim, when this machine has it.
    pub fn programs(self) -> Option<PathBuf> {
        match self {
            Self::V1_6 => Some(
                deb_program("containerd-1.6", "usr/bin/containerd")?
                    .parent()?
                    .to_owned(),
            ),
            Self::V2_3 | Self::V2_4 => {
                let dir = cache_dir()
                    .join("peers")
                    .join(format!("containerd-{}", self.version()));
                ["containerd", "ctr", "containerd-shim-runc-v2"]
                    .iter()
                    .all(|p| dir.join(p).exists())
                    .then_some(dir)
            }
        }
    }

    /// Why no container can be started by it here, for a skip message.
    pub fn cannot_run(self) -> Option<String> {
        let no_cgroups = || "no cgroup hierarchy is mounted: runc cannot start containers".into();
        self.missing().or_else(|| (!has_cgroups()).then(no_cgroups))
    }

    /// Why [`Self::programs`] or runc is missing, for a skip message.
    pub fn missing(self) -> Option<String> {
        if runc().is_none() {
            return Some("no runc (tests/peers/debs unpacks it)".into());
        }
        self.programs().is_none().then(|| match self {
            Self::V1_6 => "no containerd 1.6.20 (tests/peers/debs unpacks it)".to_owned(),
            _ => format!(
                "no containerd {} (tests/peers/build builds it; needs Go)",
                self.version()
            ),
        })
    }
}

/// A snapshotter daemon that containerd is to know.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Its name there.
    pub name: String,
    /// Its gRPC socket.
    pub socket: PathBuf,
    /// Its persistent directory.
    pub root: PathBuf,
}

impl Proxy {
    /// Its part of containerd's config.
    fn section(&self, line: Line) -> String {
        let Self { name, socket, root } = self;
        let (socket, root) = (socket.display().to_string(), root.display().to_string());
        let plugin =
            format!("[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = {socket:?}\n");
        if line == Line::V1_6 {
            return plugin;
        }
        format!(
            "{plugin}  [proxy_plugins.{name}.exports]\n    root = {root:?}\n    enable_remote_snapshot_annotations = \"true\"\n"
        )
    }

    /// What lets the transfer service unpack into it.
    fn unpacking(&self) -> String {
        format!(
            r#"  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/amd64"
    snapshotter = "{}"
    differ = "walking"
"#,
            self.name
        )
    }
}

/// How containerd is configured.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The line.
    pub line: Line,
    /// The daemon's gRPC socket and root, when it is to be registered as [`PLUGIN`].
    pub snapshotter: Option<(PathBuf, PathBuf)>,
    /// Snapshotter that CRI uses.
    pub cri_snapshotter: String,
    /// The sandbox (pause) image CRI uses.
    pub sandbox_image: String,
    /// `hosts.toml` directory.
    pub hosts_dir: PathBuf,
    /// Parallel downloads in ranges and parallel unpacking (2.x).
    pub tuned: bool,
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    setup: Setup,
    programs: PathBuf,
    process: Process,
}

impl Containerd {
    /// Starts it below `dir`.
    ///
    /// # Panics
    /// When its programs are missing (ask [`Line::missing`] first) or it does not listen in 30 s.
    pub fn start(dir: &Path, setup: Setup) -> Self {
        Self::start_with(dir, setup, &[])
    }

    /// As [`Self::start`], with further snapshotter daemons beside [`Setup::snapshotter`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_with(dir: &Path, setup: Setup, others: &[Proxy]) -> Self {
        let programs = setup.line.programs().expect("asked Line::missing first");
        std::fs::create_dir_all(dir).expect("containerd's directory");
        std::fs::create_dir_all(&setup.hosts_dir).expect("hosts directory");
        let config = dir.join("containerd.toml");
        std::fs::write(&config, config_text(dir, &setup, others))
            .expect("containerd's config file");
        let log = dir.join("containerd.log");
        let mut command = Command::new(programs.join("containerd"));
        command
            .arg("--config")
            .arg(&config)
            .env("PATH", path_with(&programs));
        let mut process =
            Process::start("containerd", &mut command, &log).expect("containerd starts");
        let socket = dir.join("c.sock");
        wait_for("containerd to listen", Duration::from_secs(30), || {
            assert!(process.is_running(), "containerd exited:\n{}", tail(&log));
            UnixStream::connect(&socket).is_ok()
        });
        Self {
            dir: dir.to_owned(),
            setup,
            programs,
            process,
        }
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Its log file.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("containerd.log")
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its line.
    pub fn line(&self) -> Line {
        self.setup.line
    }

    /// `ctr ARGS` against it, in namespace `default`, ended after `seconds`.
    ///
    /// # Panics
    /// When `timeout(1)` cannot be started.
    pub fn ctr_within<S: AsRef<OsStr>>(
        &self,
        seconds: u32,
        args: impl IntoIterator<Item = S>,
    ) -> Output {
        self.client(&self.programs.join("ctr"), seconds, args)
    }

    /// As [`Self::ctr_within`], 120 s, and must succeed; returns stdout.
    ///
    /// # Panics
    /// When ctr fails.
    pub fn ctr<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let args: Vec<_> = args
            .into_iter()
            .map(|arg| arg.as_ref().to_owned())
            .collect();
        let output = self.ctr_within(120, &args);
        self.expect_success("ctr", &args, &output)
    }

    /// Upstream's `ctr-remote ARGS` against it (Debian trixie's stargz-snapshotter package).
    pub fn ctr_remote<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Option<Output> {
        let program = deb_program("ctr-remote", "usr/bin/ctr-remote")?;
        Some(self.client(&program, 180, args))
    }

    /// `ctr` with the connection flags, for callers that start it themselves.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.programs.join("ctr"));
        command
            .arg("--address")
            .arg(self.socket())
            .env("PATH", path_with(&self.programs));
        command
    }

    fn client<S: AsRef<OsStr>>(
        &self,
        program: &Path,
        seconds: u32,
        args: impl IntoIterator<Item = S>,
    ) -> Output {
        Command::new("timeout")
            .args(["-k", "5", &seconds.to_string()])
            .arg(program)
            .arg("--address")
            .arg(self.socket())
            .args(args)
            .env("PATH", path_with(&self.programs))
            .output()
            .expect("timeout(1) starts")
    }

    fn expect_success(&self, what: &str, args: &[std::ffi::OsString], output: &Output) -> String {
        assert!(
            output.status.success(),
            "{what} {args:?} on containerd {}: {}\n{}\n{}\n--- containerd ---\n{}",
            self.setup.line.version(),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            tail(&self.log_path()),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `ctr` in a form for `ctr run`: the flags that select the private runc.
    pub fn run_flags(&self) -> Vec<String> {
        let runc = runc().expect("asked Line::missing first");
        vec!["--runc-binary".into(), runc.display().to_string()]
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers first: their shims outlive containerd.
        for namespace in ["default", "k8s.io"] {
            let listed = self.ctr_within(20, ["--namespace", namespace, "tasks", "ls", "-q"]);
            for id in String::from_utf8_lossy(&listed.stdout).split_whitespace() {
                let _ = self.ctr_within(
                    20,
                    [
                        "--namespace",
                        namespace,
                        "tasks",
                        "kill",
                        "-a",
                        "-s",
                        "SIGKILL",
                        id,
                    ],
                );
                let _ = self.ctr_within(20, ["--namespace", namespace, "tasks", "rm", "-f", id]);
            }
        }
        self.process.terminate(Duration::from_secs(10));
    }
}

fn path_with(programs: &Path) -> String {
    let runc = runc()
        .and_then(|path| Some(path.parent()?.display().to_string()))
        .unwrap_or_default();
    format!(
        "{}:{runc}:{}",
        programs.display(),
        std::env::var("PATH").unwrap_or_default()
    )
}

fn config_text(dir: &Path, setup: &Setup, others: &[Proxy]) -> String {
    let Setup {
        tuned,
        snapshotter,
        cri_snapshotter,
        sandbox_image,
        hosts_dir,
        ..
    } = setup;
    let dir = dir.display();
    let hosts_dir = hosts_dir.display();
    let runc = runc()
        .map(|path| path.display().to_string())
        .unwrap_or_default();
    let ours = snapshotter.as_ref().map(|(socket, root)| Proxy {
        name: PLUGIN.into(),
        socket: socket.clone(),
        root: root.clone(),
    });
    let proxies: Vec<&Proxy> = ours.iter().chain(others).collect();
    let proxy: String = proxies
        .iter()
        .map(|proxy| proxy.section(setup.line))
        .collect();
    if setup.line == Line::V1_6 {
        return format!(
            r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{cri_snapshotter}"
    disable_snapshot_annotations = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{hosts_dir}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{dir}/cni"
    conf_dir = "{dir}/cni"
{proxy}"#
        );
    }
    let tuning = if *tuned {
        "  max_concurrent_downloads = 10\n  concurrent_layer_fetch_buffer = 8388608\n  max_concurrent_unpacks = 4\n"
    } else {
        ""
    };
    let unpack: String = proxies.iter().map(|proxy| proxy.unpacking()).collect();
    format!(
        r#"version = 3
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/c.sock.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{cri_snapshotter}"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{sandbox_image}"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{hosts_dir}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{runc}"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{dir}/cni"]
    conf_dir = "{dir}/cni"
[plugins."io.containerd.transfer.v1.local"]
  config_path = "{hosts_dir}"
{tuning}  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/amd64"
    snapshotter = "overlayfs"
    differ = "walking"
{unpack}{proxy}"#
    )
}
