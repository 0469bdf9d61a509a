//! What the admin API says.

use std::{fs::File, os::unix::fs::FileExt as _, time::Duration};

use suite::{
    images::noise,
    process::wait_for,
    pushed::{PushedImage, PushedLayer},
    tarball::Tarball,
};

use crate::fixture::{CONFIG, Fixture, ready, runtime};

#[test]
fn touched_files_waiting_readers_and_bytes_are_shown() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(&format!("{CONFIG}lazy.hydration = \"off\"\n"));
    let layer = PushedLayer::estargz_with(
        &Tarball::new()
            .file("a", &noise(1, 300_000))
            .file("b", &noise(2, 300_000))
            .file("c", &noise(3, 3 << 20))
            .finish(),
        &formats::stargz::WriterOptions {
            chunk_size: 64 << 10,
            ..formats::stargz::WriterOptions::default()
        },
    );
    let digest = layer.digest();
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[layer]);
    let (status, _) = fixture.admin("GET", "/v1/images?ref=nobody/knows:it");
    assert_eq!(status, 404);
    let runtime = runtime();
    let container = runtime.block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        fixture.container(&host, &parent, "c").await.1
    });
    for name in ["b", "a"] {
        let mut buf = [0; 100];
        let file = File::open(container.path().join(name)).expect("a file");
        file.read_exact_at(&mut buf, 0).expect("its beginning");
    }
    let (_, touched) = fixture.admin("GET", &format!("/v1/layers/{digest}/touched"));
    let paths: Vec<&str> = touched["files"]
        .as_array()
        .expect("files")
        .iter()
        .filter_map(|file| file["path"].as_str())
        .collect();
    assert_eq!(paths, ["b", "a"], "{touched}");
    let shown = fixture.layer(&digest.to_string());
    assert!(
        shown["cache"]["traffic"]["demand"]["bytes"].as_u64() > Some(0),
        "{shown}"
    );
    assert_eq!(shown["verdict"], "claimed");
    let path = format!("/v1/images?ref={}", image.reference);
    let (status, seen) = fixture.admin("GET", &path);
    assert_eq!(
        (status, seen["complete"].clone()),
        (200, false.into()),
        "{seen}"
    );

    let rule = fixture.lab.stall(digest);
    let reader = std::thread::spawn({
        let path = container.path().join("c");
        move || {
            let mut buf = vec![0; 4096];
            File::open(path)?.read_exact_at(&mut buf, 2 << 20)?;
            std::io::Result::Ok(buf)
        }
    });
    wait_for("the reader to be seen", Duration::from_secs(20), || {
        let (_, why) = fixture.admin("GET", "/v1/why");
        why["waiting"][0]["readers"].as_u64() >= Some(1)
            && why["waiting"][0]["image"] == image.reference.as_str()
    });
    fixture.lab.release(rule);
    let read = reader.join().expect("no panic").expect("no failed read");
    assert_eq!(read, noise(3, 3 << 20)[2 << 20..][..4096]);
}

/// Options of the superblock mounted below `dir`; there is one.
fn super_options(dir: &std::path::Path) -> String {
    let text = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let below = format!(" {}/", dir.display());
    let mut found = text.lines().filter(|line| line.contains(&below));
    let line = found.next().expect("a layer's mount");
    assert_eq!(found.next(), None);
    line.rsplit(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn what_the_kernel_can_do_is_shown_and_direct_io_follows_it() {
    if !ready() {
        return;
    }
    let mut fixture = Fixture::new(&format!(
        "{CONFIG}lazy.hydration = \"off\"\nlazy.unmount_after = \"1ms\"\n"
    ));
    let none = serde_json::json!([]);
    assert_eq!(fixture.recovered(), none);
    let probe = fixture.admin("GET", "/v1/status").1["probe"].clone();
    for what in ["fuse", "erofs_on_fuse", "signalled_reader", "killed_reader"] {
        assert_eq!(probe[what], "works", "{probe}");
    }
    let direct = probe["direct_io"].as_str().expect("a finding") == "works";
    eprintln!("direct I/O: {}", probe["direct_io"]);
    assert!(!fixture.daemon.root().join("probe").exists());
    let layer = PushedLayer::estargz(&Tarball::new().file("a", &noise(4, 300_000)).finish());
    let image = PushedImage::push(&fixture.lab, "a/b", "1", &[layer]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (status, verdicts) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(status, 200, "{verdicts}");
        // The mount that was made before the layer was complete goes; the next one is another.
        let lowers = fixture.daemon.lowers();
        let mounted = || {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
            mounts.contains(&format!(" {}/", lowers.display()))
        };
        for _ in 0..200 {
            host.cleanup().await.expect("Cleanup");
            if !mounted() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(!mounted(), "the mount of an unused layer stays");
        let (_, container) = fixture.container(&host, &parent, "c").await;
        let options = super_options(&lowers);
        assert_eq!(options.contains("directio"), direct, "{options}");
        let read = std::fs::read(container.path().join("a")).expect("a file");
        assert_eq!(read, noise(4, 300_000));
    });
    // The answer is kept.
    fixture.daemon.terminate();
    fixture.daemon.restart();
    assert_eq!(fixture.recovered(), none);
    assert_eq!(fixture.admin("GET", "/v1/status").1["probe"], probe);
}
