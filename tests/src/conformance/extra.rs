//! What containerd relies on without testing it.

use std::{fs, os::unix::fs::MetadataExt as _};

use snapshotterd::api::snapshots::Kind;
use tonic::Code;

use super::Bench;
use crate::{
    snapshotter::{labels, root_label},
    tree::{dir, file, owner, remove},
};

/// Every refusal has the code that containerd acts on.
pub fn error_codes(bench: &Bench) {
    let sn = &bench.sn;
    let code = |status: tonic::Status| status.code();
    let base = bench.layer("", &[]);
    sn.prepare("active", &base).expect("prepare");
    sn.view("view", &base).expect("view");
    sn.prepare("other", "").expect("prepare");

    for parent in ["nowhere", "active"] {
        let expected = if parent == "nowhere" {
            Code::NotFound
        } else {
            Code::InvalidArgument
        };
        assert_eq!(code(sn.prepare("x", parent).expect_err(parent)), expected);
        assert_eq!(code(sn.view("x", parent).expect_err(parent)), expected);
    }
    for (what, status) in [
        ("stat", sn.stat("nowhere").map(drop)),
        ("usage", sn.usage("nowhere").map(drop)),
        ("mounts", sn.mounts("nowhere").map(drop)),
        ("commit", sn.commit("x", "nowhere")),
        ("remove", sn.remove("nowhere")),
    ] {
        assert_eq!(code(status.expect_err(what)), Code::NotFound, "{what}");
    }
    assert_eq!(
        code(sn.mounts(&base).expect_err("committed")),
        Code::FailedPrecondition
    );
    for key in ["view", base.as_str()] {
        assert_eq!(
            code(sn.commit("x", key).expect_err(key)),
            Code::FailedPrecondition
        );
    }
    assert_eq!(
        code(sn.commit(&base, "active").expect_err("the name is taken")),
        Code::AlreadyExists
    );
    let rebase = |key: &str, parent: &str| sn.commit_with("x", key, parent, root_label());
    assert_eq!(
        code(rebase("active", "view").expect_err("another parent")),
        Code::InvalidArgument
    );
    assert_eq!(
        code(rebase("other", "active").expect_err("not committed")),
        Code::FailedPrecondition
    );
    assert_eq!(
        code(rebase("other", "nowhere").expect_err("no such parent")),
        Code::NotFound
    );
    assert_eq!(
        code(sn.list(&["name=="]).expect_err("bad filter")),
        Code::InvalidArgument
    );
    assert_eq!(
        code(sn.prepare("", "").expect_err("no key")),
        Code::InvalidArgument
    );
    // Nothing of all that was left behind.
    let mut names: Vec<_> = sn
        .list(&[])
        .expect("list")
        .into_iter()
        .map(|info| info.name)
        .collect();
    names.sort();
    assert_eq!(names, ["active", &base, "other", "view"]);
}

/// A layer unpacked without a parent is linked to it at the commit (parallel unpack).
pub fn rebase_at_commit(bench: &Bench) {
    let sn = &bench.sn;
    let base = bench.layer("", &[dir("/d", 0o755), file("/d/base", "base", 0o644)]);
    let mounts = sn.prepare("second", "").expect("prepare");
    bench.mounted(&mounts, |root| {
        fs::create_dir(root.join("d")).expect("a directory");
        fs::write(root.join("d/second"), "second").expect("a file");
    });
    sn.commit_with("rebased", "second", &base, root_label())
        .expect("commit");
    let info = sn.stat("rebased").expect("stat");
    assert_eq!(
        (info.parent.as_str(), info.kind()),
        (base.as_str(), Kind::Committed)
    );
    let mounts = sn.view("v", "rebased").expect("view");
    bench.mounted(&mounts, |root| {
        assert_eq!(fs::read(root.join("d/base")).expect("from below"), b"base");
        assert_eq!(fs::read(root.join("d/second")).expect("its own"), b"second");
    });
    sn.remove(&base).expect_err("it has a child now");
    // Naming the parent it has is no change.
    sn.prepare("third", "rebased").expect("prepare");
    sn.commit_with("same", "third", "rebased", root_label())
        .expect("commit with its own parent");
}

/// Labels of an active snapshot are not inherited by the committed one, and empty ones are none.
pub fn labels_are_replaced_at_commit(bench: &Bench) {
    let sn = &bench.sn;
    sn.prepare_with("a", "", labels(&[("kept", "no"), ("empty", "")]))
        .expect("prepare");
    assert_eq!(
        sn.stat("a").expect("stat").labels,
        labels(&[("kept", "no")])
    );
    let new = labels(&[("containerd.io/snapshot.ref", "sha256:x")]);
    sn.commit_with("c", "a", "", new.clone()).expect("commit");
    assert_eq!(sn.stat("c").expect("stat").labels, new);
    let found = sn
        .list(&[r#"labels."containerd.io/snapshot.ref"==sha256:x,parent=="""#])
        .expect("list");
    assert_eq!(found.len(), 1);
}

/// Usage counts a snapshot's own data: grows while it is active, stays when committed.
pub fn usage(bench: &Bench) {
    let sn = &bench.sn;
    let base = bench.layer("", &[file("/big", vec![7; 1 << 20], 0o644)]);
    let counted = sn.usage(&base).expect("usage");
    assert!(
        counted.size >= 1 << 20 && counted.size < 2 << 20,
        "{counted:?}"
    );
    assert_eq!(counted.inodes, 2);
    let mounts = sn.prepare("child", &base).expect("prepare");
    let empty = sn.usage("child").expect("usage");
    assert!(empty.size < 1 << 20, "the parent is not counted: {empty:?}");
    bench.mounted(&mounts, |root| {
        fs::write(root.join("small"), vec![1; 64 << 10]).expect("a file");
        let active = sn.usage("child").expect("usage");
        assert!(active.size >= empty.size + (64 << 10), "{active:?}");
    });
    sn.commit("committed", "child").expect("commit");
    assert_eq!(sn.usage("committed").expect("usage").inodes, 2);
    assert_eq!(sn.usage(&base).expect("usage"), counted);
}

/// Removing forgets at once; the data goes in Cleanup, and only what nobody needs.
pub fn cleanup(bench: &Bench) {
    let sn = &bench.sn;
    let keep = bench.layer("", &[file("/keep", "k", 0o644)]);
    let upper = |mounts: &[snapshotterd::api::types::Mount]| {
        mounts
            .iter()
            .flat_map(|mount| &mount.options)
            .find_map(|option| option.strip_prefix("upperdir="))
            .map(std::path::PathBuf::from)
            .expect("an upper directory")
    };
    let gone = upper(&sn.prepare("gone", &keep).expect("prepare"));
    let stays = upper(&sn.prepare("stays", &keep).expect("prepare"));
    assert!(gone.is_dir() && stays.is_dir());
    sn.remove("gone").expect("remove");
    assert_eq!(sn.stat("gone").expect_err("gone").code(), Code::NotFound);
    sn.cleanup().expect("cleanup");
    assert!(!gone.exists(), "deleted by cleanup");
    assert!(stays.is_dir(), "in use");
    let mounts = sn.mounts("stays").expect("mounts");
    bench.mounted(&mounts, |root| {
        assert!(root.join("keep").exists());
    });
}

/// Mounts can be asked again and again, and give what Prepare gave.
pub fn mounts_again(bench: &Bench) {
    let sn = &bench.sn;
    let base = bench.layer("", &[]);
    let child = bench.layer(&base, &[]);
    for (key, parent) in [("a0", ""), ("a1", base.as_str()), ("a2", child.as_str())] {
        let mounts = sn.prepare(key, parent).expect("prepare");
        assert_eq!(sn.mounts(key).expect("mounts"), mounts);
        let view = format!("{key}-view");
        let mounts = sn.view(&view, parent).expect("view");
        assert_eq!(sn.mounts(&view).expect("mounts"), mounts);
    }
}

/// A child's lower directories are its parent's with one more in front: BuildKit relies on it.
pub fn lowers_extend_the_parents(bench: &Bench) {
    let lowers = |key: &str| {
        bench
            .sn
            .mounts(key)
            .expect("mounts")
            .iter()
            .flat_map(|mount| &mount.options)
            .find_map(|option| option.strip_prefix("lowerdir=").map(str::to_owned))
            .expect("an overlay")
    };
    let mut parent = bench.layer("", &[]);
    let mut before = None;
    for number in 0..4 {
        let key = format!("active-{number}");
        bench.sn.prepare(&key, &parent).expect("prepare");
        let now = lowers(&key);
        if let Some(before) = before {
            assert!(now.ends_with(&format!(":{before}")), "{now} after {before}");
        }
        before = Some(now);
        parent = bench.layer(&parent, &[]);
    }
}

/// The root directory of a child belongs to whom the parent's belongs.
pub fn root_owner_is_inherited(bench: &Bench) {
    let base = bench.layer("", &[owner("/", 12, 34)]);
    let child = bench.layer(&base, &[file("/f", "f", 0o644)]);
    let mounts = bench.sn.prepare("a", &child).expect("prepare");
    bench.mounted(&mounts, |root| {
        let meta = fs::metadata(root).expect("stat");
        assert_eq!((meta.uid(), meta.gid()), (12, 34));
    });
}

/// More snapshots than fit into one message of List.
pub fn list_in_pages(bench: &Bench) {
    let sn = &bench.sn;
    let expected: Vec<String> = (0..250).map(|number| format!("n-{number:03}")).collect();
    for name in &expected {
        sn.prepare(name, "").expect("prepare");
    }
    let listed = sn.list(&[]).expect("list");
    let names: Vec<_> = listed.into_iter().map(|info| info.name).collect();
    assert_eq!(names, expected);
    assert_eq!(sn.list(&["name~=^n-1"]).expect("list").len(), 100);
}

/// A whiteout in a middle layer hides what is below it, and a later layer may bring it back.
pub fn whiteouts_over_four_layers(bench: &Bench) {
    bench.check_layers(&[
        &[
            dir("/d", 0o750),
            file("/d/a", "1", 0o644),
            file("/d/b", "1", 0o644),
        ],
        &[remove("/d/a"), remove("/d/b")],
        &[file("/d/a", "3", 0o600)],
        &[remove("/d"), file("/d", "now a file", 0o644)],
    ]);
}
