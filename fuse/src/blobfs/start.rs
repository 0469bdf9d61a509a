//! How a BlobFs comes to be served: steps 10 to 13 and 17 of the protocol.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    BlobFs, BlobFsOptions, Condition, Nodes, StartError,
    deadline::Deadline,
    node_table::NodeTable,
    server::{Counters, Server, Shared},
    watch::HolderWatch,
};
use crate::{
    holder::{Adopted, Client},
    mounts::{MountInfo, mountinfo},
    sys::{abi, arena::Arena, device},
    table::{READERS, Table, boottime_ns},
    transport::{Handler, Readers, Session},
};

/// How long a FUSE mount that a former daemon's helper is making may take.
const SETTLE: Duration = Duration::from_secs(2);
/// Longest READ a kernel without a configured limit sends.
const LONGEST_READ_BYTES: u32 = 1 << 20;

pub(super) async fn start(
    options: BlobFsOptions,
    nodes: Arc<dyn Nodes>,
) -> Result<BlobFs, StartError> {
    check(&options)?;
    let mountpoint = blocking(&options, |o| prepare_directories(&o)).await?;
    let holder = blocking(&options, |o| {
        Ok(Arc::new(Client::connect_or_start(&o.state_dir, &o.holder)?))
    })
    .await?;
    options.helper.settle_fuse_mounts(SETTLE).await;

    let taken = {
        let holder = Arc::clone(&holder);
        blocking(&options, move |o| adopt_all(&holder, o.fence_timeout)).await?
    };
    let longest = taken.iter().map(Taken::longest_read).max().unwrap_or(0);
    let arena = reply_memory(
        options.reply_memory_bytes,
        longest.max(options.max_read_bytes),
    )?;
    let counters = Arc::new(Counters::default());
    let shared = Shared {
        nodes: Arc::new(NodeTable::new(nodes)),
        runtime: options.runtime.clone(),
        deadline: Deadline::new(options.read_deadline),
        max_read_bytes: options.max_read_bytes,
        counters: Arc::clone(&counters),
    };
    let mut build = Build {
        holder,
        arena,
        shared,
        servers: Vec::new(),
        readers: Vec::new(),
        condition: Condition::default(),
    };
    build.condition.replies_locked = build.arena.is_locked();
    // Served first: what follows may wait for answers of these sessions.
    build = blocking(&options, move |o| {
        for taken in taken {
            build.revive(taken, o.readers)?;
        }
        Ok(build)
    })
    .await?;
    if !build.is_mounted_at(&mountpoint) {
        clear_mountpoint(&options, &mountpoint).await?;
        build.make(&options, &mountpoint).await?;
    }
    let sessions = build.servers.iter().map(|s| Arc::clone(s.session()));
    let watch = HolderWatch::start(Arc::clone(&build.holder), sessions.collect())
        .map_err(StartError::Transport)?;
    tracing::info!(
        mountpoint = %mountpoint.display(),
        adopted = build.condition.adopted,
        replayed = counters.replayed.load(Ordering::Relaxed),
        "BlobFs is served"
    );
    Ok(BlobFs {
        mountpoint,
        helper: options.helper,
        mount_timeout: options.mount_timeout,
        condition: build.condition,
        counters,
        holder: build.holder,
        watch: Arc::new(Mutex::new(watch)),
        sessions: build.servers,
        readers: Arc::new(Mutex::new(build.readers)),
    })
}

/// A session as the holder handed it over.
struct Taken {
    name: String,
    device: OwnedFd,
    table: Table,
    lost: bool,
}

impl Taken {
    /// The longest READ that was negotiated.
    fn longest_read(&self) -> u32 {
        if let Some(reply) = self.table.saved_init() {
            return (abi::high(reply[3]) & 0xffff) * 4096;
        }
        if !self.lost {
            return 0; // INIT is still to be answered
        }
        let mounts = mountinfo().unwrap_or_default();
        let mount = mounts.iter().find(|m| m.source == *self.name);
        mount.and_then(max_read).unwrap_or(LONGEST_READ_BYTES)
    }
}

fn max_read(mount: &MountInfo) -> Option<u32> {
    let options = mount.super_options.to_str()?;
    let mut values = options
        .split(',')
        .filter_map(|o| o.strip_prefix("max_read="));
    values.next()?.parse().ok()
}

fn adopt_all(holder: &Client, fence: Duration) -> Result<Vec<Taken>, StartError> {
    let mut taken = Vec::new();
    for name in holder.sessions()? {
        let Some(adopted) = holder.adopt(&name, fence)? else {
            continue;
        };
        match open_adopted(holder, &name, adopted)? {
            Some(session) => taken.push(session),
            // Never mounted, or ended meanwhile.
            None => holder.drop_session(&name)?,
        }
    }
    Ok(taken)
}

fn open_adopted(
    holder: &Client,
    name: &str,
    adopted: Adopted,
) -> Result<Option<Taken>, StartError> {
    let generation = adopted.generation;
    let Some(device) = adopted.device else {
        return Ok(None);
    };
    if !device::is_connected(device.as_fd()).map_err(StartError::Device)? {
        return Ok(None);
    }
    let invalid = match Table::open(adopted.table, generation) {
        Ok(table) => {
            return Ok(Some(Taken {
                name: name.to_owned(),
                device,
                table,
                lost: false,
            }));
        }
        Err(e) => e,
    };
    // Step 13. RESEND and replay exclude each other: from here on only RESEND.
    tracing::error!(
        session = name,
        error = &invalid as &dyn std::error::Error,
        "the request table of the former daemon is invalid, asking the kernel to resend"
    );
    let table = Table::open(holder.retable(name, generation)?, generation)?;
    table.set_handles_lost();
    if let Err(e) = device::resend(&device) {
        tracing::error!(session = name, error = %e, "no RESEND: the session ends with errors");
        return Ok(None);
    }
    Ok(Some(Taken {
        name: name.to_owned(),
        device,
        table,
        lost: true,
    }))
}

/// Sessions on their way to being served.
struct Build {
    holder: Arc<Client>,
    arena: Arc<Arena>,
    shared: Shared,
    servers: Vec<Arc<Server>>,
    readers: Vec<Readers>,
    condition: Condition,
}

impl Build {
    /// Step 12: answers what was left, then reads on.
    fn revive(&mut self, taken: Taken, readers: usize) -> Result<(), StartError> {
        let lost = taken.lost;
        let server = self.server(taken.name, taken.table, taken.device);
        server.session().table().forget_readers();
        for ticket in server.session().take_over()? {
            self.shared
                .counters
                .replayed
                .fetch_add(1, Ordering::Relaxed);
            server.request(ticket);
        }
        self.condition.resent |= lost;
        self.serve(server, readers)
    }

    /// A new session, deposited before it is mounted, so that it outlives this daemon from the
    /// first request on.
    async fn make(&mut self, options: &BlobFsOptions, mountpoint: &Path) -> Result<(), StartError> {
        let name = format!("blobfs-{:x}-{}", boottime_ns(), std::process::id());
        let (table, generation) = self.holder.create(&name)?;
        let device = device::open().map_err(StartError::Device)?;
        self.holder.deposit(&name, device.as_fd())?;
        let table = Table::open(table, generation)?;
        let server = self.server(name.clone(), table, device);
        let mounted = match server.session().device() {
            Some(device) => {
                options
                    .helper
                    .mount_fuse(
                        &name,
                        mountpoint,
                        device,
                        options.max_read_bytes,
                        options.mount_timeout,
                    )
                    .await
            }
            None => Ok(()), // it has the device it was made with
        };
        if let Err(e) = mounted {
            self.holder.drop_session(&name)?;
            return Err(StartError::Mount(e));
        }
        self.serve(server, options.readers)
    }

    fn server(&self, name: String, table: Table, device: OwnedFd) -> Arc<Server> {
        let session = Session::new(name, table, Box::new(device), Arc::clone(&self.arena));
        let holder = Arc::clone(&self.holder);
        let on_end = move |session: &Session| {
            if let Err(e) = holder.drop_session(session.name()) {
                tracing::warn!(error = %e, "tell the holder that a session has ended");
            }
        };
        Server::new(Arc::new(session), self.shared.clone(), Box::new(on_end))
    }

    fn serve(&mut self, server: Arc<Server>, readers: usize) -> Result<(), StartError> {
        let handler: Arc<dyn Handler> = Arc::clone(&server) as _;
        let readers = Readers::start(server.session(), &handler, readers);
        self.readers.push(readers.map_err(StartError::Transport)?);
        self.servers.push(server);
        Ok(())
    }

    /// Whether one of the adopted sessions is what is seen at the mountpoint; it is put last.
    fn is_mounted_at(&mut self, mountpoint: &Path) -> bool {
        let Some(top) = topmost(mountpoint) else {
            return false;
        };
        let found = self
            .servers
            .iter()
            .position(|server| top.source == *server.session().name());
        if let Some(index) = found {
            let server = self.servers.remove(index);
            self.servers.push(server);
            self.condition.adopted = true;
        }
        found.is_some()
    }
}

/// Unmounts dead sessions of ours.
async fn clear_mountpoint(options: &BlobFsOptions, mountpoint: &Path) -> Result<(), StartError> {
    const NOTCONN: i32 = rustix::io::Errno::NOTCONN.raw_os_error();
    const ABORTED: i32 = rustix::io::Errno::CONNABORTED.raw_os_error();
    let until = Instant::now() + options.mount_timeout;
    while let Some(top) = topmost(mountpoint).filter(|m| m.fs_type.starts_with("fuse")) {
        let probe = options
            .helper
            .statfs(mountpoint, options.mount_timeout)
            .await;
        let dead = probe.err().and_then(|e| e.errno());
        if !matches!(dead, Some(NOTCONN | ABORTED)) || Instant::now() >= until {
            return Err(StartError::Occupied {
                mountpoint: mountpoint.to_owned(),
                fs_type: top.fs_type,
                fs_source: top.source.to_string_lossy().into_owned(),
            });
        }
        tracing::warn!(mountpoint = %mountpoint.display(), "unmounting a dead session");
        options
            .helper
            .umount(mountpoint, true, options.mount_timeout)
            .await
            .map_err(StartError::Mount)?;
    }
    Ok(())
}

fn topmost(mountpoint: &Path) -> Option<MountInfo> {
    let mounts = mountinfo().unwrap_or_default();
    mounts.into_iter().rfind(|m| m.target == mountpoint)
}

fn check(options: &BlobFsOptions) -> Result<(), StartError> {
    let read = options.max_read_bytes;
    let bad = |option, value: u64, bounds| {
        Err(StartError::Option {
            option,
            value,
            bounds,
        })
    };
    if !(1..=READERS).contains(&options.readers) {
        return bad("readers", options.readers as u64, "1 to 16");
    }
    if !(128 << 10..=LONGEST_READ_BYTES).contains(&read) || !read.is_multiple_of(4096) {
        let bounds = "128 KiB to 1 MiB and a multiple of 4096";
        return bad("max_read_bytes", read.into(), bounds);
    }
    Ok(())
}

/// Makes the directories and returns the mountpoint as mountinfo writes it. Never looks at the
/// mountpoint itself while something is mounted there.
fn prepare_directories(options: &BlobFsOptions) -> Result<PathBuf, StartError> {
    let make = |path: &Path, mode| {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(|source| StartError::Directory {
                path: path.to_owned(),
                source,
            })
    };
    make(&options.state_dir, 0o700)?;
    let path = &options.mountpoint;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(StartError::Directory {
            path: path.clone(),
            source: io::ErrorKind::InvalidInput.into(),
        });
    };
    make(parent, 0o711)?;
    let parent = fs::canonicalize(parent).map_err(|source| StartError::Directory {
        path: parent.to_owned(),
        source,
    })?;
    let mountpoint = parent.join(name);
    if topmost(&mountpoint).is_none() {
        make(&mountpoint, 0o700)?;
    }
    Ok(mountpoint)
}

pub(super) fn reply_memory(bytes: usize, longest: u32) -> Result<Arc<Arena>, StartError> {
    let payload = usize::try_from(longest).unwrap_or(0).next_multiple_of(4096);
    // Two, so that one slow send does not stop everything.
    let count = (bytes / (payload + 4096)).max(2);
    let arena = Arena::new(payload, count).map_err(StartError::Transport)?;
    if !arena.is_locked() {
        tracing::warn!(
            bytes,
            "RLIMIT_MEMLOCK forbids locking the reply memory: a daemon killed while a page of it is \
             reclaimed can fail that one read with EIO; raise LimitMEMLOCK of the unit"
        );
    }
    Ok(Arc::new(arena))
}

async fn blocking<T: Send + 'static>(
    options: &BlobFsOptions,
    work: impl FnOnce(BlobFsOptions) -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    let own = options.clone();
    match options.runtime.spawn_blocking(move || work(own)).await {
        Ok(result) => result,
        Err(e) => Err(StartError::Transport(io::Error::other(e))),
    }
}
