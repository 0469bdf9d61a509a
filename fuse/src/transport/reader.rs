//! The threads that read the device.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::event::{
    EventfdFlags,
    epoll::{self, CreateFlags, Event, EventData, EventFlags},
    eventfd,
};

use super::session::{Received, Session, Ticket};

/// What is done with requests. Called on reader threads: it may read local files, never wait for
/// anything remote.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers a request now, or later from elsewhere.
    fn request(&self, ticket: Ticket);

    /// A signal reached the thread that waits for `unique`.
    fn interrupted(&self, unique: u64);

    /// The session is over. May be called by each reader.
    fn ended(&self);
}

/// Running reader threads of one session.
#[derive(Debug)]
pub(crate) struct Readers {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    wake: OwnedFd,
}

impl Readers {
    /// Locks the landings and starts the threads. Nothing may be left to replay.
    pub(crate) fn start(
        session: &Arc<Session>,
        handler: &Arc<dyn Handler>,
        count: usize,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut readers = Self {
            stop,
            threads: Vec::new(),
        };
        for slot in 0..count {
            if !session.table().prepare_landing(slot) {
                tracing::warn!(
                    slot,
                    "RLIMIT_MEMLOCK forbids locking the request buffer: a kill while the kernel \
                     copies into a page that was reclaimed would fail that request"
                );
            }
            let (session, handler) = (Arc::clone(session), Arc::clone(handler));
            let stop = Arc::clone(&readers.stop);
            let thread = thread::Builder::new()
                .name(format!("blobfs-read-{slot}"))
                .spawn(move || {
                    if let Err(e) = run(&session, &*handler, slot, &stop) {
                        tracing::error!(slot, error = %e, "a reader of /dev/fuse gave up");
                    }
                    session.table().leave_reader(slot);
                })?;
            readers.threads.push(thread);
        }
        Ok(readers)
    }

    /// Makes the threads stop and waits until they have. Requests that arrive from now on wait for
    /// the next daemon.
    pub(crate) fn stop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.stop.wake, &1u64.to_le_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(session: &Arc<Session>, handler: &dyn Handler, slot: usize, stop: &Stop) -> io::Result<()> {
    let device = session
        .device()
        .ok_or_else(|| io::Error::other("the session has no device"))?;
    let events = wait_set(device, stop.wake.as_fd())?;
    if !session.table().enter_reader(slot)? {
        return Err(io::Error::other("a newer daemon has taken over"));
    }
    while !stop.asked.load(Ordering::Acquire) {
        match session.receive(slot) {
            Ok(Received::Nothing) => wait(&events)?,
            Ok(Received::Ignored) => {}
            Ok(Received::Interrupt { unique }) => handler.interrupted(unique),
            Ok(Received::Request(ticket)) => {
                let unique = ticket.request().unique;
                let handled = catch_unwind(AssertUnwindSafe(|| handler.request(ticket)));
                if handled.is_err() {
                    tracing::error!(unique, "a source panicked; its reader got EIO");
                }
            }
            Ok(Received::Ended) => {
                handler.ended();
                return Ok(());
            }
            Err(e) => {
                // Nothing known leads here; giving up would hang every reader of the node.
                tracing::error!(slot, error = %e, "reading /dev/fuse failed, trying again");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
    Ok(())
}

/// Becomes ready with a request or with the wish to stop. The device is in it exclusively, so
/// that a request wakes one reader, not all.
fn wait_set(device: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let set = epoll::create(CreateFlags::CLOEXEC)?;
    let data = EventData::new_u64(0);
    epoll::add(&set, device, data, EventFlags::IN | EventFlags::EXCLUSIVE)?;
    epoll::add(&set, stop, data, EventFlags::IN)?;
    Ok(set)
}

fn wait(set: &OwnedFd) -> io::Result<()> {
    let mut events = [Event {
        flags: EventFlags::empty(),
        data: EventData::new_u64(0),
    }; 2];
    match epoll::wait(set, &mut events[..], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
