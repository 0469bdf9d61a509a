//! Wrong bytes from the source, and sources that fail.

use crate::{
    fixture::{Layer, open, read, until},
    source::Act,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_fetched_again_and_never_seen() {
    let layer = Layer::new(&[90_000, 50_000], 100_000, 1);
    let source = layer.source();
    source.script([Act::Flip(40_000)]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    assert!(read(&blob, 0, 90_000).await.unwrap() == layer.expected(0..90_000));
    assert_eq!(source.requests(), 2);
    let status = blob.status();
    assert_eq!(status.corrupt_chunks, 1);
    assert_eq!(status.failed_reads, 0);
    assert!(status.last_error.unwrap().contains("digest mismatch"));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_twice_is_an_error_that_names_everything_and_the_next_read_tries_again() {
    let layer = Layer::new(&[90_000], 100_000, 1);
    let source = layer.source();
    source.script([Act::Flip(40_000), Act::Garbage]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let error = read(&blob, 0, 100).await.unwrap_err();
    for part in [
        "test/image layer 1",
        "chunk 0",
        "decoded offset 0",
        "memory:layer",
        &layer.map.chunks()[0].digest.to_string(),
    ] {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
    assert_eq!(blob.status().corrupt_chunks, 2);
    assert_eq!(blob.status().failed_reads, 1);
    // Once the source is honest again, so is the answer.
    assert_eq!(read(&blob, 0, 100).await.unwrap(), layer.expected(0..100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_only_lies_gives_errors_only() {
    let layer = Layer::medium();
    let source = layer.source();
    source.always(Act::Garbage);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    for chunk in layer.map.chunks().iter().step_by(9) {
        assert!(read(&blob, chunk.decoded.0, 1).await.is_err());
    }
    let data = std::fs::read(blob.data_path()).unwrap_or_default();
    assert!(
        data.iter().all(|b| *b == 0),
        "nothing unverified is written to data"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_list_does_not_fail_its_readers() {
    let layer = Layer::new(&[50_000; 10], 100_000, 1);
    let source = layer.source();
    source.script([Act::Refuse]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.prefetch(layer.map.chunks()[9].remote);
    until(|| source.requests() == 1).await;
    for chunk in layer.map.chunks() {
        let range = chunk.decoded_range();
        let bytes = read(&blob, range.start, chunk.len as usize).await.unwrap();
        assert!(bytes == layer.expected(range));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_refuses_is_an_error_now_and_served_later() {
    let layer = Layer::new(&[50_000], 100_000, 1);
    let source = layer.source();
    source.always(Act::Refuse);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    let error = read(&blob, 0, 1).await.unwrap_err();
    assert!(
        error.contains("refused") && error.contains("memory:layer"),
        "{error}"
    );
    source.always(Act::Serve);
    assert_eq!(read(&blob, 0, 9).await.unwrap(), layer.expected(0..9));
    until(|| blob.status().waiting_readers == 0).await;
}
