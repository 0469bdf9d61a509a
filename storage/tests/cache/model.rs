//! Any sequence of operations, under any faults, shows only right bytes.

use std::{path::Path, sync::Arc, time::Duration};

use proptest::prelude::*;
use storage::{cache::LayerBlob, hydrate::Mode, source::BlobSource as _};

use crate::{
    fixture::{Layer, open_with, options, read, scheduler},
    source::{Act, Scripted},
};

#[derive(Clone, Debug)]
enum Op {
    Read(u32, u32),
    ReadMany(Vec<(u32, u32)>),
    Prefetch(u32),
    Hydrate,
    Pause(bool),
    Reopen(bool),
    Fault(Fault),
}

#[derive(Clone, Debug)]
enum Fault {
    Truncate(u32),
    Flip(u32),
    Garbage,
    Whole,
    Refuse,
}

fn op() -> impl Strategy<Value = Op> {
    let spot = || (any::<u32>(), 0_u32..200_000);
    prop_oneof![
        6 => spot().prop_map(|(at, len)| Op::Read(at, len)),
        3 => proptest::collection::vec(spot(), 1..12).prop_map(Op::ReadMany),
        1 => any::<u32>().prop_map(Op::Prefetch),
        1 => Just(Op::Hydrate),
        1 => any::<bool>().prop_map(Op::Pause),
        1 => any::<bool>().prop_map(Op::Reopen),
        4 => prop_oneof![
            (0_u32..100_000).prop_map(Fault::Truncate),
            any::<u32>().prop_map(Fault::Flip),
            Just(Fault::Garbage),
            Just(Fault::Whole),
            Just(Fault::Refuse),
        ].prop_map(Op::Fault),
    ]
}

async fn check(blob: &Arc<LayerBlob>, layer: &Layer, at: u32, len: u32) -> Result<bool, String> {
    let total = layer.decoded.len() as u64;
    let at = u64::from(at) % (total + 1);
    let end = total.min(at + u64::from(len));
    let read = read(blob, at, len as usize);
    // Only to say more than a test runner does when it gives up.
    let Ok(outcome) = tokio::time::timeout(Duration::from_secs(15), read).await else {
        return Err(format!(
            "a reader is stuck: {:?} {:?}",
            blob.status(),
            blob.wire()
        ));
    };
    match outcome {
        Ok(bytes) if bytes == layer.expected(at..end) => Ok(true),
        Ok(_) => Err(format!("wrong bytes at {at}+{len}")),
        Err(_) => Ok(false),
    }
}

async fn run(
    dir: &Path,
    layer: &Layer,
    source: &Arc<Scripted>,
    ops: Vec<Op>,
) -> Result<(), String> {
    let size = u32::try_from(layer.blob.len()).unwrap();
    let scheduler = scheduler();
    let open = || open_with(dir, layer, source, &scheduler, options());
    let mut blob = open();
    for op in ops {
        match op {
            Op::Read(at, len) => {
                check(&blob, layer, at, len).await?;
            }
            Op::ReadMany(spots) => {
                let reads = spots.into_iter().map(|(at, len)| {
                    let (blob, layer) = (Arc::clone(&blob), layer.clone());
                    tokio::spawn(async move { check(&blob, &layer, at, len).await })
                });
                for read in reads.collect::<Vec<_>>() {
                    read.await.map_err(|e| e.to_string())??;
                }
            }
            Op::Prefetch(end) => blob.prefetch(formats::units::RemoteOffset(u64::from(end % size))),
            Op::Hydrate => blob.hydrate(layer.hydrate_options()),
            Op::Pause(off) => {
                blob.set_hydration_mode(if off { Mode::Off } else { Mode::Full });
            }
            Op::Reopen(clean) => {
                if clean {
                    blob.close().await.map_err(|e| e.to_string())?;
                }
                drop(blob);
                blob = open();
            }
            Op::Fault(fault) => source.script([match fault {
                Fault::Truncate(n) => Act::Truncate(u64::from(n)),
                Fault::Flip(at) => Act::Flip(u64::from(at % size)),
                Fault::Garbage => Act::Garbage,
                Fault::Whole => Act::Whole,
                Fault::Refuse => Act::Refuse,
            }]),
        }
    }
    // The faults are used up after a while: then everything can be read.
    let mut tries = 0;
    while !check(&blob, layer, 0, u32::try_from(blob.len()).unwrap()).await? {
        tries += 1;
        if tries > 100 {
            return Err("an honest source does not help".to_owned());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn only_right_bytes_are_ever_seen(
        sizes in proptest::collection::vec(0_usize..250_000, 1..25),
        chunk_size in prop_oneof![Just(4096_usize), Just(50_000), 1000_usize..200_000],
        shared in 1_usize..6,
        ops in proptest::collection::vec(op(), 1..25),
    ) {
        let layer = Layer::new(&sizes, chunk_size, shared);
        let source = layer.source();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let outcome = runtime.block_on(run(dir.path(), &layer, &source, ops));
        prop_assert_eq!(outcome, Ok(()));
    }
}
