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

pub(super) fn start(
    store: &Store,
    driver: Arc<dyn Driver>,
    request: ListSnapshotsRequest,
    namespace: Option<String>,
    timeout: Duration,
) -> Result<ReceiverStream<Message>, Status> {
    let fail = |error: StoreError| status::of(&DriverError::Store(error));
    let filter = Filter::parse(&request.filters).map_err(|error| fail(error.into()))?;
    let reader = store.read().map_err(fail)?;
    let (sender, receiver) = mpsc::channel(AHEAD);
    let listing = Listing {
        reader,
        driver,
        snapshotter: request.snapshotter,
        namespace,
        filter,
        sender: sender.clone(),
        deadline: Instant::now() + timeout,
    };
    tokio::spawn(async move {
        let handle = Handle::current();
        let end = tokio::task::spawn_blocking(move || listing.run(&handle)).await;
        // An incomplete list must never look complete.
        let error = match end {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(error) => Status::internal(format!("List failed: {error}")),
        };
        tracing::warn!(code = ?error.code(), message = error.message(), "List ended early");
        let _ = tokio::time::timeout(timeout, sender.send(Err(error))).await;
    });
    Ok(ReceiverStream::new(receiver))
}

struct Listing {
    reader: Reader,
    driver: Arc<dyn Driver>,
    snapshotter: String,
    namespace: Option<String>,
    filter: Filter,
    sender: mpsc::Sender<Message>,
    deadline: Instant,
}

impl Listing {
    fn run(self, handle: &Handle) -> Result<(), Status> {
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
            let sent = handle.block_on(tokio::time::timeout_at(
                self.deadline,
                self.sender.send(Ok(message)),
            ));
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
