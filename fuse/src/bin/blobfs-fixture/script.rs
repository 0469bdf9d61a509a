//! Sources that do what a script says.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fuse::Nodes;
use parking_lot::Mutex;
use serde::Deserialize;
use storage::source::{BlobSource, BoxFuture, Cause, ReadNow, SourceError};

use crate::pattern;

/// Unit in which a slow region becomes local.
const BLOCK: u64 = 64 << 10;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Stalled regions are served once this file exists.
    release: PathBuf,
    nodes: Vec<NodeScript>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeScript {
    node: u64,
    size: u64,
    /// Milliseconds that opening takes.
    #[serde(default)]
    open_ms: u64,
    /// Constant bytes instead of the pattern: to measure the transport alone.
    #[serde(default)]
    plain: bool,
    /// What is not local from the start.
    #[serde(default)]
    regions: Vec<Region>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    start: u64,
    end: u64,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    /// Comes after that many milliseconds, block by block.
    Slow(u64),
    /// Comes when the release file exists.
    Stall,
    /// Fails with that errno.
    Fail(i32),
}

/// A loaded script.
pub(crate) struct Script(Arc<Scripted>);

struct Scripted {
    file: File,
    opened: AtomicU64,
    closed: AtomicU64,
}

impl Script {
    pub(crate) fn load(path: &Path) -> Result<Self, Box<dyn Error>> {
        Ok(Self(Arc::new(Scripted {
            file: serde_json::from_slice(&fs::read(path)?)?,
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
        })))
    }

    pub(crate) fn nodes(&self) -> Arc<dyn Nodes> {
        Arc::clone(&self.0) as _
    }

    pub(crate) fn opened(&self) -> u64 {
        self.0.opened.load(Ordering::Relaxed)
    }

    pub(crate) fn closed(&self) -> u64 {
        self.0.closed.load(Ordering::Relaxed)
    }
}

impl Nodes for Scripted {
    fn size(&self, node: u64) -> Option<u64> {
        self.file
            .nodes
            .iter()
            .find(|n| n.node == node)
            .map(|n| n.size)
    }

    fn open(&self, node: u64) -> BoxFuture<'static, Result<Arc<dyn BlobSource>, SourceError>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let script = self.file.nodes.iter().find(|n| n.node == node).cloned();
        let release = self.file.release.clone();
        Box::pin(async move {
            let script = script.ok_or_else(|| SourceError {
                errno: 2,
                message: format!("no node {node}"),
            })?;
            tokio::time::sleep(Duration::from_millis(script.open_ms)).await;
            Ok(Arc::new(Source {
                script,
                release,
                local: Mutex::default(),
                waits: Mutex::default(),
            }) as Arc<dyn BlobSource>)
        })
    }

    fn closed(&self, _node: u64) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }
}

struct Source {
    script: NodeScript,
    release: PathBuf,
    /// Blocks of slow regions that have come.
    local: Mutex<HashSet<u64>>,
    waits: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
}

impl Source {
    fn touched(&self, offset: u64, len: u64) -> impl Iterator<Item = &Region> {
        let end = offset + len;
        self.script
            .regions
            .iter()
            .filter(move |r| r.start < end && offset < r.end)
    }

    fn blocks(region: &Region, offset: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
        let (start, end) = (region.start.max(offset), region.end.min(offset + len));
        start / BLOCK..=(end - 1) / BLOCK
    }
}

impl BlobSource for Source {
    fn len(&self) -> u64 {
        self.script.size
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow> {
        let len = buf.len() as u64;
        for region in self.touched(offset, len) {
            let ready = match region.mode {
                Mode::Slow(_) => {
                    let local = self.local.lock();
                    Self::blocks(region, offset, len).all(|block| local.contains(&block))
                }
                Mode::Stall => self.release.exists(),
                Mode::Fail(_) => false,
            };
            if !ready {
                return Ok(ReadNow::Pending);
            }
        }
        if self.script.plain {
            buf.fill(0x5a);
        } else {
            pattern::fill(self.script.node, offset, buf);
        }
        Ok(ReadNow::Ready(buf.len()))
    }

    fn ensure(
        self: Arc<Self>,
        offset: u64,
        len: u64,
        _cause: Cause,
    ) -> BoxFuture<'static, Result<(), SourceError>> {
        Box::pin(async move {
            for region in self.touched(offset, len) {
                match region.mode {
                    Mode::Slow(ms) => {
                        for block in Self::blocks(region, offset, len) {
                            let wait = Arc::clone(self.waits.lock().entry(block).or_default());
                            let _single = wait.lock().await;
                            if !self.local.lock().contains(&block) {
                                tokio::time::sleep(Duration::from_millis(ms)).await;
                                self.local.lock().insert(block);
                            }
                        }
                    }
                    Mode::Stall => {
                        while !self.release.exists() {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    }
                    Mode::Fail(errno) => {
                        return Err(SourceError {
                            errno,
                            message: format!("scripted failure at {offset}"),
                        });
                    }
                }
            }
            Ok(())
        })
    }
}
