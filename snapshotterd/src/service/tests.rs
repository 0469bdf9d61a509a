//! What the service does whatever a driver does: deadlines, panics, names, the remote answer.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::Notify;

use super::{snapshots_server::Snapshots as _, *};
use crate::{
    config::{Config, DriverKind, Overrides},
    store::Usage,
};

const DEADLINE: Duration = Duration::from_millis(100);

/// Does as the key says.
#[derive(Debug, Default)]
struct Odd {
    finished: Arc<AtomicBool>,
    /// Ends what is slow.
    release: Arc<Notify>,
}

#[async_trait]
impl Driver for Odd {
    fn name(&self) -> &'static str {
        "odd"
    }

    async fn prepare(&self, request: CreateRequest) -> Result<Prepared, DriverError> {
        match &*request.key.key {
            "remote" => Ok(Prepared::Remote),
            "slow" => {
                self.release.notified().await;
                self.finished.store(true, Ordering::Release);
                Ok(Prepared::Active(Vec::new()))
            }
            "panic" => panic!("on purpose"),
            _ => Ok(Prepared::Active(Vec::new())),
        }
    }

    async fn view(&self, _: CreateRequest) -> Result<Vec<Mount>, DriverError> {
        Err(DriverError::Unavailable("two images disagree".to_owned()))
    }

    async fn mounts(&self, _: &SnapshotKey) -> Result<Vec<Mount>, DriverError> {
        Ok(Vec::new())
    }

    async fn commit(&self, _: CommitSnapshot) -> Result<(), DriverError> {
        Ok(())
    }

    async fn remove(&self, _: &SnapshotKey) -> Result<(), DriverError> {
        Ok(())
    }

    async fn usage(&self, _: &SnapshotKey) -> Result<Usage, DriverError> {
        Ok(Usage::default())
    }

    async fn cleanup(&self) -> Result<(), DriverError> {
        self.release.notified().await;
        Ok(())
    }
}

struct Setup {
    service: Snapshots,
    finished: Arc<AtomicBool>,
    release: Arc<Notify>,
    _directory: tempfile::TempDir,
}

fn setup() -> Setup {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(&directory.path().join("metadata.redb")).expect("a store");
    let config = Config::parse(
        "default_driver = \"none\"\n[snapshotters.odd]\ndriver = \"overlayfs\"\n",
        &Overrides::default(),
    )
    .expect("a configuration");
    let driver = Odd::default();
    let finished = Arc::clone(&driver.finished);
    let release = Arc::clone(&driver.release);
    let drivers = Drivers::only(Arc::new(config), DriverKind::Overlayfs, Arc::new(driver));
    Setup {
        service: Snapshots::new(store, drivers, Metrics::default(), DEADLINE),
        finished,
        release,
        _directory: directory,
    }
}

fn prepare(
    snapshotter: &str,
    key: &str,
    reference: Option<&str>,
) -> Request<PrepareSnapshotRequest> {
    Request::new(PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.to_owned(),
        parent: String::new(),
        labels: reference
            .map(|reference| (SNAPSHOT_REF.to_owned(), reference.to_owned()))
            .into_iter()
            .collect(),
    })
}

async fn code_of(service: &Snapshots, request: Request<PrepareSnapshotRequest>) -> Code {
    match service.prepare(request).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn names_select_drivers() {
    let setup = setup();
    assert_eq!(
        code_of(&setup.service, prepare("odd", "k", None)).await,
        Code::Ok
    );
    for name in ["", "other"] {
        let code = code_of(&setup.service, prepare(name, "k", None)).await;
        assert_eq!(code, Code::InvalidArgument, "{name:?}");
    }
}

#[tokio::test]
async fn a_remote_answer_needs_the_label_that_containerd_looks_it_up_by() {
    let setup = setup();
    let with = code_of(&setup.service, prepare("odd", "remote", Some("sha256:x"))).await;
    assert_eq!(with, Code::AlreadyExists);
    let without = code_of(&setup.service, prepare("odd", "remote", None)).await;
    assert_eq!(without, Code::Internal);
}

#[tokio::test]
async fn a_panic_is_one_requests_error() {
    let setup = setup();
    let code = code_of(&setup.service, prepare("odd", "panic", None)).await;
    assert_eq!(code, Code::Internal);
    assert_eq!(
        code_of(&setup.service, prepare("odd", "k", None)).await,
        Code::Ok
    );
    assert!(
        setup
            .service
            .metrics
            .render()
            .contains("snapshotterd_rpc_panics_total{method=\"Prepare\"} 1")
    );
    assert_eq!(setup.service.in_flight.value(), 0);
}

#[tokio::test]
async fn after_the_deadline_the_work_goes_on() {
    let setup = setup();
    let code = code_of(&setup.service, prepare("odd", "slow", None)).await;
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(!setup.finished.load(Ordering::Acquire));
    assert_eq!(setup.service.in_flight.value(), 1);
    setup.release.notify_one();
    while setup.service.in_flight.value() > 0 {
        tokio::task::yield_now().await;
    }
    assert!(setup.finished.load(Ordering::Acquire));
}

#[tokio::test]
async fn deleting_may_take_longer_than_a_request() {
    let setup = setup();
    let request = Request::new(CleanupRequest {
        snapshotter: "odd".to_owned(),
    });
    setup
        .service
        .cleanup(request)
        .await
        .expect("goes on behind");
}

#[tokio::test]
async fn a_drivers_refusal_keeps_its_code_and_text() {
    let setup = setup();
    let request = Request::new(ViewSnapshotRequest {
        snapshotter: "odd".to_owned(),
        key: "k".to_owned(),
        ..ViewSnapshotRequest::default()
    });
    let status = setup.service.view(request).await.expect_err("refused");
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "two images disagree");
}
