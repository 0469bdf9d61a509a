//! Complete images need no registry: over restarts, kills and reboots.

use std::{path::PathBuf, time::Duration};

use suite::{host::Mounted, listing};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    worker::{Job, Sums, Worker},
    world::{push, ready, sizes},
};

const LONG: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Term,
    Kill,
    /// Nothing is left but the disk.
    Reboot,
}

fn end(fixture: &mut Fixture, how: End) {
    match how {
        End::Term => fixture.daemon.terminate(),
        End::Kill => fixture.daemon.kill(),
        End::Reboot => {
            let unmounted = fixture.daemon.unmount();
            assert!(unmounted.status.success(), "{unmounted:?}");
            let left = suite::workdir::mounts_below(fixture.work.path());
            assert_eq!(left, Vec::<PathBuf>::new());
        }
    }
}

#[test]
fn complete_images_need_no_registry_whatever_ended_the_daemon() {
    if !ready(400) {
        return;
    }
    let mut fixture = Fixture::new(CONFIG);
    let layers = [
        sizes(40, &[3 << 20, 500_000]),
        sizes(40, &[1 << 20]),
        sizes(3, &[]),
    ];
    let (image, sums) = push(&fixture.lab, "a/b", 2, &layers);
    let runtime = runtime();
    let (parent, key, running) = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(status, 200, "{verdicts}");
        for layer in verdicts["layers"].as_array().expect("layers") {
            assert_eq!(layer["complete"], true, "{verdicts}");
            assert_eq!(layer["verdict"], "proven", "{verdicts}");
        }
        let (key, running) = fixture.container(&host, &parent, "running").await;
        (parent, key, running)
    });
    let scratch = fixture.work.sub("w");
    let stop = fixture.work.path().join("stop");
    let job = Job::Passes {
        stop: stop.clone(),
        hold: true,
    };
    // A running container, with everything open.
    let mut container = Some((
        Worker::start(&scratch, "running", job, running.path(), &sums),
        running,
    ));
    for (round, how) in [End::Term, End::Kill, End::Reboot, End::Kill, End::Reboot]
        .into_iter()
        .enumerate()
    {
        // There, and nobody asks it anything; then gone.
        for present in [true, false] {
            let name = format!("{round}-{how:?}-{present}");
            if how == End::Reboot
                && let Some((mut reader, mounted)) = container.take()
            {
                std::fs::write(&stop, "").expect("a file");
                let report = reader.finish(LONG);
                eprintln!("running container until {name}: {report:?}");
                drop(mounted);
            }
            if present {
                runtime.block_on(fixture.lab.back());
            } else {
                runtime.block_on(fixture.lab.gone());
            }
            end(&mut fixture, how);
            let mark = fixture.lab.log().mark();
            fixture.daemon.restart();
            runtime.block_on(async {
                let host = fixture.host("default").await;
                let (key, mounted) = fixture.container(&host, &parent, &name).await;
                let mounts = host.mounts(&key).await.expect("Mounts");
                assert!(!mounts.is_empty());
                check(&scratch, &mounted, &sums);
                drop(mounted);
                host.remove(&key).await.expect("removed");
            });
            assert_eq!(fixture.recovered(), serde_json::json!([]), "{name}");
            let asked = fixture.lab.log().entries_since(&mark);
            assert!(asked.is_empty(), "{name}: {asked:?}");
            if let Some((reader, _)) = &mut container {
                let before = reader.report().passes;
                suite::process::wait_for("the running container to read", LONG, || {
                    reader.assert_running(&name);
                    reader.report().passes >= before + 2
                });
            }
        }
    }
    // The first container's own snapshot is as good as a new one.
    runtime.block_on(async {
        let host = fixture.host("default").await;
        let mounts = host.mounts(&key).await.expect("Mounts");
        check(&scratch, &host.mount("again", &mounts), &sums);
    });
}

fn check(scratch: &std::path::Path, mounted: &Mounted, sums: &Sums) {
    let job = Job::Passes {
        stop: "/".into(),
        hold: false,
    };
    Worker::start(scratch, "once", job, mounted.path(), sums).finish(LONG);
}

#[test]
fn inode_numbers_outlive_restarts_and_reboots() {
    if !ready(240) {
        return;
    }
    let mut fixture = Fixture::new(CONFIG);
    let layers = [sizes(40, &[500_000]), sizes(30, &[]), sizes(3, &[])];
    let (image, _) = push(&fixture.lab, "a/b", 3, &layers);
    let runtime = runtime();
    let key = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let key = host.key("c");
        let prepared = host.prepare(&key, &parent, std::collections::BTreeMap::new());
        prepared.await.expect("a container");
        key
    });
    let numbers = |fixture: &Fixture| {
        let mounts = runtime.block_on(async {
            let host = fixture.host("default").await;
            let mounts = host.mounts(&key).await.expect("Mounts");
            host.mount("c", &mounts)
        });
        let listing = listing::list(mounts.path()).expect("a listing");
        let files = listing.into_iter().filter(|(_, row)| row.digest.is_some());
        let numbers: Vec<(PathBuf, u64)> = files.map(|(path, row)| (path, row.ino)).collect();
        assert_eq!(numbers.len(), 41 + 30 + 3);
        numbers
    };
    let before = numbers(&fixture);
    let mut distinct: Vec<u64> = before.iter().map(|(_, ino)| *ino).collect();
    distinct.sort_unstable();
    for how in [End::Term, End::Kill, End::Reboot] {
        end(&mut fixture, how);
        fixture.daemon.restart();
        assert_eq!(numbers(&fixture), before, "{how:?}");
    }
    eprintln!(
        "inode numbers {:?} to {:?}",
        distinct.first(),
        distinct.last()
    );
}
