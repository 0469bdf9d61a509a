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
