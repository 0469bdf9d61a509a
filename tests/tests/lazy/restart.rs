//! Containers outlive the daemon, and the daemon starts without a registry.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt as _};

use suite::{
    images::{noise, oddities},
    listing::list,
    pushed::{PushedImage, PushedLayer, cri_labels},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, ready, runtime},
    simple::{IMPLIED, base, top},
};

fn large() -> PushedLayer {
    PushedLayer::estargz_with(
        &Tarball::new().file("large", &noise(5, 4 << 20)).finish(),
        &formats::stargz::WriterOptions {
            chunk_size: 64 << 10,
            ..formats::stargz::WriterOptions::default()
        },
    )
}

fn survives(stop: impl Fn(&mut Fixture)) {
    if !ready() {
        return;
    }
    let mut fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[base(), large(), top()]);
    let runtime = runtime();
    let (parent, key, container, host) = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (key, container) = fixture.container(&host, &parent, "c").await;
        (parent, key, container, host)
    });
    let path = container.path().join("large");
    let file = File::open(&path).expect("the large file");
    let mut first = vec![0; 64 << 10];
    file.read_exact_at(&mut first, 0).expect("its beginning");
    stop(&mut fixture);
    drop(host);
    // A read that needs the registry waits for the next daemon.
    let waiting = std::thread::spawn({
        let file = file.try_clone().expect("a descriptor");
        move || {
            let mut buf = vec![0; 64 << 10];
            file.read_exact_at(&mut buf, 2 << 20).map(|()| buf)
        }
    });
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), serde_json::json!([]));
    let late = waiting.join().expect("no panic").expect("no failed read");
    assert_eq!(late, noise(5, 4 << 20)[2 << 20..][..64 << 10]);
    fixture.same_tree(&image, container.path(), &IMPLIED);
    runtime.block_on(async {
        let host = fixture.host("default").await;
        let mounts = host.mounts(&key).await.expect("Mounts after a restart");
        assert_eq!(mounts[0].r#type, "overlay");
        let key = host.key("second");
        let mounts = host
            .prepare(&key, &parent, BTreeMap::new())
            .await
            .expect("a second container");
        let second = host.mount("second", &mounts);
        fixture.same_tree(&image, second.path(), &IMPLIED);
    });
}

/// Inode numbers, and everything else, of the container that runs and of one that is made after
/// the restart: lazy layers, ordinary ones, hard links, an empty layer, a layer twice.
fn inodes_stay(stop: impl Fn(&mut Fixture), unmounted: bool) {
    if !ready() {
        return;
    }
    let mut fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layers: Vec<_> = oddities()
        .iter()
        .enumerate()
        .map(|(index, tar)| match index {
            3 => PushedLayer::gzip(tar),
            _ => PushedLayer::estargz(tar),
        })
        .collect();
    let image = PushedImage::push(&fixture.lab, "a/odd", "1", &layers);
    let runtime = runtime();
    let (parent, key, before, container) = runtime.block_on(async {
        let host = fixture.host("default").await;
        let (parent, _) = host.pull(&image, cri_labels).await;
        let (key, container) = fixture.container(&host, &parent, "c").await;
        let before = list(container.path()).expect("the tree");
        (parent, key, before, container)
    });
    assert!(before.len() > 300, "{}", before.len());
    let container = if unmounted {
        drop(container);
        None
    } else {
        Some(container)
    };
    stop(&mut fixture);
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), serde_json::json!([]));
    if let Some(container) = container {
        let after = list(container.path()).expect("the same tree");
        assert!(after == before, "the running container's tree has changed");
    }
    runtime.block_on(async {
        let host = fixture.host("default").await;
        let mounts = host.mounts(&key).await.expect("Mounts after a restart");
        let again = host.mount("again", &mounts);
        let found = list(again.path()).expect("the tree, mounted again");
        same_inodes(&before, &found);
        drop(again);
        let (_, second) = fixture.container(&host, &parent, "second").await;
        same_inodes(&before, &list(second.path()).expect("a second container"));
    });
}

/// Asserts that two listings agree in everything but what belongs to a container's own directory.
fn same_inodes(before: &suite::listing::Listing, after: &suite::listing::Listing) {
    let names = |listing: &suite::listing::Listing| listing.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(after));
    for (path, row) in before
        .iter()
        .filter(|(path, _)| !path.as_os_str().is_empty())
    {
        assert_eq!(*row, after[path], "{}", path.display());
    }
}

#[test]
fn inode_numbers_stay_over_sigterm() {
    inodes_stay(|fixture| fixture.daemon.terminate(), false);
}

#[test]
fn inode_numbers_stay_over_kill_9() {
    inodes_stay(|fixture| fixture.daemon.kill(), false);
}

/// As over a reboot: every mount is made anew.
#[test]
fn inode_numbers_stay_when_everything_is_mounted_anew() {
    let unmount = |fixture: &mut Fixture| {
        let unmounted = fixture.daemon.unmount();
        assert!(unmounted.status.success(), "{unmounted:?}");
    };
    inodes_stay(unmount, true);
}

#[test]
fn a_container_survives_sigterm() {
    survives(|fixture| fixture.daemon.terminate());
}

#[test]
fn a_container_survives_kill_9() {
    survives(|fixture| fixture.daemon.kill());
}

#[test]
fn local_images_start_with_the_registry_gone() {
    if !ready() {
        return;
    }
    let mut fixture = Fixture::new(CONFIG);
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[base(), large(), top()]);
    let runtime = runtime();
    let parent = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(status, 200, "{verdicts}");
        for layer in verdicts["layers"].as_array().expect("layers") {
            assert_eq!(layer["verdict"], "proven", "{verdicts}");
            assert_eq!(layer["complete"], true, "{verdicts}");
        }
        parent
    });
    // As after a reboot: no daemon, no holder, nothing mounted.
    let unmounted = fixture.daemon.unmount();
    assert!(unmounted.status.success(), "{unmounted:?}");
    let left = suite::workdir::mounts_below(fixture.work.path());
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
    runtime.block_on(fixture.lab.gone());
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), serde_json::json!([]));
    runtime.block_on(async {
        let host = fixture.host("default").await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        fixture.same_tree(&image, container.path(), &IMPLIED);
        let lab = &fixture.lab;
        lab.back().await;
    });
}

#[test]
fn removed_images_free_their_layers() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!(
        "{CONFIG}cache.keep_unreferenced = \"0s\"\nlazy.unmount_after = \"0s\"\n"
    ));
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[base(), top()]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (key, container) = fixture.container(&host, &parent, "c").await;
        let (status, _) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(status, 200);
        let used = host.usage(&parent).await.expect("usage");
        assert!(used > 0, "{used}");
        drop(container);
        let bottom = host.stat(&parent).await.expect("the top").parent;
        for name in [&key, &parent, &bottom] {
            host.remove(name).await.expect("removed");
        }
        // What was resolved a moment ago is kept for the pull that it belongs to.
        let layers = fixture.daemon.root().join("layers");
        assert_eq!(std::fs::read_dir(&layers).expect("layers").count(), 2);
    });
}
