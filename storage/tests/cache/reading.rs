//! What readers see and what it costs the source.

use std::sync::Arc;

use formats::units::RemoteOffset;
use storage::{
    cache::{CacheOptions, PlanOptions},
    prefetch::Prefetch,
    source::{BlobSource as _, Cause, ReadNow},
};

use crate::{
    fixture::{Layer, open, open_with, options, read, scheduler, until},
    source::Act,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_is_right_whatever_the_order() {
    let layer = Layer::medium();
    for shared in [1, 5] {
        let layer = if shared == 1 {
            layer.clone()
        } else {
            Layer::new(&[10, 4096, 70_000, 3, 200_000, 9], 7_001, shared)
        };
        let source = layer.source();
        let dir = tempfile::tempdir().unwrap();
        let blob = open(dir.path(), &layer, &source);
        let len = blob.len();
        let mut at = len / 2 + 13;
        for step in 0..200_u64 {
            at = (at * 31 + step * 7919) % len;
            let n = usize::try_from((step * 977 % 150_000).min(len - at)).unwrap();
            let bytes = read(&blob, at, n).await.unwrap();
            assert!(bytes == layer.expected(at..at + n as u64), "{at} {n}");
        }
        assert_eq!(
            read(&blob, len, 10).await.unwrap(),
            b"",
            "the end is the end"
        );
        assert_eq!(read(&blob, len - 3, 10).await.unwrap().len(), 3);
        assert!(
            source.served() <= layer.blob.len() as u64,
            "nothing is fetched twice"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_one_chunk_share_one_fetch_and_one_inflate() {
    let layer = Layer::new(&[90_000], 100_000, 1);
    let source = layer.source();
    source.stall();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let readers: Vec<_> = (0..64)
        .map(|i| {
            let blob = Arc::clone(&blob);
            tokio::spawn(async move { read(&blob, i * 1000, 512).await })
        })
        .collect();
    until(|| blob.status().waiting_readers == 64).await;
    source.resume();
    for (i, reader) in readers.into_iter().enumerate() {
        let at = i as u64 * 1000;
        assert_eq!(reader.await.unwrap().unwrap(), layer.expected(at..at + 512));
    }
    assert_eq!(source.requests(), 1);
    assert_eq!(blob.status().decoded_chunks, 1);
    assert_eq!(blob.status().traffic.demand.requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_takes_nothing_with_it() {
    let layer = Layer::new(&[90_000], 100_000, 1);
    let source = layer.source();
    source.stall();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let first = tokio::spawn({
        let blob = Arc::clone(&blob);
        async move { read(&blob, 0, 100).await }
    });
    until(|| source.requests() == 1).await;
    let second = tokio::spawn({
        let blob = Arc::clone(&blob);
        async move { read(&blob, 50, 100).await }
    });
    until(|| blob.status().waiting_readers == 2).await;
    first.abort();
    until(|| blob.status().waiting_readers == 1).await;
    source.resume();
    assert_eq!(second.await.unwrap().unwrap(), layer.expected(50..150));
    assert_eq!(source.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_are_aligned_and_overlapping_ones_are_not_fetched_twice() {
    let layer = Layer::new(&[30_000; 60], 100_000, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let plan = PlanOptions {
        grid_bytes: 64 << 10,
        window_bytes: Some(0),
        gap_bytes: 0,
    };
    let blob = open_with(
        dir.path(),
        &layer,
        &source,
        &scheduler(),
        CacheOptions {
            plan,
            readahead: false,
            ..options()
        },
    );
    for chunk in [40, 3, 41, 20, 4, 39] {
        let at = layer.map.chunks()[chunk].decoded.0;
        read(&blob, at, 10).await.unwrap();
    }
    let mut blocks = std::collections::HashSet::new();
    for (range, cause) in source.log() {
        assert_eq!(cause, Cause::Demand);
        assert_eq!(range.start % 4096, 0);
        assert!(range.end % (64 << 10) == 0 || range.end % 4096 == 0);
        for block in range.start / 4096..range.end.div_ceil(4096) {
            assert!(blocks.insert(block), "block {block} twice");
        }
    }
    // The neighbours that came along are decoded without anybody asking.
    let before = source.requests();
    until(|| {
        let at = layer.map.chunks()[40].decoded.0;
        blob.try_read(at + 32_768, &mut [0; 16]).unwrap() == ReadNow::Ready(16)
    })
    .await;
    assert_eq!(source.requests(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_in_order_is_read_ahead_for() {
    let layer = Layer::new(&[8 << 20], 100_000, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let mut at = 0;
    while at < 8 << 20 {
        assert!(read(&blob, at, 128 << 10).await.unwrap() == layer.expected(at..at + (128 << 10)));
        at += 128 << 10;
    }
    let log = source.log();
    assert!(
        log.iter().all(|(range, _)| range.start % 4096 == 0),
        "{log:?}"
    );
    let windows = layer.blob.len() / (256 << 10);
    assert!(
        source.requests() < windows / 2,
        "{} requests for {windows} windows",
        source.requests()
    );
    assert!(source.served() <= layer.blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_kept_and_resumed() {
    let layer = Layer::new(&[200_000], 300_000, 1);
    let source = layer.source();
    source.script([Act::Truncate(70_001), Act::Truncate(20_000)]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    assert!(read(&blob, 0, 200_000).await.unwrap() == layer.expected(0..200_000));
    let starts: Vec<u64> = source.log().iter().map(|(range, _)| range.start).collect();
    assert_eq!(starts, [0, 70_001, 90_001]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_delivers_the_blob_once() {
    let layer = Layer::medium();
    let source = layer.source();
    source.always(Act::Whole);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let last = layer.map.chunks().last().unwrap().decoded.0;
    read(&blob, last, 10).await.unwrap();
    for chunk in layer.map.chunks() {
        let range = chunk.decoded_range();
        let bytes = read(&blob, range.start, chunk.len as usize).await.unwrap();
        assert!(bytes == layer.expected(range));
    }
    // The end of the blob, which no reader needs, comes as well.
    until(|| source.served() == layer.blob.len() as u64).await;
    assert_eq!(source.requests(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_list_comes_in_order_and_is_decoded() {
    let layer = Layer::new(&[100_000; 100], 100_000, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let landmark = layer.map.chunks()[80].remote;
    let done = blob.prefetch_done();
    blob.prefetch(landmark);
    assert!(matches!(done.await, Prefetch::Done));
    until(|| blob.status().decoded_chunks == 80).await;
    let log = source.log();
    let mut next = 0;
    for (range, cause) in &log {
        assert_eq!((*cause, range.start), (Cause::Prefetch, next));
        next = range.end;
    }
    assert!(next >= landmark.0 && next < landmark.0 + 4096);
    assert!(log.len() <= 5, "few large ranges: {log:?}");
    let bytes = read(&blob, 0, 100_000).await.unwrap();
    assert!(bytes == layer.expected(0..100_000));
    assert_eq!(source.requests(), log.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_a_start_list_that_is_near_and_passes_one_that_is_far() {
    let layer = Layer::new(&[50_000; 160], 100_000, 1);
    let source = layer.source();
    source.stall();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.prefetch(RemoteOffset(layer.blob.len() as u64));
    until(|| source.requests() == 1).await;
    let near = layer.map.chunks()[4].decoded.0;
    let far = layer.map.chunks()[35].decoded.0;
    let reads: Vec<_> = [near, far]
        .map(|at| {
            let blob = Arc::clone(&blob);
            tokio::spawn(async move { read(&blob, at, 100).await })
        })
        .into_iter()
        .collect();
    until(|| blob.status().waiting_readers == 2).await;
    source.resume();
    for (task, at) in reads.into_iter().zip([near, far]) {
        assert_eq!(task.await.unwrap().unwrap(), layer.expected(at..at + 100));
    }
    let demand: Vec<_> = source
        .log()
        .into_iter()
        .filter(|(_, cause)| *cause == Cause::Demand)
        .collect();
    // 1 % of 8 MB is less than a window: nothing may be fetched twice here.
    assert!(demand.is_empty(), "{demand:?}");
    assert!(matches!(blob.prefetch_done().await, Prefetch::Done));
    assert!(source.served() <= layer.blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn touched_chunks_are_listed_in_order() {
    let layer = Layer::new(&[10_000; 20], 100_000, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    for chunk in [7, 2, 7, 19, 0, 2] {
        read(&blob, layer.map.chunks()[chunk].decoded.0, 5)
            .await
            .unwrap();
    }
    let touched: Vec<u32> = blob.touched().iter().map(|c| c.0).collect();
    assert_eq!(touched, [7, 2, 19, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_without_files_has_nothing_to_read() {
    let layer = Layer::new(&[], 100, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    assert!(blob.is_empty());
    assert_eq!(read(&blob, 0, 10).await.unwrap(), b"");
    assert!((blob.status().percent_local - 100.0).abs() < f64::EPSILON);
}
