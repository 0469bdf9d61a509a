//! Cases about names, states, labels and listing.

use std::time::SystemTime;

use prost_types::Timestamp;
use snapshotterd::api::snapshots::{Info, Kind};
use tonic::Code;

use super::Bench;
use crate::{
    snapshotter::{Snapshotter, labels},
    tree::file,
};

/// `StatActive`
pub fn stat_active(bench: &Bench) {
    let mounts = bench.sn.prepare("preparing", "").expect("prepare");
    bench.mounted(&mounts, |_| ());
    let info = bench.sn.stat("preparing").expect("stat");
    assert_eq!(
        (info.name.as_str(), info.kind(), info.parent.as_str()),
        ("preparing", Kind::Active, "")
    );
}

/// `StatComitted`
pub fn stat_committed(bench: &Bench) {
    let committed = bench.layer("", &[file("foo", "foo\n", 0o777)]);
    let info = bench.sn.stat(&committed).expect("stat");
    assert_eq!(
        (info.name.as_str(), info.kind(), info.parent.as_str()),
        (committed.as_str(), Kind::Committed, "")
    );
}

/// `TransitivityTest`
pub fn transitivity(bench: &Bench) {
    let a = bench.layer("", &[file("foo", "foo\n", 0o777)]);
    let b = bench.layer(&a, &[file("foo", "foo bar\n", 0o777)]);
    let child = bench.sn.stat(&b).expect("stat");
    let parent = bench.sn.stat(&child.parent).expect("stat the parent");
    assert_eq!(child.parent, a);
    assert_eq!(
        (parent.name.as_str(), parent.parent.as_str()),
        (a.as_str(), "")
    );
}

/// `PreareViewFailingtest`
pub fn prepare_view_failing(bench: &Bench) {
    let sn = &bench.sn;
    let base = bench.layer("", &[]);
    sn.prepare("newlayer", &base).expect("prepare");
    let taken = sn.view("newlayer", &base).expect_err("the key is taken");
    assert_eq!(taken.code(), Code::AlreadyExists);
    sn.prepare("prepLayer", &base).expect("prepare");
    sn.prepare("prepLayer", &base)
        .expect_err("the key is taken");
    sn.view("viewLayer", &base).expect("view");
    sn.view("viewLayer", &base).expect_err("the key is taken");
}

/// `Remove`
pub fn remove(bench: &Bench) {
    let sn = &bench.sn;
    sn.prepare("committed-a", "").expect("prepare");
    sn.commit("committed-1", "committed-a").expect("commit");
    sn.prepare("reuse-1", "committed-1").expect("prepare");
    sn.remove("reuse-1").expect("remove");
    sn.view("reuse-1", "committed-1").expect("view");
    sn.remove("reuse-1").expect("remove");
    sn.prepare("reuse-1", "").expect("prepare");
    sn.remove("committed-1").expect("remove");
    sn.commit("committed-1", "reuse-1").expect("commit");
}

/// `RemoveIntermediateSnapshot`
pub fn remove_intermediate_snapshot(bench: &Bench) {
    let sn = &bench.sn;
    let base = bench.layer("", &[]);
    sn.prepare("intermediate", &base).expect("prepare");
    sn.commit("committed-inter", "intermediate")
        .expect("commit");
    sn.prepare("toplayer", "committed-inter").expect("prepare");
    let refused = sn.remove("committed-inter").expect_err("it has a child");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for key in ["toplayer", "committed-inter", &base] {
        sn.remove(key).expect("remove from the top down");
    }
}

/// `CloseTwice`: closing a proxy snapshotter does nothing to the service.
pub fn close_twice(bench: &Bench) {
    let sn = &bench.sn;
    sn.prepare("close-prepare", "").expect("prepare");
    sn.commit("close", "close-prepare").expect("commit");
    sn.remove("close").expect("remove");
    assert_eq!(sn.stat("close").expect_err("gone").code(), Code::NotFound);
}

/// `Update`
pub fn update(bench: &Bench) {
    let sn = &bench.sn;
    let before = now();
    make_base_snapshots(sn, "");
    let after = now();
    for (name, kind, parent) in [
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ] {
        let info = sn.stat(name).expect("stat");
        let same = |info: &Info| {
            assert_eq!(
                (info.name.as_str(), info.kind(), info.parent.as_str()),
                (name, kind, parent)
            );
        };
        same(&info);
        assert_eq!(info.created_at, info.updated_at, "{name}");
        let created = nanos(info.created_at);
        assert!((before..=after).contains(&created), "{name}");

        // Without a mask all labels are replaced, everything else is ignored.
        let first = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ("root", "r")]);
        let began = now();
        let info = sn
            .update(
                Info {
                    parent: "doesnotexist".to_owned(),
                    labels: first.clone(),
                    ..info
                },
                &[],
            )
            .expect("update");
        let ended = now();
        same(&info);
        assert_eq!(nanos(info.created_at), created, "{name}");
        assert!((began..=ended).contains(&nanos(info.updated_at)), "{name}");
        assert_eq!(info.labels, first);

        // Only the labels that the mask names; one without a value goes.
        let info = sn
            .update(
                Info {
                    labels: labels(&[("l1", "updated"), ("l4", "v4")]),
                    ..info
                },
                &["labels.l1", "labels.l2"],
            )
            .expect("update");
        let expected = labels(&[("l1", "updated"), ("l3", "v3"), ("root", "r")]);
        assert_eq!(info.labels, expected);

        let replaced = labels(&[("l4", "v4"), ("root", "r")]);
        let info = sn
            .update(
                Info {
                    labels: replaced.clone(),
                    ..info
                },
                &["labels"],
            )
            .expect("update");
        assert_eq!(info.labels, replaced);
        assert_eq!(sn.stat(name).expect("stat"), info);

        let refused = sn
            .update(
                Info {
                    parent: "doesnotexist".to_owned(),
                    ..info
                },
                &["parent"],
            )
            .expect_err("a parent is immutable");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
}

/// `Walk`
pub fn walk(bench: &Bench) {
    let sn = &bench.sn;
    let root = [("containerd.io/gc.root", "check-walk")];
    let plain = labels(&root);
    let with = |value| labels(&[("l", value), root[0]]);
    sn.prepare_with("a-np", "", plain.clone()).expect("prepare");
    sn.prepare_with("p-tmp", "", plain.clone())
        .expect("prepare");
    sn.commit_with("p", "p-tmp", "", plain.clone())
        .expect("commit");
    sn.prepare_with("a", "p", plain.clone()).expect("prepare");
    sn.view_with("v", "p", plain.clone()).expect("view");
    sn.prepare_with("p-wl-tmp", "", plain).expect("prepare");
    sn.commit_with("p-wl", "p-wl-tmp", "", with("1"))
        .expect("commit");
    sn.prepare_with("a-wl", "p-wl", with("2")).expect("prepare");
    sn.view_with("v-wl", "p-wl", with("3")).expect("view");
    sn.prepare_with("a-np-wl", "", with("2")).expect("prepare");

    let rooted = r#"labels."containerd.io/gc.root"==check-walk"#;
    let cases: [(&[&str], Vec<String>); 10] = [
        (
            &["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl", "a-np-wl"],
            vec![rooted.to_owned()],
        ),
        (
            &["a-np", "a", "a-wl", "a-np-wl"],
            vec![format!("kind==active,{rooted}")],
        ),
        (&["v", "v-wl"], vec![format!("kind==view,{rooted}")]),
        (&["p", "p-wl"], vec![format!("kind==committed,{rooted}")]),
        (
            &["p", "a-np-wl"],
            vec!["name==p".to_owned(), "name==a-np-wl".to_owned()],
        ),
        (&["a-wl"], vec!["name==a-wl,labels.l".to_owned()]),
        (&["a", "v"], vec!["parent==p".to_owned()]),
        (
            &["a", "v", "a-wl", "v-wl"],
            vec![format!(r#"parent!="",{rooted}"#)],
        ),
        (
            &["p-wl", "a-wl", "v-wl", "a-np-wl"],
            vec!["labels.l".to_owned()],
        ),
        (&["a-wl", "a-np-wl"], vec!["labels.l==2".to_owned()]),
    ];
    for (expected, filters) in cases {
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        let listed = sn.list(&filters).expect("list");
        let mut names: Vec<&str> = listed.iter().map(|info| info.name.as_str()).collect();
        let mut expected = expected.to_vec();
        names.sort_unstable();
        expected.sort_unstable();
        assert_eq!(names, expected, "{filters:?}");
    }
}

/// `StatInWalk`
pub fn stat_in_walk(bench: &Bench) {
    let sn = &bench.sn;
    let prefix = "stats-in-walk-";
    make_base_snapshots(sn, prefix);
    let mut seen = 0;
    sn.walk(&[], |info| {
        if info.name.starts_with(prefix) {
            assert_eq!(sn.stat(&info.name)?, info);
            seen += 1;
        }
        Ok(())
    })
    .expect("list");
    assert_eq!(seen, 6);
}

/// Committed c1 and c2 on it, actives a1 on c2 and a2, views v1 on c2 and v2.
fn make_base_snapshots(sn: &Snapshotter, prefix: &str) {
    let name = |name: &str| format!("{prefix}{name}");
    sn.prepare(&name("c1-a"), "").expect("prepare");
    sn.commit(&name("c1"), &name("c1-a")).expect("commit");
    sn.prepare(&name("c2-a"), &name("c1")).expect("prepare");
    sn.commit(&name("c2"), &name("c2-a")).expect("commit");
    sn.prepare(&name("a1"), &name("c2")).expect("prepare");
    sn.prepare(&name("a2"), "").expect("prepare");
    sn.view(&name("v1"), &name("c2")).expect("view");
    sn.view(&name("v2"), "").expect("view");
}

fn now() -> i128 {
    nanos(Some(SystemTime::now().into()))
}

fn nanos(at: Option<Timestamp>) -> i128 {
    let at = at.expect("a time");
    i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos)
}
