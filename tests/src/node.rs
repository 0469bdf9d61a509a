//! A node as a user has it: containerd with the daemon, and a registry to pull from.

use harness::{
    containerd::{Containerd, Line, PLUGIN, Setup},
    daemon::Daemon,
    workdir::Workdir,
};
use lab::{Lab, LabOptions};

/// Everything of one node. Dropped in this order: containers first, then the daemon, then the
/// directories.
#[derive(Debug)]
pub struct Node {
    /// containerd; [`PLUGIN`] is the daemon, for CRI as well.
    pub containerd: Containerd,
    /// The daemon.
    pub daemon: Daemon,
    /// The registry.
    pub lab: Lab,
    /// Where all of it is.
    pub work: Workdir,
}

impl Node {
    /// Starts everything. `config` is added to the daemon's, as `key = value` lines.
    ///
    /// # Panics
    /// When something does not start (ask [`Line::missing`] first).
    pub fn start(line: Line, config: &str) -> Self {
        let work = Workdir::new();
        let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).expect("a registry");
        let socket = work.path().join("c/c.sock").display().to_string();
        let config =
            format!("{config}containerd.address = {socket:?}\nregistry.config_path = \"\"\n");
        let daemon = Daemon::start(&work.sub("d"), &config);
        let setup = Setup {
            snapshotter: Some((daemon.socket(), daemon.root())),
            cri_snapshotter: PLUGIN.into(),
            sandbox_image: format!("{}/pause:1", lab.host()),
            ..plain(line, &work)
        };
        let containerd = Containerd::start(&work.sub("c"), setup);
        Self {
            containerd,
            daemon,
            lab,
            work,
        }
    }
}

/// containerd on its own.
pub fn plain(line: Line, work: &Workdir) -> Setup {
    Setup {
        line,
        snapshotter: None,
        cri_snapshotter: "overlayfs".into(),
        sandbox_image: "localhost/none:1".into(),
        hosts_dir: work.sub("hosts"),
        tuned: false,
    }
}
