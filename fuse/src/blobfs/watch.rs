//! One of holder and daemon always lives: when the holder goes, the daemon starts another and
//! gives it duplicates of everything.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    holder::{Client, HolderError},
    transport::Session,
};

/// What a new holder has to get.
#[derive(Debug, Default)]
struct Belongings {
    sessions: Vec<Arc<Session>>,
    kept: BTreeMap<String, OwnedFd>,
}

/// The thread that waits for the holder's end.
#[derive(Debug)]
pub(super) struct HolderWatch {
    belongings: Arc<Mutex<Belongings>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl HolderWatch {
    pub(super) fn start(holder: Arc<Client>, sessions: Vec<Arc<Session>>) -> io::Result<Self> {
        let belongings = Arc::new(Mutex::new(Belongings {
            sessions,
            kept: BTreeMap::new(),
        }));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let thread = thread::Builder::new()
            .name("holder-watch".to_owned())
            .spawn({
                let (belongings, stop) = (Arc::clone(&belongings), Arc::clone(&stop));
                move || watch(&holder, &belongings, stop.as_fd())
            })?;
        Ok(Self {
            belongings,
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn keep(&self, name: &str, fd: BorrowedFd<'_>) {
        if let Ok(fd) = fd.try_clone_to_owned() {
            self.belongings.lock().kept.insert(name.to_owned(), fd);
        }
    }

    pub(super) fn forget(&self, name: &str) {
        self.belongings.lock().kept.remove(name);
    }

    pub(super) fn stop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_le_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for HolderWatch {
    fn drop(&mut self) {
        self.stop();
    }
}

fn watch(holder: &Client, belongings: &Mutex<Belongings>, stop: BorrowedFd<'_>) {
    loop {
        match holder.wait_gone(stop) {
            Ok(true) => {}
            Ok(false) => return,
            Err(e) => return tracing::error!(error = %e, "cannot watch the holder"),
        }
        tracing::warn!("the holder is gone, starting another");
        if let Err(e) = replace(holder, &belongings.lock()) {
            tracing::error!(
                error = &e as &dyn std::error::Error,
                "no holder: if this daemon dies now, readers get errors"
            );
            thread::sleep(Duration::from_secs(1));
        }
    }
}

fn replace(holder: &Client, belongings: &Belongings) -> Result<(), HolderError> {
    holder.restart()?;
    for session in &belongings.sessions {
        let Some(device) = session.device().filter(|_| !session.has_ended()) else {
            continue;
        };
        holder.restore(session.name(), device, session.table().fd())?;
    }
    for (name, fd) in &belongings.kept {
        holder.put(name, fd.as_fd())?;
    }
    Ok(())
}
