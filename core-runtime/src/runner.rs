//! Starts one process in a root file system, in the foreground.
//!
//! The caller's program re-executes itself twice (`Stage::Namespaces`, `Stage::Init`): the first
//! stage makes a private mount namespace, in which the root file system is mounted, so that
//! nothing stays mounted however the container ends; then an installed OCI runtime takes over, or,
//! where there is none, the second stage enters the root as process 1 of new namespaces and
//! executes the program. The embedded way isolates names and resources; it installs no seccomp
//! filter and no cgroup limits, so it is for trying things out, not for hostile images.

mod embedded;
mod mounts;
mod oci;

use std::{
    io::{self, Read as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus, Stdio},
};

use serde::{Deserialize, Serialize};

pub use mounts::Mount;

use crate::process::{Process, ProcessError};

/// Which engine starts the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// An OCI runtime of the go-runc dialect (runc, crun, youki).
    Oci(PathBuf),
    /// Namespaces and pivot_root by this program.
    Embedded,
}

impl Engine {
    /// The first of runc, crun and youki on `path` (a `PATH` value), else the embedded one.
    pub fn detect(path: &std::ffi::OsStr) -> Self {
        let found = ["runc", "crun", "youki"].iter().find_map(|name| {
            std::env::split_paths(path)
                .map(|dir| dir.join(name))
                .find(|path| path.is_file())
        });
        found.map_or(Self::Embedded, Self::Oci)
    }
}

/// A container to run in the foreground.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// Unique name.
    pub id: String,
    /// An empty private directory.
    pub bundle: PathBuf,
    /// How to make the root file system, in order, as the snapshots service states it.
    pub mounts: Vec<Mount>,
    /// What to start.
    pub process: Process,
    /// Host name inside.
    pub hostname: String,
    /// Bind mounts: host path, path inside, read-only.
    pub binds: Vec<(PathBuf, PathBuf, bool)>,
    /// Which engine.
    pub engine: Engine,
}

/// Why a container could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A step of the setup failed.
    #[error("{step}")]
    Step {
        /// What was being done, with its path.
        step: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The process cannot be made.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A mount the embedded mounter does not know.
    #[error("mount type {0:?} needs containerd's mount manager")]
    UnknownMount(String),
}

impl RunError {
    fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let step = step.into();
        move |source| Self::Step { step, source }
    }
}

/// How the hidden stages are started: a program and the arguments that select the stage, e.g.
/// `/proc/self/exe` and `["stage"]`. The stage's name is appended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reexec {
    /// The program.
    pub program: PathBuf,
    /// Arguments before the stage's name.
    pub args: Vec<String>,
}

/// The hidden stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Private mounts; starts the engine.
    Namespaces,
    /// Process 1 of the embedded engine.
    Init,
}

impl Stage {
    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Init => "init",
        }
    }

    /// The stage of a name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Namespaces, Self::Init]
            .into_iter()
            .find(|stage| stage.name() == name)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct StageInput {
    container: Container,
    reexec: Reexec,
}

/// A container that runs: its first stage, whose end is the container's end.
#[derive(Debug)]
pub struct Running {
    child: std::process::Child,
}

/// Starts `container` with this program's standard streams, or with `stdout` for its output.
pub fn start(container: &Container, reexec: &Reexec, stdout: Stdio) -> Result<Running, RunError> {
    let mut command = Command::new(&reexec.program);
    command.args(&reexec.args).arg(Stage::Namespaces.name());
    // The description goes through a file: standard input belongs to the container.
    let path = container.bundle.join("container.json");
    let input = StageInput {
        container: container.clone(),
        reexec: reexec.clone(),
    };
    let json = serde_json::to_vec(&input)
        .map_err(io::Error::from)
        .map_err(RunError::step("describing the container"))?;
    std::fs::write(&path, json).map_err(RunError::step(format!("writing {}", path.display())))?;
    let child = command
        .arg(&path)
        .stdout(stdout)
        .spawn()
        .map_err(RunError::step(format!(
            "starting {}",
            reexec.program.display()
        )))?;
    Ok(Running { child })
}

impl Running {
    /// Pid of the first stage; signals sent to it are forwarded to the container by the engine.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The container's output, when `start` was given a pipe.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Whether it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Ends everything: the mount and pid namespaces die with their processes.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The exit code a shell would show.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

/// Body of a hidden stage; `path` is the description [`start`] wrote.
pub fn run_stage(stage: Stage, path: &Path) -> ExitCode {
    let result = read_input(path).and_then(|input| match stage {
        Stage::Namespaces => namespaces(&input, path),
        Stage::Init => embedded::init(&input.container).map(|()| 0),
    });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let mut message = format!("snapctl: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                message = format!("{message}: {cause}");
                source = cause.source();
            }
            let _ = writeln!(io::stderr(), "{message}");
            ExitCode::from(125)
        }
    }
}

fn read_input(path: &Path) -> Result<StageInput, RunError> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(RunError::step(format!("reading {}", path.display())))?;
    serde_json::from_str(&text)
        .map_err(io::Error::from)
        .map_err(RunError::step("reading the container's description"))
}

/// Makes a private mount namespace for this process and mounts there.
pub fn mount_privately(mounts: &[Mount], root: &Path) -> Result<(), RunError> {
    crate::sys::unshare_namespaces(rustix::thread::UnshareFlags::NEWNS)
        .map_err(RunError::step("making a mount namespace (are you root?)"))?;
    mounts::make_private()?;
    mounts::mount_all(mounts, root)
}

fn namespaces(input: &StageInput, path: &Path) -> Result<u8, RunError> {
    let container = &input.container;
    // The container ends with whoever started it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(io::Error::from)
        .map_err(RunError::step("asking to die with the parent"))?;
    let rootfs = container.bundle.join("rootfs");
    std::fs::create_dir_all(&rootfs)
        .map_err(RunError::step(format!("making {}", rootfs.display())))?;
    mount_privately(&container.mounts, &rootfs)?;
    match &container.engine {
        Engine::Oci(program) => oci::run(program, container, &rootfs),
        Engine::Embedded => embedded::run(&input.reexec, path),
    }
}
