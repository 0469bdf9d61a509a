//! One stalled source delays nobody else.

use std::sync::Arc;

use storage::cache::CacheOptions;

use crate::fixture::{Layer, open_with, options, read, scheduler, until};

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_stalled_reads_do_not_delay_another_layer() {
    let dead_layer = Layer::new(&[20_000; 400], 4_000, 1);
    let live_layer = Layer::medium();
    let (dead_source, live_source) = (dead_layer.source(), live_layer.source());
    dead_source.stall();
    let scheduler = scheduler();
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let quiet = CacheOptions {
        readahead: false,
        ..options()
    };
    let dead = open_with(
        a.path(),
        &dead_layer,
        &dead_source,
        &scheduler,
        quiet.clone(),
    );
    let live = open_with(b.path(), &live_layer, &live_source, &scheduler, quiet);
    let stalled: Vec<_> = (0..5_000)
        .map(|i| {
            let blob = Arc::clone(&dead);
            let chunks = dead_layer.map.chunks();
            let at = chunks[i % chunks.len()].decoded.0;
            tokio::spawn(async move { read(&blob, at, 64).await })
        })
        .collect();
    until(|| dead.status().waiting_readers == 5_000).await;
    dead.prefetch(dead_layer.map.chunks()[50].remote);
    dead.hydrate(dead_layer.hydrate_options());

    for chunk in live_layer.map.chunks() {
        let range = chunk.decoded_range();
        let bytes = read(&live, range.start, chunk.len as usize).await.unwrap();
        assert!(bytes == live_layer.expected(range));
    }
    live.hydrate(live_layer.hydrate_options());
    assert!(live.hydrated().await.unwrap().complete);
    assert_eq!(dead.status().waiting_readers, 5_000);
    assert!(dead.status().inflight_requests <= 40 + 32 * 4);

    dead_source.resume();
    for task in stalled {
        task.await.unwrap().unwrap();
    }
}
