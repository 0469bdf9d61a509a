//! A registry in this process, on a thread and a runtime of its own.

use std::{ops::Deref, sync::mpsc, thread};

use tokio::sync::oneshot;

use crate::{
    handle::Handle,
    options::LabOptions,
    server::{LabError, Server},
};

/// A running registry. It has its own threads, so it answers while the caller blocks. Dropping it
/// stops it.
#[derive(Debug)]
pub struct Lab {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Lab {
    /// Starts a registry; it listens when this returns.
    pub async fn start(options: LabOptions) -> Result<Self, LabError> {
        let (report, started) = oneshot::channel();
        // Nobody waits for the answer if the start was cancelled.
        let spawned = Self::spawn(options, |answer| drop(report.send(answer)))?;
        spawned.with(started.await.ok())
    }

    /// The same without `await`; blocks for some milliseconds.
    pub fn start_blocking(options: LabOptions) -> Result<Self, LabError> {
        let (report, started) = mpsc::channel();
        let spawned = Self::spawn(options, move |answer| drop(report.send(answer)))?;
        spawned.with(started.recv().ok())
    }

    /// Stops the registry: running requests have half a second to end.
    pub async fn stop(mut self) {
        if let Some(thread) = self.signal() {
            // The thread may need that half second; a panic in it has been printed already.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }

    fn spawn(
        options: LabOptions,
        report: impl FnOnce(Result<Handle, LabError>) + Send + 'static,
    ) -> Result<Spawned, LabError> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("lab-worker")
            .enable_all()
            .build()
            .map_err(LabError::Thread)?;
        let thread = thread::Builder::new()
            .name("lab".into())
            .spawn(move || {
                runtime.block_on(async {
                    match Server::bind(options) {
                        Ok(server) => {
                            report(Ok(server.handle()));
                            // An error means that the Lab is gone: stop as well.
                            server.run(async { drop(stopped.await) }).await;
                        }
                        Err(error) => report(Err(error)),
                    }
                });
            })
            .map_err(LabError::Thread)?;
        Ok(Spawned { stop, thread })
    }

    fn signal(&mut self) -> Option<thread::JoinHandle<()>> {
        // The receiver is gone if the thread has ended, which is what is wanted.
        let _ = self.stop.take()?.send(());
        self.thread.take()
    }
}

struct Spawned {
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Spawned {
    fn with(self, started: Option<Result<Handle, LabError>>) -> Result<Lab, LabError> {
        let handle = started.ok_or(LabError::Ended)??;
        Ok(Lab {
            handle,
            stop: Some(self.stop),
            thread: Some(self.thread),
        })
    }
}

impl Deref for Lab {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(thread) = self.signal() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}
