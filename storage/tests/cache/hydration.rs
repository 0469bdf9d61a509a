//! The pass over the whole layer: what it costs, what it records, how it ends.

use std::{io, sync::Arc};

use formats::digest::Digest;
use storage::{
    hydrate::{ChunkSink, HydrateOptions, Judged, Mode, Phase, Prove, Verdict},
    source::Cause,
};

use crate::{
    fixture::{Layer, open, read, until},
    source::Act,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_hydrated_layer_cost_its_size_and_needs_no_source_any_more() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.prefetch(layer.map.chunks()[12].remote);
    for chunk in layer.map.chunks().iter().rev().step_by(20) {
        read(&blob, chunk.decoded.0, 10).await.unwrap();
    }
    blob.hydrate(layer.hydrate_options());
    let record = blob.hydrated().await.unwrap();
    assert_eq!(record.verdict, Verdict::Proven);
    assert!(record.complete && blob.is_complete());
    let size = layer.blob.len() as u64;
    assert!(
        source.served() <= size + size / 100,
        "{} of {size}",
        source.served()
    );
    assert!(!dir.path().join("wire").exists() && !dir.path().join("wire.map").exists());
    assert!(blob.status().hydration.phase == Phase::Over);

    source.always(Act::Refuse);
    let requests = source.requests();
    let whole = read(&blob, 0, layer.decoded.len()).await.unwrap();
    assert!(whole == *layer.decoded);
    assert!(std::fs::read(blob.data_path()).unwrap() == *layer.decoded);
    blob.close().await.unwrap();
    drop(blob);

    let again = open(dir.path(), &layer, &source);
    assert!(again.is_complete());
    assert!(read(&again, 0, layer.decoded.len()).await.unwrap() == *layer.decoded);
    again.hydrate(layer.hydrate_options());
    assert!(again.hydrated().await.unwrap().complete);
    assert_eq!(source.requests(), requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn hydration_starts_after_the_start_list_was_asked_for() {
    let layer = Layer::medium();
    let source = layer.source();
    source.stall();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.prefetch(layer.map.chunks()[60].remote);
    blob.hydrate(layer.hydrate_options());
    until(|| source.requests() >= 1).await;
    let log = source.log();
    assert!(
        log.iter().all(|(_, cause)| *cause == Cause::Prefetch),
        "{log:?}"
    );
    source.resume();
    assert!(blob.hydrated().await.unwrap().complete);
    let causes: Vec<_> = source.log().into_iter().map(|(_, cause)| cause).collect();
    // Requests that begin within the same instant may reach the source in either order.
    let last = causes.iter().rposition(|c| *c == Cause::Prefetch).unwrap();
    assert!(last < 10, "{causes:?}");
    assert_eq!(source.served(), layer.blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn off_fetches_nothing_and_full_resumes() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.hydrate(HydrateOptions {
        mode: Mode::Off,
        ..layer.hydrate_options()
    });
    until(|| blob.status().hydration.phase == Phase::Waiting).await;
    read(&blob, 0, 1).await.unwrap();
    tokio::task::yield_now().await;
    assert!(
        source
            .log()
            .iter()
            .all(|(_, cause)| *cause == Cause::Demand)
    );
    blob.set_hydration_mode(Mode::Full);
    assert!(blob.hydrated().await.unwrap().complete);
    assert_eq!(source.served(), layer.blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_for_a_while_is_tried_again() {
    let layer = Layer::medium();
    let source = layer.source();
    source.script([Act::Refuse, Act::Truncate(100_000), Act::Refuse]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.hydrate(layer.hydrate_options());
    assert!(blob.hydrated().await.unwrap().complete);
    assert!(read(&blob, 0, layer.decoded.len()).await.unwrap() == *layer.decoded);
    // The block in which the body broke off comes again.
    assert!(source.served() < layer.blob.len() as u64 + 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_no_chunk_covers_is_fetched_again_not_held_against_the_image() {
    let layer = Layer::medium();
    let source = layer.source();
    // Byte 100 lies before the first member.
    source.script([Act::Flip(100)]);
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.hydrate(layer.hydrate_options());
    let record = blob.hydrated().await.unwrap();
    assert_eq!(record.verdict, Verdict::Proven);
    assert_eq!(record.layer_digest, layer.digest());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_not_the_layer_is_refuted_for_good() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.hydrate(HydrateOptions {
        layer_digest: Digest::of(b"something else"),
        ..layer.hydrate_options()
    });
    let record = blob.hydrated().await.unwrap();
    assert!(matches!(record.verdict, Verdict::Refuted { .. }));
    assert_eq!(
        source.served(),
        2 * layer.blob.len() as u64,
        "once more, no further"
    );
    drop(blob);
    let again = open(dir.path(), &layer, &source);
    let recorded = again.status().hydration.record.unwrap();
    assert_eq!(recorded, record);
}

struct Shrugs;

impl Prove for Shrugs {
    fn prove(&self, _: &mut dyn io::Read, _: &mut ChunkSink<'_>) -> io::Result<Judged> {
        Ok(Verdict::Unprovable {
            reason: "a name is not UTF-8".to_owned(),
        }
        .into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_proven_becomes_complete_all_the_same() {
    let layer = Layer::medium();
    let source = layer.source();
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path(), &layer, &source);
    blob.hydrate(HydrateOptions {
        prover: Arc::new(Shrugs),
        ..layer.hydrate_options()
    });
    let record = blob.hydrated().await.unwrap();
    assert!(matches!(record.verdict, Verdict::Unprovable { .. }) && record.complete);
    assert!(std::fs::read(blob.data_path()).unwrap() == *layer.decoded);
}
