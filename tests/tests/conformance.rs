//! containerd's snapshotter suite and our additions to it, over the daemon's socket, with each
//! driver. Each case is a process of its own with a daemon of its own. Nothing here is pulled, so
//! the lazy driver keeps ordinary layers.

use suite::{
    conformance::{Bench, extra, files, metadata},
    daemon::Daemon,
    isolate, machine, skip,
    snapshotter::Snapshotter,
    workdir::Workdir,
};

/// (plugin name, configuration)
type Driver = (&'static str, &'static str);
const OVERLAYFS: Driver = ("overlayfs", "default_driver = \"overlayfs\"\n");
const LAZY: Driver = ("lazy", "[containerd]\naddress = \"\"\n");

fn run((plugin, config): Driver, case: impl FnOnce(&Bench)) {
    if !machine::is_root() {
        return skip("mounting needs root");
    }
    if !isolate::enter(120) {
        return;
    }
    let work = Workdir::new();
    let daemon = Daemon::start(&work.sub("d"), config);
    let sn = Snapshotter::connect(&daemon.socket(), plugin);
    case(&Bench::new(sn, work.sub("w"), false));
}

macro_rules! cases {
    ($($name:ident: $case:path;)*) => {
        mod overlayfs {
            use super::*;
            $(#[test]
            fn $name() {
                run(OVERLAYFS, $case);
            })*
        }

        mod lazy {
            use super::*;
            $(#[test]
            fn $name() {
                run(LAZY, $case);
            })*
        }
    };
}

cases! {
    basic: files::basic;
    stat_active: metadata::stat_active;
    stat_committed: metadata::stat_committed;
    transitivity: metadata::transitivity;
    prepare_view_failing: metadata::prepare_view_failing;
    update: metadata::update;
    remove: metadata::remove;
    walk: metadata::walk;
    layer_file_update: files::layer_file_update;
    remove_directory_in_lower_layer: files::remove_directory_in_lower_layer;
    chown: files::chown;
    directory_permission_on_commit: files::directory_permission_on_commit;
    remove_intermediate_snapshot: metadata::remove_intermediate_snapshot;
    deleted_files_in_child_snapshot: files::deleted_files_in_child_snapshot;
    move_file_from_lower_layer: files::move_file_from_lower_layer;
    view_readonly: files::view_readonly;
    stat_in_walk: metadata::stat_in_walk;
    close_twice: metadata::close_twice;
    root_permission: files::root_permission;
    rename: files::rename_in_child;
    layers_mount_128: files::layers_mount_128;

    error_codes: extra::error_codes;
    rebase_at_commit: extra::rebase_at_commit;
    labels_are_replaced_at_commit: extra::labels_are_replaced_at_commit;
    usage: extra::usage;
    cleanup: extra::cleanup;
    mounts_again: extra::mounts_again;
    lowers_extend_the_parents: extra::lowers_extend_the_parents;
    root_owner_is_inherited: extra::root_owner_is_inherited;
    list_in_pages: extra::list_in_pages;
    whiteouts_over_four_layers: extra::whiteouts_over_four_layers;
}

/// The original, in Go, where `tests/peers/build testsuite` has built it.
#[test]
fn containerds_own_suite() {
    if !machine::is_root() {
        return skip("mounting needs root");
    }
    let program = machine::cache_dir().join("peers/snapshots-testsuite/suite.test");
    if !program.exists() {
        return skip("containerd's own suite is not built (tests/peers/build testsuite; needs Go)");
    }
    if !isolate::enter(240) {
        return;
    }
    let work = Workdir::new();
    let daemon = Daemon::start(&work.sub("d"), OVERLAYFS.1);
    let output = std::process::Command::new(program)
        .arg("-test.v")
        .env("SNAPSHOTS_SOCKET", daemon.socket())
        .env("TMPDIR", work.sub("w"))
        .output()
        .expect("the suite starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(
        said.matches("--- PASS: TestSnapshotter/").count() >= 21,
        "{said}"
    );
}
