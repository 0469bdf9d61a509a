//! What this kernel can do, tried with real, tiny mounts.
//!
//! Version numbers do not tell: vendors backport, and some kernels charge EROFS a stacking level.

use std::{
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};
use storage::source::{BlobSource, BoxFuture, Cause, ReadNow, SourceError};
use tokio::sync::Notify;

use crate::{
    Nodes,
    blobfs::local::Local,
    mounts::{ErofsMount, Helper, HelperError, OverlayMount},
};

/// An EROFS image with one device, and what is in it.
#[derive(Clone, Debug)]
pub struct ProbeImage {
    /// The metadata image.
    pub metadata: Vec<u8>,
    /// The bytes of its data device.
    pub device: Vec<u8>,
    /// A file of the image, relative to its root, that is served at once.
    pub ready: PathBuf,
    /// Where `ready` lies in the device.
    pub ready_range: Range<u64>,
    /// A file of the image that is held back.
    pub stalled: PathBuf,
    /// Where `stalled` lies in the device; in no 4 KiB block together with `ready`.
    pub stalled_range: Range<u64>,
}

/// How to probe.
#[derive(Clone, Debug)]
pub struct ProbeOptions {
    /// A directory for the probe's mounts, made and removed by it. Not on BlobFs.
    pub dir: PathBuf,
    /// Starts mount helpers.
    pub helper: Helper,
    /// A directory on the file system of the cache, made and removed by the probe, for its images:
    /// the kernel refuses to read EROFS from files on tmpfs, where `dir` usually is.
    pub image_dir: PathBuf,
    /// Whether to try direct I/O on plain files of that file system.
    pub direct_io: bool,
    /// Where reads that wait are continued.
    pub runtime: tokio::runtime::Handle,
    /// Bound for each step.
    pub step: Duration,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It works.
    Works,
    /// It does not, and why.
    Fails(String),
    /// It could not be tried, and why.
    Untried(String),
}

impl Finding {
    /// Whether it works.
    pub fn works(&self) -> bool {
        *self == Self::Works
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("works"),
            Self::Fails(why) => write!(f, "does not work: {why}"),
            Self::Untried(why) => write!(f, "not tried: {why}"),
        }
    }
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// A FUSE session can be mounted and read.
    pub fuse: Finding,
    /// EROFS mounts with its device on FUSE and gives the right bytes.
    pub erofs_on_fuse: Finding,
    /// Two overlays stack on top of it: an image, and a container within a container.
    pub two_overlays: Finding,
    /// A reader of a stalled range that gets signals sees no error.
    pub signalled_reader: Finding,
    /// A reader of a stalled range dies when killed.
    pub killed_reader: Finding,
    /// EROFS reads a plain file past its page cache and gives the right bytes.
    pub direct_io: Finding,
}

impl ProbeReport {
    /// Whether layers can be presented lazily. Stacking is not needed for it.
    pub fn lazy_works(&self) -> bool {
        self.fuse.works()
            && self.erofs_on_fuse.works()
            && self.signalled_reader.works()
            && self.killed_reader.works()
    }

    /// All findings by name.
    pub fn findings(&self) -> [(&'static str, &Finding); 6] {
        [
            ("fuse", &self.fuse),
            ("erofs_on_fuse", &self.erofs_on_fuse),
            ("two_overlays", &self.two_overlays),
            ("signalled_reader", &self.signalled_reader),
            ("killed_reader", &self.killed_reader),
            ("direct_io", &self.direct_io),
        ]
    }

    fn untried(why: &str) -> Self {
        let untried = Finding::Untried(why.to_owned());
        Self {
            fuse: untried.clone(),
            erofs_on_fuse: untried.clone(),
            two_overlays: untried.clone(),
            signalled_reader: untried.clone(),
            killed_reader: untried,
            direct_io: Finding::Untried("not asked for".to_owned()),
        }
    }
}

/// Probes this kernel. Takes about half a second where everything works.
pub async fn run(options: &ProbeOptions, image: ProbeImage) -> ProbeReport {
    let mut report = ProbeReport::untried("an earlier step failed");
    detach_leftovers(options).await;
    if let Err((dir, e)) = prepare(options, &image) {
        report.fuse = Finding::Untried(format!("prepare {}: {e}", dir.display()));
        return report;
    }
    let source = Arc::new(Source {
        image,
        open: AtomicBool::new(false),
        opened: Notify::new(),
    });
    let probe = Probe {
        options,
        source: Arc::clone(&source),
    };
    let nodes = Arc::new(OneNode(source));
    let place = probe.place("b");
    let local = Local::mount(
        &place,
        &options.helper,
        &options.runtime,
        nodes,
        options.step,
    )
    .await;
    match local {
        Ok(local) => {
            probe.with_fuse(&local, &mut report).await;
            local.abandon(NODE);
            probe.clean_up(local).await;
        }
        Err(e) => report.fuse = Finding::Fails(chain(&e)),
    }
    if options.direct_io {
        report.direct_io = probe.direct_io().await;
    }
    let _ = fs::remove_dir_all(&options.image_dir);
    // Fails only where a mount could not be taken away; that was told.
    let _ = fs::remove_dir_all(&options.dir);
    report
}

const NODE: u64 = 1;

struct Probe<'a> {
    options: &'a ProbeOptions,
    source: Arc<Source>,
}

impl Probe<'_> {
    fn place(&self, name: &str) -> PathBuf {
        self.options.dir.join(name)
    }

    async fn with_fuse(&self, local: &Local, report: &mut ProbeReport) {
        let image = &self.source.image;
        let device = local.path(NODE);
        let direct = self.reads(&device, &image.ready_range, image.ready_range.start, None);
        report.fuse = direct.await;
        if !report.fuse.works() {
            return;
        }
        report.erofs_on_fuse = self.erofs(&device, "e1").await;
        if !report.erofs_on_fuse.works() {
            return;
        }
        report.two_overlays = self.two_overlays().await;
        report.signalled_reader = self.signalled_reader(local).await;
        // A superblock of its own: the first one has the bytes in its cache by now.
        report.killed_reader = match self.erofs(&device, "e2").await {
            Finding::Works => self.killed_reader(local).await,
            other => other,
        };
    }

    async fn erofs(&self, device: &Path, place: &str) -> Finding {
        let mount = ErofsMount {
            metadata: self.options.image_dir.join("image"),
            devices: vec![device.to_owned()],
            target: self.place(place),
            direct_io: false,
        };
        let helper = &self.options.helper;
        if let Err(e) = helper.mount_erofs(&mount, self.options.step).await {
            return Finding::Fails(chain(&e));
        }
        self.reads_ready(place).await
    }

    async fn direct_io(&self) -> Finding {
        let image = &self.source.image;
        let dir = &self.options.image_dir;
        let (metadata, device) = (dir.join("image"), dir.join("device"));
        if let Err(e) = fs::write(&device, &image.device) {
            return Finding::Untried(format!("prepare {}: {e}", dir.display()));
        }
        let mount = ErofsMount {
            metadata,
            devices: vec![device],
            target: self.place("d"),
            direct_io: true,
        };
        let helper = &self.options.helper;
        if let Err(e) = helper.mount_erofs(&mount, self.options.step).await {
            return Finding::Fails(chain(&e));
        }
        let held_back = self.place("d").join(&image.stalled);
        let mut finding = self.reads_ready("d").await;
        if finding.works() {
            finding = self.reads(&held_back, &image.stalled_range, 0, None).await;
        }
        self.take_away("d").await;
        finding
    }

    async fn two_overlays(&self) -> Finding {
        for (place, below) in [("o1", "e1"), ("o2", "o1")] {
            let mount = OverlayMount {
                lowers: vec![self.place(below), self.place("empty")],
                upper: None,
                target: self.place(place),
            };
            let helper = &self.options.helper;
            if let Err(e) = helper.mount_overlay(&mount, self.options.step).await {
                return Finding::Fails(chain(&e));
            }
        }
        self.reads_ready("o2").await
    }

    async fn signalled_reader(&self, local: &Local) -> Finding {
        let image = &self.source.image;
        let path = self.place("e1").join(&image.stalled);
        let alarm = Some(Duration::from_millis(5));
        let read = self.reads(&path, &image.stalled_range, 0, alarm);
        let release = async {
            let waits = self.waits(local).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
            self.source.open();
            waits
        };
        let (read, waits) = tokio::join!(read, release);
        self.source.open.store(false, Ordering::Release);
        if waits { read } else { no_wait() }
    }

    async fn killed_reader(&self, local: &Local) -> Finding {
        let image = &self.source.image;
        let path = self.place("e2").join(&image.stalled);
        let len = image.stalled_range.end - image.stalled_range.start;
        let bound = Duration::from_millis(300);
        let helper = &self.options.helper;
        match helper.read_file(&path, 0, len, None, bound).await {
            _ if local.waiting() == 0 => no_wait(),
            Err(HelperError::TimedOut { gone: true, .. }) => Finding::Works,
            Err(e) => Finding::Fails(chain(&e)),
            Ok(_) => Finding::Fails("it read what was held back".to_owned()),
        }
    }

    async fn waits(&self, local: &Local) -> bool {
        let until = Instant::now() + self.options.step;
        while local.waiting() == 0 {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    async fn reads_ready(&self, place: &str) -> Finding {
        let image = &self.source.image;
        let path = self.place(place).join(&image.ready);
        self.reads(&path, &image.ready_range, 0, None).await
    }

    /// Whether the file at `path` has, from `offset` on, the bytes of a device range.
    async fn reads(
        &self,
        path: &Path,
        range: &Range<u64>,
        offset: u64,
        alarm: Option<Duration>,
    ) -> Finding {
        let len = range.end - range.start;
        let bound = self.options.step;
        let helper = &self.options.helper;
        match helper.read_file(path, offset, len, alarm, bound).await {
            Ok(read) if read.sha256 == self.source.sha256(range) => Finding::Works,
            Ok(read) => Finding::Fails(format!(
                "{} bytes of {} are wrong",
                read.bytes,
                path.display()
            )),
            Err(e) => Finding::Fails(chain(&e)),
        }
    }

    async fn clean_up(&self, local: Local) {
        for place in ["o2", "o1", "e2", "e1", "b"] {
            self.take_away(place).await;
        }
        local.end();
    }

    async fn take_away(&self, place: &str) {
        let place = self.place(place);
        let mounts = crate::mounts::mountinfo().unwrap_or_default();
        if !mounts.iter().any(|m| m.target == place) {
            return;
        }
        let helper = &self.options.helper;
        if let Err(e) = helper.umount(&place, true, self.options.step).await {
            tracing::warn!(error = &e as &dyn std::error::Error, "clean the probe up");
        }
    }
}

/// A daemon that was killed in its probe has left mounts, on a FUSE session that is dead: nothing
/// could be done in that directory any more.
async fn detach_leftovers(options: &ProbeOptions) {
    let mounts = crate::mounts::mountinfo().unwrap_or_default();
    for mount in mounts.iter().rev() {
        if !mount.target.starts_with(&options.dir) {
            continue;
        }
        let umount = options.helper.umount(&mount.target, true, options.step);
        if let Err(e) = umount.await {
            tracing::warn!(
                error = &e as &dyn std::error::Error,
                "a probe's leftover stays"
            );
        }
    }
}

fn prepare<'a>(options: &'a ProbeOptions, image: &ProbeImage) -> Result<(), (&'a Path, io::Error)> {
    let (dir, image_dir) = (&options.dir, &options.image_dir);
    for place in ["b", "d", "e1", "e2", "o1", "o2", "empty"] {
        fs::create_dir_all(dir.join(place)).map_err(|e| (dir.as_path(), e))?;
    }
    fs::create_dir_all(image_dir)
        .and_then(|()| fs::write(image_dir.join("image"), &image.metadata))
        .map_err(|e| (image_dir.as_path(), e))
}

fn no_wait() -> Finding {
    Finding::Untried("no read of the held back range arrived".to_owned())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

struct OneNode(Arc<Source>);

impl Nodes for OneNode {
    fn size(&self, node: u64) -> Option<u64> {
        (node == NODE).then(|| self.0.len())
    }

    fn open(&self, _node: u64) -> BoxFuture<'static, Result<Arc<dyn BlobSource>, SourceError>> {
        let source = Arc::clone(&self.0) as Arc<dyn BlobSource>;
        Box::pin(std::future::ready(Ok(source)))
    }

    fn closed(&self, _node: u64) {}
}

/// The image's device; the stalled range is served while `open`.
struct Source {
    image: ProbeImage,
    open: AtomicBool,
    opened: Notify,
}

impl Source {
    fn open(&self) {
        self.open.store(true, Ordering::Release);
        self.opened.notify_waiters();
    }

    fn bytes(&self, offset: u64, len: u64) -> &[u8] {
        let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let device = &self.image.device;
        device.get(at(offset)..at(offset + len)).unwrap_or_default()
    }

    fn sha256(&self, range: &Range<u64>) -> String {
        use std::fmt::Write as _;
        let digest = Sha256::digest(self.bytes(range.start, range.end - range.start));
        digest.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

impl BlobSource for Source {
    fn len(&self) -> u64 {
        self.image.device.len() as u64
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow> {
        let len = buf.len() as u64;
        let stalled = &self.image.stalled_range;
        let touches = offset < stalled.end && stalled.start < offset + len;
        if touches && !self.open.load(Ordering::Acquire) {
            return Ok(ReadNow::Pending);
        }
        buf.copy_from_slice(self.bytes(offset, len));
        Ok(ReadNow::Ready(buf.len()))
    }

    fn ensure(
        self: Arc<Self>,
        _offset: u64,
        _len: u64,
        _cause: Cause,
    ) -> BoxFuture<'static, Result<(), SourceError>> {
        Box::pin(async move {
            let opened = self.opened.notified();
            if !self.open.load(Ordering::Acquire) {
                opened.await;
            }
            Ok(())
        })
    }
}
