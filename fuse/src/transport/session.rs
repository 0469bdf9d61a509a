//! One session: a device, its table, and memory to answer from.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::io::Errno;

use super::channel::Channel;
use crate::{
    sys::{
        abi::op,
        arena::{Arena, Buffer},
    },
    table::{Granted, RecordIndex, Request, Table, layout, steps::arrow},
};

/// A FUSE session as the daemon serves it.
#[derive(Debug)]
pub(crate) struct Session {
    name: String,
    table: Table,
    channel: Box<dyn Channel>,
    arena: Arc<Arena>,
    ended: AtomicBool,
}

/// What one look at the device gave.
#[derive(Debug)]
pub(crate) enum Received {
    /// There is no request now.
    Nothing,
    /// Something was there that needs no answer.
    Ignored,
    /// A signal reached the thread that waits for `unique`.
    Interrupt { unique: u64 },
    /// A recorded request.
    Request(Ticket),
    /// The session is over: unmounted or aborted.
    Ended,
}

impl Session {
    pub(crate) fn new(
        name: String,
        table: Table,
        channel: Box<dyn Channel>,
        arena: Arc<Arena>,
    ) -> Self {
        Self {
            name,
            table,
            channel,
            arena,
            ended: AtomicBool::new(false),
        }
    }

    /// Its name with the holder, and in mountinfo's source field.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) fn device(&self) -> Option<BorrowedFd<'_>> {
        self.channel.fd()
    }

    /// Whether the kernel has ended it.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A reply buffer.
    pub(crate) fn buffer(&self) -> Buffer {
        self.arena.take()
    }

    /// Longest payload of an answer.
    pub(crate) fn longest_reply(&self) -> usize {
        self.arena.payload()
    }

    /// Steps 4 and 5, without waiting.
    pub(crate) fn receive(self: &Arc<Self>, reader: usize) -> io::Result<Received> {
        self.table.clear_landing(reader);
        arrow("landing empty, nothing read");
        #[cfg(feature = "must-fail")]
        self.table.head().unmap(layout::landing(reader))?;
        let read = self
            .channel
            .receive(self.table.head(), layout::landing(reader));
        if let Err(e) = read {
            return match e.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::AGAIN) => Ok(Received::Nothing),
                // ENOENT: the request was aborted while it was read.
                Some(Errno::INTR | Errno::NOENT) => Ok(Received::Ignored),
                Some(Errno::NODEV | Errno::CONNABORTED) => {
                    self.ended.store(true, Ordering::Release);
                    Ok(Received::Ended)
                }
                _ => Err(e),
            };
        }
        arrow("landing full, no record");
        let Some(request) = self.table.landed(reader) else {
            return Ok(Received::Ignored);
        };
        if !request.wants_reply() {
            self.table.clear_landing(reader);
            return Ok(if request.opcode == op::INTERRUPT {
                Received::Interrupt {
                    unique: request.offset,
                }
            } else {
                Received::Ignored
            });
        }
        match self.table.record(reader, &request) {
            Ok(record) => Ok(Received::Request(Ticket {
                session: Arc::clone(self),
                record: Some(record),
                request,
            })),
            Err(e) => {
                // No memory for a record: the one answer that is given without one.
                tracing::error!(error = %e, "no room to record a request");
                let error = -Errno::NOMEM.raw_os_error();
                let _ = self.reply(&mut self.buffer(), request.unique, error, 0);
                self.table.clear_landing(reader);
                Ok(Received::Ignored)
            }
        }
    }

    /// Step 12: what a former daemon left unanswered, as tickets of this one.
    pub(crate) fn take_over(self: &Arc<Self>) -> Result<Vec<Ticket>, crate::table::TableError> {
        let open = self.table.take_over()?;
        Ok(open
            .into_iter()
            .map(|(record, request)| Ticket {
                session: Arc::clone(self),
                record: Some(record),
                request,
            })
            .collect())
    }

    /// Writes an answer. False: it could not be delivered and the kernel still waits.
    fn reply(&self, buffer: &mut Buffer, unique: u64, error: i32, len: usize) -> bool {
        for attempt in 1..=20 {
            let Err(e) = self.channel.reply(buffer, unique, error, len) else {
                return true;
            };
            match e.raw_os_error().map(Errno::from_raw_os_error) {
                // Answered already, or its reader is gone.
                Some(Errno::NOENT) => return true,
                Some(Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => {
                    self.ended.store(true, Ordering::Release);
                    return true;
                }
                Some(Errno::NOMEM | Errno::AGAIN | Errno::INTR) => {
                    thread::sleep(Duration::from_millis(attempt));
                }
                // EFAULT: the copy failed; the kernel has ended the request with EIO itself.
                Some(Errno::FAULT) => {
                    tracing::error!(unique, "the kernel could not copy a reply");
                    return true;
                }
                _ => {
                    tracing::error!(unique, error, len, cause = %e, "the kernel refused a reply");
                    let eio = -Errno::IO.raw_os_error();
                    return self.channel.reply(buffer, unique, eio, 0).is_ok();
                }
            }
        }
        tracing::error!(unique, "no memory to answer with; left to the next daemon");
        false
    }
}

/// The right, and the duty, to answer one recorded request.
///
/// Dropped unanswered it leaves the record to the next daemon, unless a panic drops it: then the
/// reader gets EIO instead of waiting for a restart.
#[derive(Debug)]
pub(crate) struct Ticket {
    session: Arc<Session>,
    record: Option<RecordIndex>,
    request: Request,
}

impl Ticket {
    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// The handle on `node` for the OPEN this is. `None`: all handles are in use.
    pub(crate) fn grant_handle(&self, node: u64) -> Option<Granted> {
        let table = &self.session.table;
        table.grant_handle(self.record?, &self.request, node)
    }

    /// Answers with the first `len` payload bytes of `buffer`, which comes from
    /// [`Session::buffer`].
    pub(crate) fn answer(mut self, buffer: &mut Buffer, len: usize) {
        self.send(buffer, 0, len);
    }

    /// Answers with these bytes.
    pub(crate) fn answer_bytes(mut self, bytes: &[u8]) {
        let mut buffer = self.session.buffer();
        match buffer.payload().get_mut(..bytes.len()) {
            Some(payload) => {
                payload.copy_from_slice(bytes);
                self.send(&mut buffer, 0, bytes.len());
            }
            None => self.send(&mut buffer, -Errno::IO.raw_os_error(), 0),
        }
    }

    /// Answers with an errno.
    pub(crate) fn fail(mut self, errno: i32) {
        // The kernel takes -511 to -1; anything else is not an errno a reader may get.
        let errno = if (1..512).contains(&errno) {
            errno
        } else {
            Errno::IO.raw_os_error()
        };
        let mut buffer = self.session.buffer();
        self.send(&mut buffer, -errno, 0);
    }

    fn send(&mut self, buffer: &mut Buffer, error: i32, len: usize) {
        let Some(record) = self.record.take() else {
            return;
        };
        arrow("record pending, not answered");
        let delivered = self.session.reply(buffer, self.request.unique, error, len);
        arrow("answered, record pending");
        if delivered {
            self.session.table.free(record);
        }
        arrow("record free");
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.record.is_some() && thread::panicking() && !cfg!(test) {
            let mut buffer = self.session.buffer();
            self.send(&mut buffer, -Errno::IO.raw_os_error(), 0);
        }
    }
}
