//! What the daemon holds in memory while nothing happens.

use std::{collections::BTreeMap, thread::sleep, time::Duration};

use suite::{
    pushed::{PushedImage, PushedLayer},
    tarball::Tarball,
};

use crate::fixture::{CONFIG, Fixture, ready, runtime};

/// As in the images of the benchmarks.
const ENTRIES: usize = 16_000;
const IMAGES: usize = 10;
const LIMIT_KIB: u64 = 60 << 10;

fn layer(image: usize) -> PushedLayer {
    let mut tar = Tarball::new();
    for n in 0..ENTRIES {
        if n % 100 == 0 {
            tar.dir(&format!("usr/lib/python3/package{}", n / 100));
        }
        let path = format!("usr/lib/python3/package{}/module_{n}.py", n / 100);
        tar.file(&path, format!("image {image} module {n}\n").as_bytes());
    }
    PushedLayer::estargz(&tar.finish())
}

fn status(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        })
        .expect("a number of KiB")
}

#[test]
fn ten_mounted_images_cost_little_memory() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let images: Vec<PushedImage> = (0..IMAGES)
        .map(|n| PushedImage::push(&fixture.lab, &format!("a/i{n}"), "1", &[layer(n)]))
        .collect();
    let pid = fixture.daemon.pid();
    eprintln!("before: {} KiB anonymous", status(pid, "RssAnon"));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let mut containers = Vec::new();
        for (n, image) in images.iter().enumerate() {
            let parent = fixture.pull_lazily(&host, image).await;
            let key = host.key("c");
            let mounts = host
                .prepare(&key, &parent, BTreeMap::new())
                .await
                .expect("a container");
            containers.push(host.mount(&format!("c{n}"), &mounts));
        }
        let (code, verdicts) = fixture.admin("POST", "/v1/hydrate");
        assert_eq!(code, 200, "{verdicts}");
        sleep(Duration::from_secs(10));
        let idle = status(pid, "RssAnon");
        eprintln!(
            "idle: {idle} KiB anonymous, peak {} KiB",
            status(pid, "VmHWM")
        );
        assert!(idle <= LIMIT_KIB, "{idle} KiB");
    });
}
