//! What is on disk is true after any stop.

use std::{fs, path::Path};

use formats::digest::Digest;
use storage::{
    cache::{CacheOptions, LayerBlob, Verify, Wire, WireOptions},
    source::{BlobSource as _, ReadNow},
};

use crate::{
    fixture::{Layer, open, open_with, options, read, scheduler, until},
    source::{Act, Handle},
};

fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

/// Local chunks of a freshly opened cache whose source is gone; every one of them must be right.
pub(crate) async fn local_chunks(dir: &Path, layer: &Layer) -> usize {
    let source = layer.source();
    source.always(Act::Refuse);
    let blob = open(dir, layer, &source);
    let mut local = 0;
    for chunk in layer.map.chunks() {
        let range = chunk.decoded_range();
        let mut buf = vec![0; chunk.len as usize];
        match blob.try_read(range.start, &mut buf).unwrap() {
            ReadNow::Ready(_) => {
                assert!(buf == layer.expected(range));
                local += 1;
            }
            // What is in the wire only needs no source either.
            ReadNow::Pending => {
                if let Ok(bytes) = read(&blob, range.start, chunk.len as usize).await {
                    assert!(bytes == layer.expected(range));
                    local += 1;
                }
            }
        }
    }
    local
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_keeps_everything() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    for chunk in layer.map.chunks() {
        read(&blob, chunk.decoded.0, 1).await.unwrap();
    }
    blob.close().await.unwrap();
    drop(blob);
    assert!(dir.path().join("clean").exists());
    assert_eq!(
        local_chunks(dir.path(), &layer).await,
        layer.map.chunks().len()
    );
    assert!(
        !dir.path().join("clean").exists(),
        "the marker speaks of the last stop only"
    );
}

/// A crash leaves map pages that are older than the data, never newer. Copies the files of a live
/// cache in the order in which a crash may have left them, again and again while it is filled.
#[tokio::test(flavor = "multi_thread")]
async fn after_an_unclean_stop_what_the_maps_say_is_true() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let mut kept = 0;
    for (number, chunk) in layer.map.chunks().iter().enumerate() {
        read(&blob, chunk.decoded.0, 1).await.unwrap();
        if number % 60 != 30 {
            continue;
        }
        if number % 120 == 30 {
            // Let a flush happen.
            until(|| dir.path().join("data.map").exists()).await;
        }
        let crashed = tempfile::tempdir().unwrap();
        copy(dir.path(), crashed.path(), &["wire.map", "data.map"]);
        copy(dir.path(), crashed.path(), &["wire", "data"]);
        kept = local_chunks(crashed.path(), &layer).await;
    }
    assert!(kept > 0, "something had been flushed");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_data_a_map_means_nothing() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    read(&blob, 0, layer.decoded.len()).await.unwrap();
    blob.close().await.unwrap();
    drop(blob);
    for (lost, cut) in [(true, 0), (false, 4096)] {
        let broken = tempfile::tempdir().unwrap();
        copy(
            dir.path(),
            broken.path(),
            &["wire.map", "data.map", "wire", "data"],
        );
        for name in ["wire", "data"] {
            let path = broken.path().join(name);
            if lost {
                fs::remove_file(path).unwrap();
            } else {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                file.set_len(file.metadata().unwrap().len() - cut).unwrap();
            }
        }
        assert_eq!(local_chunks(broken.path(), &layer).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_identity_starts_empty() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    read(&blob, 0, layer.decoded.len()).await.unwrap();
    blob.close().await.unwrap();
    drop(blob);
    source.always(Act::Refuse);
    let wire = Wire::open(
        WireOptions {
            dir: dir.path().to_owned(),
            identity: Digest::of(b"another"),
            name: "other".to_owned(),
        },
        std::sync::Arc::new(Handle(source)),
        scheduler(),
    )
    .unwrap();
    assert_eq!(wire.present_bytes(), 0);
    let blob = LayerBlob::open(wire, layer.map.clone(), options()).unwrap();
    assert_eq!(blob.try_read(0, &mut [0; 16]).unwrap(), ReadNow::Pending);
    assert!(read(&blob, 0, 16).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn verification_at_open_finds_rotten_chunks() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    read(&blob, 0, layer.decoded.len()).await.unwrap();
    blob.close().await.unwrap();
    let path = blob.data_path();
    drop(blob);
    let mut data = fs::read(&path).unwrap();
    let victim = &layer.map.chunks()[5];
    data[usize::try_from(victim.decoded.0).unwrap()] ^= 1;
    fs::write(&path, data).unwrap();
    let blob = open_with(
        dir.path(),
        &layer,
        &source,
        &scheduler(),
        CacheOptions {
            verify: Verify::Always,
            ..options()
        },
    );
    assert_eq!(
        blob.try_read(victim.decoded.0, &mut [0]).unwrap(),
        ReadNow::Pending
    );
    assert!(blob.status().last_error.is_none());
    assert!(blob.status().events[0].message.contains("chunk 5"));
    assert!(read(&blob, 0, layer.decoded.len()).await.unwrap() == *layer.decoded);
}

#[tokio::test(flavor = "multi_thread")]
async fn hydration_goes_on_where_it_was_without_fetching_twice() {
    let layer = Layer::new(&[100_000; 120], 100_000, 1);
    let source = layer.source();
    source.stall();
    let dir = tempfile::tempdir().unwrap();
    {
        let blob = open(dir.path(), &layer, &source);
        blob.hydrate(layer.hydrate_options());
        source.let_through(200);
        until(|| source.is_used_up()).await;
        // All but the blocks that fetches are in the middle of.
        until(|| blob.wire().present_bytes() + 12 * 4096 > source.served()).await;
        blob.close().await.unwrap();
        drop(blob);
    }
    let fresh = layer.source();
    let blob = open(dir.path(), &layer, &fresh);
    blob.hydrate(layer.hydrate_options());
    assert!(blob.hydrated().await.unwrap().complete);
    let size = layer.blob.len() as u64;
    // What was received but not yet flushed may come again: a few blocks.
    assert!(source.served() + fresh.served() <= size + size / 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_cache_leaves_its_folder_to_the_next_one() {
    let layer = Layer::new(&[100_000; 40], 100_000, 1);
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let old = open(dir.path(), &layer, &source);
    read(&old, 0, 100_000).await.unwrap();
    source.stall();
    let last = layer.map.chunks()[39].decoded.0;
    let waiting = tokio::spawn({
        let old = old.clone();
        async move { read(&old, last, 10).await }
    });
    until(|| old.status().waiting_readers == 1).await;
    old.close().await.unwrap();
    let count = old.wire().present_bytes();

    // Somebody else takes over while the old one is still held and its source wakes up.
    let fresh = layer.source();
    let new = open(dir.path(), &layer, &fresh);
    source.resume();
    let len = layer.decoded.len();
    assert!(read(&new, 0, len).await.unwrap() == *layer.decoded);
    assert_eq!(read(&old, 0, 10).await.unwrap(), layer.expected(0..10));
    assert_eq!(old.wire().present_bytes(), count);
    assert!(
        !waiting.is_finished(),
        "the successor answers, not the old one"
    );
    new.close().await.unwrap();
    drop((old, new));
    waiting.abort();
    assert_eq!(local_chunks(dir.path(), &layer).await, 40);
}
