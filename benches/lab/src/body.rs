//! Response bodies: read from files in large steps, paced by the link, bent by rules.

use std::{
    collections::VecDeque,
    fs::File,
    future::Future,
    io::{self, IoSliceMut},
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use rustix::io::{Errno, ReadWriteFlags};

use crate::{connection::Connection, link::Pacer, log::Recording, rules::BodyFaults};

/// Bytes read from a file at once.
const STEP: usize = 256 << 10;
/// Read buffers kept for reuse: 16 MiB.
const SPARE: usize = 64;

/// A stretch of a body.
#[derive(Debug)]
pub(crate) enum Part {
    /// Bytes at hand; `content` if they are the served content itself and not framing around it.
    Bytes { bytes: Bytes, content: bool },
    /// A stretch of a file.
    File { file: Arc<File>, range: Range<u64> },
}

impl Part {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes { bytes, .. } => bytes.len() as u64,
            Self::File { range, .. } => range.end - range.start,
        }
    }
}

/// A body on its way out.
pub(crate) struct ReplyBody {
    frames: Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, BodyError>> + Send>>,
    length: u64,
}

/// Why a body ended early: hyper then closes the connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("cut by a rule")]
    Cut { reset: bool },
    #[error("read blob")]
    Read(#[source] io::Error),
}

/// Everything a body needs.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) parts: VecDeque<Part>,
    pub(crate) faults: BodyFaults,
    pub(crate) pacer: Option<Pacer>,
    /// `None` for control replies.
    pub(crate) recording: Option<Recording>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) buffers: Arc<Buffers>,
}

impl ReplyBody {
    pub(crate) fn new(outgoing: Outgoing) -> Self {
        let length = outgoing.parts.iter().map(Part::len).sum();
        let sending = Sending {
            outgoing,
            ready: Bytes::new(),
            sent: 0,
            failed: false,
        };
        Self {
            frames: Box::pin(stream::unfold(sending, Sending::next)),
            length,
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.frames.as_mut().poll_next(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.length == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length)
    }
}

struct Sending {
    outgoing: Outgoing,
    /// Read and not yet sent.
    ready: Bytes,
    sent: u64,
    failed: bool,
}

impl Sending {
    async fn next(mut self) -> Option<(Result<Frame<Bytes>, BodyError>, Self)> {
        if self.failed {
            return None;
        }
        match self.frame().await {
            Ok(None) => None,
            Ok(Some(bytes)) => {
                self.sent += bytes.len() as u64;
                if let Some(recording) = &self.outgoing.recording {
                    recording.sent(bytes.len());
                }
                Some((Ok(Frame::data(bytes)), self))
            }
            Err(error) => {
                self.failed = true;
                // What was promised before the break is to arrive.
                self.outgoing.connection.flushed().await;
                if let BodyError::Cut { reset: true } = error {
                    self.outgoing.connection.reset_on_close();
                }
                Some((Err(error), self))
            }
        }
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, BodyError> {
        if !self.fill().await? {
            return Ok(None);
        }
        let faults = &self.outgoing.faults;
        for (_, gate) in faults.stalls.iter().filter(|(at, _)| *at == self.sent) {
            gate.pass().await;
        }
        if faults.truncate.is_some_and(|after| after <= self.sent) {
            return Err(BodyError::Cut { reset: false });
        }
        if faults.reset.is_some_and(|after| after <= self.sent) {
            return Err(BodyError::Cut { reset: true });
        }
        let mut want = self.ready.len() as u64;
        let marks = faults.stalls.iter().map(|(at, _)| *at);
        for mark in marks.chain(faults.truncate).chain(faults.reset) {
            if mark > self.sent {
                want = want.min(mark - self.sent);
            }
        }
        if let Some(rate) = faults.bytes_per_s {
            let rate = rate.max(1);
            want = want.min((rate / 20).max(1));
            let nanos = u64::try_from(u128::from(want) * 1_000_000_000 / u128::from(rate));
            tokio::time::sleep(Duration::from_nanos(nanos.unwrap_or(u64::MAX))).await;
        }
        if let Some(pacer) = &mut self.outgoing.pacer {
            want = pacer.grant(want).await;
        }
        // At most ready.len(), so it fits.
        let want = usize::try_from(want).unwrap_or(usize::MAX);
        Ok(Some(self.ready.split_to(want)))
    }

    /// Makes `ready` non-empty; false at the end of the body.
    async fn fill(&mut self) -> Result<bool, BodyError> {
        while self.ready.is_empty() {
            match self.outgoing.parts.front_mut() {
                None => return Ok(false),
                Some(Part::Bytes { bytes, content }) => {
                    self.ready = if *content && !self.outgoing.faults.flips.is_empty() {
                        let mut copy = bytes.to_vec();
                        flip(&mut copy, 0, &self.outgoing.faults.flips);
                        copy.into()
                    } else {
                        std::mem::take(bytes)
                    };
                    self.outgoing.parts.pop_front();
                }
                Some(Part::File { range, .. }) if range.is_empty() => {
                    self.outgoing.parts.pop_front();
                }
                Some(Part::File { file, range }) => {
                    let len = usize::try_from(range.end - range.start)
                        .unwrap_or(STEP)
                        .min(STEP);
                    let buffer = self.outgoing.buffers.take();
                    let mut buffer = read_at(file, range.start, buffer, len)
                        .await
                        .map_err(BodyError::Read)?;
                    flip(
                        buffer.filled_mut(),
                        range.start,
                        &self.outgoing.faults.flips,
                    );
                    range.start += buffer.len as u64;
                    self.ready = Bytes::from_owner(buffer);
                }
            }
        }
        Ok(true)
    }
}

/// Reads at least one byte. What is in the page cache is read at once, the rest on a thread that
/// may block.
fn read_at(
    file: &Arc<File>,
    offset: u64,
    mut buffer: Buffer,
    len: usize,
) -> impl Future<Output = io::Result<Buffer>> + Send + use<> {
    let file = file.clone();
    async move {
        let slice = &mut buffer.bytes[..len];
        let quick = rustix::io::preadv2(
            &file,
            &mut [IoSliceMut::new(slice)],
            offset,
            ReadWriteFlags::NOWAIT,
        );
        match quick {
            Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP) => {}
            Ok(n) => {
                buffer.len = n;
                return Ok(buffer);
            }
            Err(error) => return Err(error.into()),
        }
        let reading = tokio::task::spawn_blocking(move || {
            let n = rustix::io::pread(&file, &mut buffer.bytes[..len], offset)?;
            if n == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            buffer.len = n;
            Ok(buffer)
        });
        reading.await.map_err(io::Error::other)?
    }
}

/// Inverts those of `bytes`, which lie at `offset` in the content, that are in `spans`.
fn flip(bytes: &mut [u8], offset: u64, spans: &[Range<u64>]) {
    let index = |at: u64| {
        usize::try_from(at.saturating_sub(offset)).map_or(bytes.len(), |i| i.min(bytes.len()))
    };
    let spans: Vec<_> = spans
        .iter()
        .map(|span| index(span.start)..index(span.end))
        .collect();
    for span in spans {
        for byte in &mut bytes[span] {
            *byte = !*byte;
        }
    }
}

/// Read buffers, used again and again: fresh memory costs more than the read.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    spare: Mutex<Vec<Box<[u8]>>>,
}

impl Buffers {
    fn take(self: &Arc<Self>) -> Buffer {
        let spare = self.spare.lock().pop();
        Buffer {
            bytes: spare.unwrap_or_else(|| vec![0; STEP].into_boxed_slice()),
            len: 0,
            home: self.clone(),
        }
    }
}

/// A buffer that goes home when the last byte of it was sent.
#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
    home: Arc<Buffers>,
}

impl Buffer {
    fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut spare = self.home.spare.lock();
        if spare.len() < SPARE {
            spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flips_only_what_lies_in_the_spans() {
        let mut bytes = [0_u8; 8];
        flip(&mut bytes, 100, &[0..50, 90..101, 103..105, 107..u64::MAX]);
        assert_eq!(bytes, [255, 0, 0, 255, 255, 0, 0, 255]);
    }
}
