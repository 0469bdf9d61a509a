use std::{io::Cursor, path::Path};

use formats::stargz::{WriterOptions, build, inflate_toc, parse_footer};
use storage::{cache::SchedulerOptions, ranges::RangeSource, source::BoxFuture};

use super::*;
use crate::{
    layers::record::{Format, Identity, Origin, Verdict},
    resolve::remote::{Document, RemoteError},
    store::Store,
};

/// Nothing here asks it.
struct Nobody;

fn gone() -> RemoteError {
    RemoteError {
        detail: "no registry".into(),
        transient: false,
    }
}

impl Remote for Nobody {
    fn manifest(&self, _: &str, _: Digest) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>> {
        Box::pin(async { Err(gone()) })
    }

    fn named(&self, _: &str) -> BoxFuture<'static, Result<Document, RemoteError>> {
        Box::pin(async { Err(gone()) })
    }

    fn document(
        &self,
        _: &str,
        _: Digest,
        _: u64,
    ) -> BoxFuture<'static, Result<Vec<u8>, RemoteError>> {
        Box::pin(async { Err(gone()) })
    }

    fn trouble(&self, _: &str, _: Digest) -> Option<String> {
        None
    }

    fn blob(&self, _: &str, _: Digest, _: u64) -> Result<Arc<dyn RangeSource>, RemoteError> {
        Err(gone())
    }
}

/// An opener below `root`, and a layer whose index is there.
async fn opener(root: &Path) -> (Opener, Arc<LayerRecord>) {
    let mut blob = Vec::new();
    let limits = Limits::default();
    let tar = Cursor::new(vec![0; 1024]);
    build(tar, &mut blob, &WriterOptions::default(), &limits).unwrap();
    let footer = parse_footer(&blob, blob.len() as u64).unwrap();
    let (start, end) = (
        usize::try_from(footer.toc_offset.0).unwrap(),
        blob.len() - usize::try_from(footer.footer_len).unwrap(),
    );
    let toc = inflate_toc(&blob[start..end], &limits).unwrap();
    let table = tokio::task::block_in_place(|| {
        LayerTable::open(&Store::open(&root.join("store.db")).unwrap()).unwrap()
    });
    let identity = Identity {
        layer: Digest::of(&blob),
        format: Format::Estargz,
        index: Digest::of(&toc),
    };
    let record = table
        .insert(LayerRecord {
            number: LayerNumber(0),
            node: 0,
            identity,
            blob_len: blob.len() as u64,
            device_len: 0,
            empty: true,
            implied: Vec::new(),
            diff_id: None,
            content_diff_id: None,
            verdict: Verdict::Claimed,
            ready: true,
            complete: false,
            origins: vec![Origin {
                image: "r/x:1".into(),
                namespace: String::new(),
                manifest: None,
                diff_id: None,
            }],
            created: 1,
            resolve_ms: 1,
        })
        .await
        .unwrap();
    let opener = Opener {
        layers: root.join("layers"),
        table: Arc::new(table),
        remote: Arc::new(Nobody),
        scheduler: Scheduler::new(
            tokio::runtime::Handle::current(),
            SchedulerOptions::default(),
        ),
        limits,
        parsed: Arc::default(),
    };
    let dir = opener.dir(record.number);
    dir.create(&identity).unwrap();
    index::save(&dir, &toc, footer.toc_offset).unwrap();
    (opener, record)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_a_cache_that_is_still_ending() {
    let root = tempfile::tempdir().unwrap();
    let (opener, record) = opener(root.path()).await;
    let former = opener.wire(&record).await.unwrap();
    let blobs = Arc::new(Blobs::new(opener));
    let number = record.number;
    let getting = tokio::spawn({
        let blobs = Arc::clone(&blobs);
        async move { blobs.get(number).await }
    });
    while blobs.slot(number).opening.try_lock().is_ok() {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!getting.is_finished(), "two caches in one folder");
    // Another layer is opened meanwhile: no thread and no lock of everybody is held.
    assert!(blobs.open(LayerNumber(77)).is_none());
    drop(former);
    getting.await.unwrap().unwrap();
    // Closed and opened again at once, by many.
    for _ in 0..20 {
        let (closed, opened) = tokio::join!(blobs.close(number), blobs.get(number));
        opened.unwrap_or_else(|error| panic!("closed: {closed}, then: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_closed_by_its_owner_leaves_the_folder_though_it_is_held() {
    let root = tempfile::tempdir().unwrap();
    let (opener, record) = opener(root.path()).await;
    let blobs = Blobs::new(opener);
    let held = blobs.get(record.number).await.unwrap();
    held.close().await.unwrap();
    blobs.opener().wire(&record).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_never_ends_is_not_waited_for_for_ever() {
    let root = tempfile::tempdir().unwrap();
    let (opener, record) = opener(root.path()).await;
    let _former = opener.open_wire(&record).unwrap();
    let opened = opener.wire_within(&record, Duration::from_millis(20));
    let error = opened.await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
}
