//! Cases about the content of layers.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use snapshotterd::api::snapshots::Kind;

use super::Bench;
use crate::tree::{self, Change, dir, file, link, owner, remove, rename};

/// `Basic`
pub fn basic(bench: &Bench) {
    let sn = &bench.sn;
    let initial = [
        file("/foo", "foo\n", 0o777),
        dir("/a", 0o755),
        dir("/a/b", 0o755),
        dir("/a/b/c", 0o755),
    ];
    let diff = [
        file("/bar", "bar\n", 0o777),
        file("/foo", "bar\n", 0o777),
        remove("/a/b"),
    ];
    let flat = bench.work.join("flat");
    fs::create_dir(&flat).expect("a directory");

    let preparing = bench.key("preparing");
    let mounts = sn.prepare(&preparing, "").expect("prepare");
    bench.mounted(&mounts, |root| {
        tree::apply(root, &initial).expect("changes");
    });
    let committed = bench.key("committed");
    sn.commit(&committed, &preparing).expect("commit");
    let base = sn.stat(&committed).expect("stat");
    assert_eq!((base.parent.as_str(), base.kind()), ("", Kind::Committed));
    sn.stat(&preparing).expect_err("the active key is gone");

    let next = bench.key("nextlayer");
    let mounts = sn.prepare(&next, &committed).expect("prepare the child");
    tree::apply(&flat, &initial).expect("changes");
    bench.mounted(&mounts, |root| {
        tree::assert_same(&flat, root);
        tree::apply(root, &diff).expect("changes");
    });
    let active = sn.stat(&next).expect("stat");
    assert_eq!(
        (active.parent, active.kind),
        (committed.clone(), Kind::Active.into())
    );
    let next_committed = bench.key("committed-next");
    sn.commit(&next_committed, &next).expect("commit the child");
    let child = sn.stat(&next_committed).expect("stat");
    assert_eq!(
        (child.parent.as_str(), child.kind()),
        (committed.as_str(), Kind::Committed)
    );
    sn.stat(&next).expect_err("the active key is gone");

    let listed = sn.list(&[]).expect("list");
    for expected in [&base, &child] {
        assert!(listed.contains(expected), "{expected:?} not in {listed:?}");
    }

    let view = bench.key("nextnextlayer");
    let mounts = sn.view(&view, &next_committed).expect("view");
    tree::apply(&flat, &diff).expect("changes");
    bench.mounted(&mounts, |root| tree::assert_same(&flat, root));
    sn.remove(&view).expect("remove the view");
    let refused = sn.remove(&committed).expect_err("it has a child");
    assert!(refused.message().contains("remove"), "{refused}");
    sn.remove(&next_committed).expect("remove the child");
    sn.remove(&committed).expect("remove the base");
}

/// `LayerFileupdate`
pub fn layer_file_update(bench: &Bench) {
    let first = [
        dir("/etc", 0o700),
        file("/etc/hosts", "mydomain 10.0.0.1", 0o644),
        file("/etc/profile", "PATH=/usr/bin", 0o644),
    ];
    let second = [
        file("/etc/hosts", "mydomain 10.0.0.2", 0o644),
        file("/etc/profile", "PATH=/usr/bin", 0o666),
        dir("/root", 0o700),
        file("/root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
    ];
    for round in 0..5 {
        if round > 0 {
            // Just behind a full second: same size and same mtime second must not hide a change.
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .expect("a clock after 1970");
            let rest = 1_000_000_000 - now.subsec_nanos();
            std::thread::sleep(Duration::from_nanos(rest.into()));
        }
        bench.check_layers(&[&first, &second]);
    }
}

/// `RemoveDirectoryInLowerLayer`
pub fn remove_directory_in_lower_layer(bench: &Bench) {
    bench.check_layers(&[
        &[dir("/lib", 0o700), file("/lib/hidden", "", 0o644)],
        &[
            remove("/lib"),
            dir("/lib", 0o700),
            file("/lib/not-hidden", "", 0o644),
        ],
        &[file("/lib/newfile", "", 0o644)],
    ]);
}

/// `Chown`
pub fn chown(bench: &Bench) {
    bench.check_layers(&[
        &[
            dir("/opt", 0o700),
            dir("/opt/a", 0o700),
            dir("/opt/a/b", 0o700),
            file("/opt/a/b/file.txt", "hello", 0o644),
        ],
        &[
            owner("/opt", 1, 1),
            owner("/opt/a", 1, 1),
            owner("/opt/a/b", 1, 1),
            owner("/opt/a/b/file.txt", 1, 1),
        ],
    ]);
}

/// `DirectoryPermissionOnCommit`
pub fn directory_permission_on_commit(bench: &Bench) {
    bench.check_layers(&[
        &[
            dir("/dir1", 0o700),
            dir("/dir2", 0o700),
            dir("/dir3", 0o700),
            dir("/dir4", 0o700),
            file("/dir4/f1", "...", 0o644),
            dir("/dir5", 0o700),
            file("/dir5/f1", "...", 0o644),
            owner("/dir1", 1, 1),
            owner("/dir2", 1, 1),
            owner("/dir3", 1, 1),
            owner("/dir5", 1, 1),
            owner("/dir5/f1", 1, 1),
        ],
        &[
            owner("/dir2", 0, 0),
            remove("/dir3"),
            owner("/dir4", 1, 1),
            owner("/dir4/f1", 1, 1),
        ],
        &[
            dir("/dir3", 0o700),
            owner("/dir3", 1, 1),
            remove("/dir5"),
            dir("/dir5", 0o700),
            owner("/dir5", 1, 1),
        ],
    ]);
}

/// `DeletedFilesInChildSnapshot`
pub fn deleted_files_in_child_snapshot(bench: &Bench) {
    bench.check_layers(&[
        &[
            file("/foo", "foo\n", 0o777),
            file("/foobar", "foobar\n", 0o777),
        ],
        &[remove("/foobar")],
        &[],
    ]);
}

/// `MoveFileFromLowerLayer`
pub fn move_file_from_lower_layer(bench: &Bench) {
    bench.check_layers(&[
        &[
            dir("/dir1", 0o700),
            file("/dir1/f1", "Hello", 0o644),
            dir("dir2", 0o700),
            file("dir2/f2", "...", 0o644),
        ],
        &[
            dir("/dir3", 0o700),
            file("/dir3/f1", "Hello", 0o644),
            remove("/dir1"),
            link("dir2/f2", "dir3/f2"),
            remove("dir2/f2"),
        ],
    ]);
}

/// `Rename`
pub fn rename_in_child(bench: &Bench) {
    let mut second = vec![
        file("/somefiles/f1-overwrite", "new content 1", 0o644),
        rename("/somefiles/f1-overwrite", "/somefiles/f1"),
        rename("/somefiles/f2", "/somefiles/f3"),
    ];
    if bench.renames_directories {
        second.insert(0, rename("/dir1", "/dir2"));
    }
    bench.check_layers(&[
        &[
            dir("/dir1", 0o700),
            dir("/somefiles", 0o700),
            file("/somefiles/f1", "was here first!", 0o644),
            file("/somefiles/f2", "nothing interesting", 0o644),
        ],
        &second,
    ]);
}

/// `ViewReadonly`
pub fn view_readonly(bench: &Bench) {
    let committed = bench.layer("", &[]);
    let mounts = bench.sn.view("view", &committed).expect("view");
    bench.mounted(&mounts, |root| {
        fs::write(root.join("testfile"), "testcontent").expect_err("a view is read-only");
    });
    bench.sn.remove("view").expect("remove the view");
    // Over several layers a view is an overlay, not a bind mount.
    let child = bench.layer(&committed, &[file("/f", "f", 0o644)]);
    let mounts = bench.sn.view("view", &child).expect("view");
    bench.mounted(&mounts, |root| {
        fs::write(root.join("testfile"), "testcontent").expect_err("a view is read-only");
    });
    bench.sn.remove("view").expect("remove the view");
    bench.sn.remove(&child).expect("remove the child");
    bench.sn.remove(&committed).expect("remove the base");
}

/// `RootPermission`
pub fn root_permission(bench: &Bench) {
    let mounts = bench.sn.prepare("preparing", "").expect("prepare");
    bench.mounted(&mounts, |root| {
        let mode = fs::metadata(root).expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
    });
}

/// `128LayersMount`
pub fn layers_mount_128(bench: &Bench) {
    let flat = bench.work.join("flat");
    fs::create_dir(&flat).expect("a directory");
    let mut parent = String::new();
    for number in 0..128 {
        let key = bench.key(&format!("prepare-layer-{number}"));
        let mounts = bench.sn.prepare(&key, &parent).expect("prepare");
        let changes = changes_of_layer(number);
        bench.mounted(&mounts, |root| {
            tree::assert_same(&flat, root);
            tree::apply(&flat, &changes).expect("changes");
            tree::apply(root, &changes).expect("changes");
            tree::assert_same(&flat, root);
        });
        parent = bench.key(&format!("committed-{number}"));
        bench.sn.commit(&parent, &key).expect("commit");
    }
    let mounts = bench.sn.view("fullview", &parent).expect("view");
    bench.mounted(&mounts, |root| tree::assert_same(&flat, root));
}

fn changes_of_layer(number: usize) -> Vec<Change> {
    if number == 0 {
        return vec![
            file("/bottom", "way at the bottom\n", 0o777),
            file("/overwriteme", "FIRST!\n", 0o777),
            dir("/addhere", 0o755),
            dir("/onlyme", 0o755),
            file("/onlyme/bottom", "bye!\n", 0o777),
        ];
    }
    vec![
        file("/overwriteme", format!("{number} WAS HERE!\n"), 0o777),
        file(&format!("/addhere/file-{number}"), "same\n", 0o755),
        remove("/onlyme"),
        dir("/onlyme", 0o755),
        file(&format!("/onlyme/file-{number}"), "only me!\n", 0o777),
    ]
}
