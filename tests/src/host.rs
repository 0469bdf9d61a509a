//! Drives the daemon's gRPC socket as containerd's metadata layer and unpacker do.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use core_runtime::unpack::Unpacker;
use formats::limits::Limits;
use hyper_util::rt::TokioIo;
use snapshotterd::api::{
    snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest,
        ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Mount,
};
use tokio::net::UnixStream;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::{
    mounting,
    pushed::{PushedImage, PushedLayer},
};

/// How a layer came to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Came {
    /// AlreadyExists.
    Lazily,
    /// Fetched and unpacked.
    Unpacked,
}

/// One containerd namespace, talking to one plugin name of the daemon.
#[derive(Clone, Debug)]
pub struct Host {
    client: SnapshotsClient<Channel>,
    namespace: String,
    work: PathBuf,
}

/// The plugin name the tests use.
pub const PLUGIN: &str = "snapshotterd";

impl Host {
    /// A host in `namespace`; mounts are made below `work`.
    ///
    /// # Panics
    /// When nobody listens on `socket`.
    pub async fn connect(socket: &Path, namespace: &str, work: &Path) -> Self {
        let socket = socket.to_owned();
        let channel = Endpoint::from_static("http://daemon")
            .connect_with_connector(service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .expect("the daemon listens");
        Self {
            client: SnapshotsClient::new(channel),
            namespace: namespace.to_owned(),
            work: work.to_owned(),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = MetadataValue::try_from(&self.namespace).expect("a namespace");
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        request
    }

    /// A backend key as the metadata layer makes it.
    pub fn key(&self, name: &str) -> String {
        static SEQUENCE: AtomicU64 = AtomicU64::new(1);
        let number = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        format!("{}/{number}/{name}", self.namespace)
    }

    /// Prepare.
    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
            parent: parent.into(),
            labels,
        });
        let reply = self.client.clone().prepare(request).await?;
        Ok(reply.into_inner().mounts)
    }

    /// View.
    pub async fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        let request = self.request(ViewSnapshotRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
            parent: parent.into(),
            labels: BTreeMap::new(),
        });
        let reply = self.client.clone().view(request).await?;
        Ok(reply.into_inner().mounts)
    }

    /// Mounts.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = self.request(MountsRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
        });
        let reply = self.client.clone().mounts(request).await?;
        Ok(reply.into_inner().mounts)
    }

    /// Stat.
    pub async fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = self.request(StatSnapshotRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
        });
        let reply = self.client.clone().stat(request).await?;
        reply
            .into_inner()
            .info
            .ok_or_else(|| Status::internal("no info"))
    }

    /// Commit.
    pub async fn commit(
        &self,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Status> {
        let request = self.request(CommitSnapshotRequest {
            snapshotter: PLUGIN.into(),
            name: name.into(),
            key: key.into(),
            labels,
            parent: String::new(),
        });
        self.client.clone().commit(request).await.map(drop)
    }

    /// Remove.
    pub async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = self.request(RemoveSnapshotRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
        });
        self.client.clone().remove(request).await.map(drop)
    }

    /// Cleanup.
    pub async fn cleanup(&self) -> Result<(), Status> {
        let request = self.request(CleanupRequest {
            snapshotter: PLUGIN.into(),
        });
        self.client.clone().cleanup(request).await.map(drop)
    }

    /// Bytes used.
    pub async fn usage(&self, key: &str) -> Result<i64, Status> {
        let request = self.request(UsageRequest {
            snapshotter: PLUGIN.into(),
            key: key.into(),
        });
        let reply = self.client.clone().usage(request).await?;
        Ok(reply.into_inner().size)
    }

    /// The first committed snapshot that carries the chain ID on that parent, as the metadata
    /// layer looks it up after AlreadyExists.
    pub async fn find(&self, chain: &str, parent: &str) -> Result<Option<Info>, Status> {
        let filter = format!("labels.\"containerd.io/snapshot.ref\"=={chain},parent==\"{parent}\"");
        let request = self.request(ListSnapshotsRequest {
            snapshotter: PLUGIN.into(),
            filters: vec![filter],
        });
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut first = None;
        while let Some(page) = stream.message().await? {
            for info in page.info {
                // Committed is 3.
                if first.is_none() && info.kind == 3 && info.parent == parent {
                    first = Some(info);
                }
            }
        }
        Ok(first)
    }

    /// Pulls an image as the unpacker does: layer by layer, ordinary ones unpacked onto the mounts
    /// that Prepare returns. Gives the backend name of the top and how each layer came.
    ///
    /// # Panics
    /// When the daemon does anything containerd would not accept.
    pub async fn pull(
        &self,
        image: &PushedImage,
        labels: impl Fn(&PushedImage, usize) -> BTreeMap<String, String>,
    ) -> (String, Vec<Came>) {
        let mut parent = String::new();
        let mut came = Vec::new();
        for index in 0..image.layers.len() {
            let chain = image.chains[index].to_string();
            let key = self.key(&format!("extract-{index}-test {chain}"));
            let labels = labels(image, index);
            match self.prepare(&key, &parent, labels.clone()).await {
                Ok(mounts) => {
                    self.unpack(&image.layers[index], &mounts);
                    let name = self.key(&chain);
                    self.commit(&name, &key, labels)
                        .await
                        .expect("an unpacked layer commits");
                    parent = name;
                    came.push(Came::Unpacked);
                }
                Err(status) if status.code() == Code::AlreadyExists => {
                    let info = self
                        .find(&chain, &parent)
                        .await
                        .expect("List")
                        .expect("AlreadyExists is followed by a snapshot that List finds");
                    assert_eq!(info.labels["containerd.io/snapshot.ref"], chain);
                    let stat = self.stat(&info.name).await.expect("Stat finds it");
                    assert_eq!(stat, info);
                    parent = info.name;
                    came.push(Came::Lazily);
                }
                Err(status) => panic!("Prepare of layer {index}: {status}"),
            }
        }
        (parent, came)
    }

    /// Performs mounts on a fresh directory.
    ///
    /// # Panics
    /// When they cannot be made.
    pub fn mount(&self, name: &str, mounts: &[Mount]) -> Mounted {
        let target = self.work.join(format!("{}-{name}", self.namespace));
        std::fs::create_dir_all(&target).expect("a mount point");
        for m in mounts {
            let options = m.options.join(",");
            assert!(options.len() < 4096, "{} bytes of options", options.len());
        }
        mounting::mount_all(mounts, &target).expect("containerd could mount it");
        Mounted { target }
    }

    fn unpack(&self, layer: &PushedLayer, mounts: &[Mount]) {
        let mounted = self.mount("unpack", mounts);
        apply(&layer.tar, mounted.path());
    }
}

/// Something mounted; unmounted on drop.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
}

impl Mounted {
    /// Where.
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Unpacks a tar onto a directory, in a thread whose root it is.
///
/// # Panics
/// When it cannot be unpacked.
pub fn apply(tar: &[u8], root: &Path) {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: only root and working directory become this thread's own; nothing that
                // other threads rely on, descriptors above all, is unshared.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
                    .expect("unshare");
                rustix::process::chroot(root).expect("chroot");
                std::env::set_current_dir("/").expect("chdir");
                let mut unpacker = Unpacker::new(Limits::default());
                unpacker.push(tar).expect("a tar that unpacks");
                unpacker.finish().expect("a whole tar");
            })
            .join()
            .expect("the unpacking thread");
    });
}

/// What a serial unpack of all layers gives.
///
/// # Panics
/// As [`apply`].
pub fn oracle(image: &PushedImage, dir: &Path) {
    std::fs::create_dir_all(dir).expect("a directory");
    for layer in &image.layers {
        apply(&layer.tar, dir);
    }
}
