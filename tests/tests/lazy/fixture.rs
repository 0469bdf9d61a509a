//! What the tests share: a work directory, a registry, a daemon, a runtime.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use lab::{Lab, LabOptions};
use rustix::mount::MountFlags;
use serde_json::Value;
use suite::{
    daemon::Daemon,
    host::{Came, Host, Mounted, oracle},
    isolate,
    listing::{Allowed, differences, list},
    machine,
    process::wait_for,
    pushed::{PushedImage, cri_labels},
    skip,
    workdir::Workdir,
};

/// No containerd to ask: manifests come from the registry.
pub(crate) const CONFIG: &str = "containerd.address = \"\"\n";

/// Everything of one test. Fields are dropped in this order.
pub(crate) struct Fixture {
    pub(crate) daemon: Daemon,
    pub(crate) lab: Lab,
    pub(crate) work: Workdir,
}

/// A request to the admin socket.
pub(crate) fn admin(socket: &Path, method: &str, path: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).expect("the admin socket");
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a timeout");
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: admin\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    .expect("a request");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head and a body");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect("a status");
    let body = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {reply}"));
    (status, body)
}

/// Whether the test may go on: as root, in a process and a mount namespace of its own.
pub(crate) fn ready() -> bool {
    if !machine::is_root() {
        skip("mounting needs root");
        return false;
    }
    isolate::enter(150)
}

impl Fixture {
    pub(crate) fn new(config: &str) -> Self {
        let work = Workdir::new();
        let lab = Lab::start_blocking(LabOptions::new(work.sub("registry")))
            .expect("the lab registry starts");
        // As on real machines, where it is below /run.
        rustix::mount::mount(
            "tmpfs",
            work.sub("d/run"),
            "tmpfs",
            MountFlags::empty(),
            None,
        )
        .expect("a tmpfs for the state directory");
        let daemon = Daemon::start(&work.sub("d"), config);
        Self { daemon, lab, work }
    }

    pub(crate) async fn host(&self, namespace: &str) -> Host {
        Host::connect(&self.daemon.socket(), namespace, &self.work.sub("m")).await
    }

    /// Pulls with CRI labels, all layers lazily.
    pub(crate) async fn pull_lazily(&self, host: &Host, image: &PushedImage) -> String {
        let (parent, came) = host.pull(image, cri_labels).await;
        assert!(
            came.iter().all(|came| *came == Came::Lazily),
            "{came:?}\n{}",
            self.daemon.log()
        );
        parent
    }

    /// A container on `parent`, mounted.
    pub(crate) async fn container(
        &self,
        host: &Host,
        parent: &str,
        name: &str,
    ) -> (String, Mounted) {
        let key = host.key(name);
        let mounts = host
            .prepare(&key, parent, BTreeMap::new())
            .await
            .unwrap_or_else(|status| panic!("container: {status}\n{}", self.daemon.log()));
        let mounted = host.mount(name, &mounts);
        (key, mounted)
    }

    /// Compares a mounted container with a serial unpack of the image.
    pub(crate) fn same_tree(&self, image: &PushedImage, root: &Path, implied: &[&str]) {
        let expected = self.work.sub("oracles").join(image.manifest.hex());
        if !expected.exists() {
            oracle(image, &expected);
        }
        let allowed = Allowed {
            implied: implied.iter().map(PathBuf::from).collect(),
        };
        let found = differences(
            &list(&expected).expect("the oracle"),
            &list(root).expect("the lazy tree"),
            &allowed,
        );
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    /// A request to the admin socket.
    pub(crate) fn admin(&self, method: &str, path: &str) -> (u16, Value) {
        admin(&self.daemon.admin(), method, path)
    }

    /// The admin API's description of a layer.
    pub(crate) fn layer(&self, digest: &str) -> Value {
        let (_, layers) = self.admin("GET", "/v1/layers");
        layers["layers"]
            .as_array()
            .expect("a list")
            .iter()
            .find(|layer| layer["digest"] == digest)
            .cloned()
            .unwrap_or_else(|| panic!("no layer {digest} in {layers}"))
    }

    /// The reason shown for layer `index` of `image`, which got an ordinary unpack.
    pub(crate) fn why_not(&self, image: &PushedImage, index: usize) -> String {
        let (_, layers) = self.admin("GET", "/v1/layers");
        let chain = image.chains[index].to_string();
        let found = layers["not_lazy"]
            .as_array()
            .expect("a list")
            .iter()
            .find(|entry| {
                entry["snapshot"]
                    .as_str()
                    .is_some_and(|key| key.ends_with(&chain))
            })
            .and_then(|entry| entry["why_not"].as_str());
        found
            .unwrap_or_else(|| panic!("no reason for layer {index} in {layers}"))
            .to_owned()
    }

    /// Waits until the daemon has recovered, and says what went wrong in it.
    pub(crate) fn recovered(&self) -> Value {
        let mut status = Value::Null;
        wait_for("recovery", Duration::from_secs(20), || {
            status = self.admin("GET", "/v1/status").1;
            status["recovery"]["done"] == true
        });
        status["recovery"]["problems"].clone()
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}
