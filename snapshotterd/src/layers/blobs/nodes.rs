//! The layers as BlobFs sees them: a complete one needs no chunk map, its handle reads the data file.

use std::{
    fs::File,
    io,
    num::NonZeroU64,
    os::unix::fs::FileExt as _,
    sync::{Arc, OnceLock, atomic::Ordering},
};

use fuse::Nodes;
use rustix::fs::{Advice, fadvise};
use storage::source::{BlobSource, BoxFuture, Cause, ReadNow, SourceError};
use tracing::{debug, warn};

use super::{Blobs, Slot};

/// BlobFs asks for layers by node number.
#[derive(Clone, Debug)]
pub struct LayerNodes {
    blobs: Arc<Blobs>,
}

impl LayerNodes {
    /// The nodes of `blobs`' layers.
    pub fn new(blobs: Arc<Blobs>) -> Self {
        Self { blobs }
    }
}

impl Nodes for LayerNodes {
    fn size(&self, node: u64) -> Option<u64> {
        let record = self.blobs.opener.table.by_node(node)?;
        record.ready.then_some(record.device_len)
    }

    fn open(&self, node: u64) -> BoxFuture<'static, Result<Arc<dyn BlobSource>, SourceError>> {
        let blobs = Arc::clone(&self.blobs);
        Box::pin(async move {
            let record = blobs
                .opener
                .table
                .by_node(node)
                .filter(|record| record.ready)
                .ok_or_else(|| SourceError {
                    errno: rustix::io::Errno::NOENT.raw_os_error(),
                    message: format!("node {node} is no layer"),
                })?;
            let slot = blobs.slot(record.number);
            slot.handles.fetch_add(1, Ordering::AcqRel);
            slot.touch();
            Ok(Arc::new(Device {
                blobs,
                slot,
                len: record.device_len,
                plain: OnceLock::new(),
            }) as Arc<dyn BlobSource>)
        })
    }

    fn closed(&self, node: u64) {
        debug!(node, "device closed");
    }
}

/// An open device file.
#[derive(Debug)]
struct Device {
    blobs: Arc<Blobs>,
    slot: Arc<Slot>,
    len: u64,
    plain: OnceLock<File>,
}

impl Device {
    /// The data file of a layer that is complete.
    fn complete(&self) -> Option<&File> {
        if let Some(file) = self.plain.get() {
            return Some(file);
        }
        let number = self.slot.number;
        let opener = &self.blobs.opener;
        if !opener.table.layer(number)?.complete {
            return None;
        }
        let path = opener.dir(number).data();
        match File::open(&path) {
            Ok(file) => Some(self.plain.get_or_init(|| file)),
            Err(error) => {
                warn!(path = %path.display(), %error, "a complete layer has no data file");
                None
            }
        }
    }
}

/// What a reader was given is in the page cache of its EROFS from then on: the data file's own
/// pages would hold it a second time. Only while a layer is incomplete they stay, because decoding
/// needs them and they may be dirty.
fn drop_behind(file: &File, offset: u64, len: usize) {
    // A large folio is dropped only as a whole, by the read that passes its end.
    const LARGEST_FOLIO: u64 = 2 << 20;
    let start = offset - offset % LARGEST_FOLIO;
    let end = offset.saturating_add(len as u64);
    if let Some(range) = NonZeroU64::new(end - start) {
        // Memory would be wasted, nothing else.
        let _ = fadvise(file, start, Some(range), Advice::DontNeed);
    }
}

impl BlobSource for Device {
    fn len(&self) -> u64 {
        self.len
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<ReadNow> {
        if let Some(blob) = &*self.slot.blob.load() {
            self.slot.touch();
            let answer = blob.try_read(offset, buf)?;
            if let (ReadNow::Ready(len), Some(file)) = (answer, self.complete()) {
                drop_behind(file, offset, len);
            }
            return Ok(answer);
        }
        if let Some(file) = self.complete() {
            let rest = self.len.saturating_sub(offset);
            let len = usize::try_from(rest).map_or(buf.len(), |rest| rest.min(buf.len()));
            file.read_exact_at(&mut buf[..len], offset)?;
            drop_behind(file, offset, len);
            return Ok(ReadNow::Ready(len));
        }
        Ok(ReadNow::Pending)
    }

    fn ensure(
        self: Arc<Self>,
        offset: u64,
        len: u64,
        cause: Cause,
    ) -> BoxFuture<'static, Result<(), SourceError>> {
        Box::pin(async move {
            if self.slot.blob.load().is_none() && self.complete().is_some() {
                return Ok(());
            }
            let blob = self.blobs.get(self.slot.number).await?;
            blob.ensure(offset, len, cause).await
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.slot.handles.fetch_sub(1, Ordering::AcqRel);
    }
}
