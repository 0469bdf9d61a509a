//! List: pages of one consistent view, for as long as the deadline allows.

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::status;
use crate::{
    api::snapshots::{ListSnapshotsRequest, ListSnapshotsResponse},
    drivers::{Driver, DriverError},
    store::{Filter, Reader, Store, StoreError},
};

/// Infos in one message, as containerd's own server does it.
const PAGE: usize = 100;
/// Pages made ahead of the client.
const AHEAD: usize = 2;

type Message = Result<ListSnapshotsResponse, Status>;

/// One List.
pub(super) struct Listing {
    reader: Reader,
    driver: Arc<dyn Driver>,
    snapshotter: String,
    namespace: Option<String>,
    filter: Filter,
    timeout: Duration,
}

impl Listing {
    /// Everything that can be wrong with the request.
    pub(super) fn new(
        store: &Store,
        driver: Arc<dyn Driver>,
        request: ListSnapshotsRequest,
        namespace: Option<String>,
        timeout: Duration,
    ) -> Result<Self, Status> {
        let fail = |error: StoreError| status::of(&DriverError::Store(error));
        Ok(Self {
            filter: Filter::parse(&request.filters).map_err(|error| fail(error.into()))?,
            reader: store.read().map_err(fail)?,
            driver,
            snapshotter: request.snapshotter,
            namespace,
            timeout,
        })
    }

    /// Starts sending; `done` hears how it ended.
    pub(super) fn stream(
        self,
        done: impl FnOnce(Option<&Status>) + Send + 'static,
    ) -> ReceiverStream<Message> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let timeout = self.timeout;
        tokio::spawn(async move {
            let (handle, pages) = (Handle::current(), sender.clone());
            let end = tokio::task::spawn_blocking(move || self.send(&handle, &pages)).await;
            let error = match end {
                Ok(Ok(())) => return done(None),
                Ok(Err(error)) => error,
                Err(error) => Status::internal(format!("List failed: {error}")),
            };
            done(Some(&error));
            // An incomplete list must never look complete.
            let _ = tokio::time::timeout(timeout, sender.send(Err(error))).await;
        });
        ReceiverStream::new(receiver)
    }

    fn send(self, handle: &Handle, sender: &mpsc::Sender<Message>) -> Result<(), Status> {
        let deadline = Instant::now() + self.timeout;
        let mut after: Option<String> = None;
        loop {
            let mut page = self
                .reader
                .page(&self.snapshotter, &self.filter, after.as_deref(), PAGE)
                .map_err(|error| status::of(&DriverError::Store(error)))?;
            let last = page.len() < PAGE;
            after = page.last().map(|info| info.name.clone());
            if page.is_empty() {
                return Ok(());
            }
            for info in &mut page {
                self.driver.decorate(&self.snapshotter, info);
            }
            self.driver.order(self.namespace.as_deref(), &mut page);
            let message = ListSnapshotsResponse {
                info: page.into_iter().map(Into::into).collect(),
            };
            let sent = handle.block_on(tokio::time::timeout_at(deadline, sender.send(Ok(message))));
            match sent {
                Ok(Ok(())) if last => return Ok(()),
                Ok(Ok(())) => {}
                // The client has enough.
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(Status::deadline_exceeded("the list was not read in time")),
            }
        }
    }
}
