use std::path::Path;

use formats::digest::Digest;

use super::*;
use crate::layers::record::{Format, Origin, Verdict};

fn table(dir: &Path) -> LayerTable {
    LayerTable::open(&Store::open(&dir.join("store.db")).unwrap()).unwrap()
}

fn layer(name: &str) -> LayerRecord {
    LayerRecord {
        number: LayerNumber(0),
        node: 0,
        identity: Identity {
            layer: Digest::of(name.as_bytes()),
            format: Format::Estargz,
            index: Digest::of(b"index"),
        },
        blob_len: 10,
        device_len: 4096,
        empty: false,
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
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_survive_a_restart_and_are_never_reused() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, mount);
    let id = SnapshotId(77);
    {
        let table = tokio::task::block_in_place(|| table(dir.path()));
        a = table.insert(layer("a")).await.unwrap();
        b = table.insert(layer("b")).await.unwrap();
        assert_eq!(table.insert(layer("a")).await.unwrap(), a);
        assert_ne!(a.number, b.number);
        assert_ne!(a.node, b.node);
        let key = MountKey {
            layer: b.number,
            variant: "base".into(),
            occurrence: 1,
        };
        let keys = [key.clone(), key];
        let numbers = table.mounts_for(&keys).await.unwrap();
        mount = numbers[0];
        assert_eq!(numbers, [mount, mount]);
        assert_eq!(table.mounts_for(&keys[..1]).await.unwrap(), [mount]);
        let lazy = LazySnapshot {
            layer: b.number,
            variant: "base".into(),
            mount: Some(mount),
            diff_id: None,
        };
        let bound = lazy.clone();
        table
            .store
            .write(Durability::Now, move |writer| {
                LayerTable::bind(writer, id, &bound)
            })
            .await
            .unwrap();
        table.bound(id, lazy);
        table.set_reason(SnapshotId(78), "because").await.unwrap();
        table
            .update(b.number, Durability::Now, |record| {
                record.verdict = Verdict::Proven;
                true
            })
            .await
            .unwrap();
    }
    let table = tokio::task::block_in_place(|| table(dir.path()));
    assert_eq!(table.by_identity(&a.identity), Some(a.clone()));
    assert_eq!(table.by_node(b.node).unwrap().verdict, Verdict::Proven);
    assert_eq!(table.snapshot(id).unwrap().mount, Some(mount));
    assert_eq!(table.reason(SnapshotId(78)).as_deref(), Some("because"));
    assert!(
        !table.remove(b.number).await.unwrap(),
        "a snapshot needs it"
    );
    table.forget(vec![id, SnapshotId(1)]).await.unwrap();
    assert_eq!(table.snapshot(id), None);
    assert!(table.remove(b.number).await.unwrap());
    assert_eq!(table.mount(mount), None);
    assert_eq!(table.by_node(b.node), None);
    let again = table.insert(layer("b")).await.unwrap();
    assert!(again.number > b.number && again.node > b.node);
    let key = MountKey {
        layer: again.number,
        variant: "base".into(),
        occurrence: 1,
    };
    assert!(table.mounts_for(&[key]).await.unwrap()[0] > mount);
}

/// A verdict must not be lost in memory to a change that was written before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_has_what_was_written_last() {
    let dir = tempfile::tempdir().unwrap();
    let table = Arc::new(tokio::task::block_in_place(|| table(dir.path())));
    let number = table.insert(layer("a")).await.unwrap().number;
    for round in 0..500 {
        let writes = (0..8).map(|n| {
            let table = Arc::clone(&table);
            tokio::spawn(async move {
                let change = move |record: &mut LayerRecord| {
                    record.created = record.created * 31 % 1_000_003 + n;
                    true
                };
                table.update(number, Durability::Soon, change).await
            })
        });
        for write in futures_util::future::join_all(writes).await {
            assert!(write.unwrap().unwrap().is_some());
        }
        let reader = table.store.read().unwrap();
        let layers = reader.transaction().open_table(LAYERS).unwrap();
        let row = layers.get(number.0).unwrap().unwrap();
        let stored: LayerRecord = decode("layer", number, row.value()).unwrap();
        assert_eq!(*table.layer(number).unwrap(), stored, "round {round}");
    }
}
