//! eStargz images of ours in real containerd: lazily served trees equal ordinary pulls.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::PathBuf, time::Duration};

use lab::{Lab, LabOptions};
use suite::{
    containerd::{Containerd, Line, PLUGIN, Setup},
    cri::{self, Cri},
    daemon::Daemon,
    images::{self, Pushed, TestLayer},
    isolate,
    listing::{self, Allowed, Listing},
    skip,
    workdir::Workdir,
};

/// Everything one test needs.
struct World {
    // Dropped in this order: containers first, then the daemon, then its directories.
    containerd: Containerd,
    daemon: Daemon,
    lab: Lab,
    work: Workdir,
}

impl World {
    fn start(line: Line, hydration: &str) -> Self {
        let work = Workdir::new();
        let lab = Lab::start_blocking(LabOptions::new(work.sub("registry"))).unwrap();
        let socket = work.path().join("c/c.sock");
        let config = format!(
            "[lazy]\nhydration = \"{hydration}\"\n[containerd]\naddress = {:?}\n[registry]\nconfig_path = \"\"\n",
            socket.display().to_string()
        );
        let daemon = Daemon::start(&work.sub("d"), &config);
        let setup = Setup {
            line,
            snapshotter: Some((daemon.socket(), daemon.root())),
            cri_snapshotter: PLUGIN.into(),
            sandbox_image: format!("{}/pause:1", lab.host()),
            hosts_dir: work.sub("hosts"),
            tuned: false,
        };
        let containerd = Containerd::start(&work.sub("c"), setup);
        Self {
            containerd,
            daemon,
            lab,
            work,
        }
    }

    /// `ctr images pull` (2.x: through the transfer service) or upstream's rpull (1.6).
    fn pull(&self, image: &Pushed, snapshotter: &str) {
        let reference = image.reference.as_str();
        if snapshotter == PLUGIN && self.containerd.line() == Line::V1_6 {
            let args = [
                "images",
                "rpull",
                "--plain-http",
                "--snapshotter",
                PLUGIN,
                reference,
            ];
            let output = self.containerd.ctr_remote(args).expect("checked before");
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        } else {
            self.containerd.ctr([
                "images",
                "pull",
                "--plain-http",
                "--snapshotter",
                snapshotter,
                reference,
            ]);
        }
    }

    /// Mounts the image through containerd and lists it.
    fn list(&self, image: &Pushed, snapshotter: &str) -> Listing {
        let name = format!("view-{snapshotter}-{}", image.digest.hex());
        let target = self.work.sub(&name);
        let path = target.display().to_string();
        if self.containerd.line() != Line::V1_6 {
            let images = [
                "images",
                "mount",
                "--snapshotter",
                snapshotter,
                &image.reference,
                &path,
            ];
            self.containerd.ctr(images);
            let listing = listing::list(&target).unwrap();
            self.containerd.ctr([
                "images",
                "unmount",
                "--rm",
                "--snapshotter",
                snapshotter,
                &path,
            ]);
            return listing;
        }
        // `ctr images mount` of 1.6 ignores the snapshotter it is given: view, and mount by hand.
        let chain = formats::oci::chain_ids(&image.config.rootfs.diff_ids)
            .pop()
            .unwrap()
            .to_string();
        let snapshots = ["snapshots", "--snapshotter", snapshotter];
        let call = |args: &[&str]| self.containerd.ctr(snapshots.iter().chain(args));
        // Nothing refers to the view until it has the label: the garbage collector of the pull that
        // has just ended may be quicker, so it is made again.
        let labelled = (0..20).any(|_| {
            let try_call = |args: &[&str]| {
                let args = snapshots.iter().chain(args);
                self.containerd.ctr_within(30, args).status.success()
            };
            try_call(&["view", &name, &chain]);
            try_call(&["label", &name, "containerd.io/gc.root=test"])
        });
        assert!(labelled, "{name} is taken away again and again");
        let command = call(&["mounts", &path, &name]);
        let mounted = std::process::Command::new("sh")
            .arg("-c")
            .arg(&command)
            .output()
            .unwrap();
        assert!(
            mounted.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
        let listing = listing::list(&target).unwrap();
        rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
        call(&["rm", &name]);
        listing
    }

    fn lazy_layers(&self) -> Vec<serde_json::Value> {
        benches::client::lazy_layers(&self.daemon.admin()).unwrap()
    }
}

fn ready(line: Line) -> bool {
    if let Some(why) = line.missing() {
        skip(&why);
        return false;
    }
    if line == Line::V1_6
        && suite::machine::deb_program("ctr-remote", "usr/bin/ctr-remote").is_none()
    {
        skip("no ctr-remote (tests/peers/debs unpacks it)");
        return false;
    }
    isolate::enter(400)
}

fn allowed() -> Allowed {
    // Directories of `oddities` that no entry of any layer describes.
    let names = ["group", "names", "deep", "many"];
    let mut implied: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    let mut deep = PathBuf::from("deep");
    for part in 1..=9 {
        deep.push(part.to_string());
        implied.push(deep.clone());
    }
    // An implied directory of an upper layer: an unpack changes its time as well.
    implied.extend(["private", "tmp", "opaque"].map(PathBuf::from));
    Allowed { implied }
}

fn equal(line: Line) {
    if !ready(line) {
        return;
    }
    let world = World::start(line, "off");
    let tars = images::oddities();
    let lazy: Vec<_> = tars.iter().cloned().map(TestLayer::lazy).collect();
    let plain: Vec<_> = tars.iter().cloned().map(TestLayer::plain).collect();
    let mixed: Vec<_> = tars
        .iter()
        .enumerate()
        .map(|(index, tar)| {
            if index % 2 == 0 {
                TestLayer::plain(tar.clone())
            } else {
                TestLayer::lazy(tar.clone())
            }
        })
        .collect();
    let other: Vec<_> = tars
        .iter()
        .enumerate()
        .map(|(index, tar)| {
            if index % 2 == 1 {
                TestLayer::plain(tar.clone())
            } else {
                TestLayer::lazy(tar.clone())
            }
        })
        .collect();
    let plain = images::push(&world.lab, "odd", "plain", &plain, &["/none"]);
    world.pull(&plain, "overlayfs");
    let oracle = world.list(&plain, "overlayfs");
    assert!(oracle.len() > 300, "{}", oracle.len());

    let lazy = images::push(&world.lab, "odd", "lazy", &lazy, &["/none"]);
    let before = world.lab.log().mark();
    world.pull(&lazy, PLUGIN);
    let served = world.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < lazy.layer_bytes() / 2,
        "{} of {} layer bytes were downloaded by the pull:\n{}",
        served.blob_bytes,
        lazy.layer_bytes(),
        suite::daemon::tail(&world.daemon.log_path()),
    );
    let found = listing::differences(&oracle, &world.list(&lazy, PLUGIN), &allowed());
    assert!(found.is_empty(), "lazy:\n{}", found.join("\n"));

    for (tag, layers) in [("mixed", mixed), ("other", other)] {
        let image = images::push(&world.lab, "odd", tag, &layers, &["/none"]);
        world.pull(&image, PLUGIN);
        let found = listing::differences(&oracle, &world.list(&image, PLUGIN), &allowed());
        assert!(found.is_empty(), "{tag}:\n{}", found.join("\n"));
    }
}

#[test]
fn trees_equal_an_ordinary_pull_on_2_4() {
    equal(Line::V2_4);
}

#[test]
fn trees_equal_an_ordinary_pull_on_2_3() {
    equal(Line::V2_3);
}

#[test]
fn trees_equal_an_ordinary_pull_on_1_6() {
    equal(Line::V1_6);
}

/// A small image that runs: the machine's shell and what it needs.
fn shell_image(world: &World, tag: &str) -> Pushed {
    let dir = world.work.sub("shell");
    let layout = benches::sample::build(
        &dir,
        benches::sample::SampleOptions {
            payload_bytes: 60 << 20,
            entries: 1500,
        },
        &mut |_| {},
    )
    .unwrap();
    let mut layers = Vec::new();
    let manifest = std::fs::read(dir.join(formats::oci::blob_path(&layout.manifest))).unwrap();
    let manifest = formats::oci::Manifest::parse(&manifest, None).unwrap();
    for layer in &manifest.layers {
        let blob = std::fs::File::open(dir.join(formats::oci::blob_path(&layer.digest))).unwrap();
        let mut tar = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(blob), &mut tar).unwrap();
        layers.push(TestLayer::lazy(tar));
    }
    images::push(
        &world.lab,
        "shell",
        tag,
        &layers,
        &["/usr/bin/python3", "/app/ready.py"],
    )
}

fn runs(line: Line) {
    if !ready(line) {
        return;
    }
    let world = World::start(line, "off");
    let image = shell_image(&world, "lazy");
    let before = world.lab.log().mark();
    world.pull(&image, PLUGIN);
    let mut args = vec![
        "run".to_owned(),
        "--rm".into(),
        "--snapshotter".into(),
        PLUGIN.into(),
    ];
    args.extend(world.containerd.run_flags());
    // runc keeps its state by name, outside of the private directories.
    args.extend([
        image.reference.clone(),
        format!("first-{}", std::process::id()),
    ]);
    let output = world.containerd.ctr(args);
    assert!(output.contains("ready"), "{output}");
    let served = world.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < image.layer_bytes(),
        "{} of {} bytes",
        served.blob_bytes,
        image.layer_bytes()
    );
    world.lazy_layers();
}

#[test]
fn a_container_starts_lazily_on_2_4() {
    runs(Line::V2_4);
}

#[test]
fn a_container_starts_lazily_on_2_3() {
    runs(Line::V2_3);
}

#[test]
fn a_container_starts_lazily_on_1_6() {
    runs(Line::V1_6);
}

fn kubernetes(line: Line) {
    if !ready(line) {
        return;
    }
    let world = World::start(line, "off");
    let image = shell_image(&world, "cri");
    // The pause container: anything that sleeps.
    let pause_layers: Vec<_> = image.manifest.layers.clone();
    let mut config = image.config.clone();
    config.config.entrypoint = Some(vec!["/usr/bin/sleep".into(), "1000".into()]);
    let json = config.to_json();
    let descriptor = formats::oci::Descriptor::of(formats::oci::media_type::OCI_CONFIG, &json);
    world.lab.push_blob("pause", &json).unwrap();
    for layer in &pause_layers {
        let path = world
            .work
            .path()
            .join("registry/blobs/sha256")
            .join(layer.digest.hex());
        world
            .lab
            .push_blob_from("pause", std::fs::File::open(path).unwrap())
            .unwrap();
    }
    let manifest = formats::oci::Manifest::new(descriptor, pause_layers);
    images::push_manifest(&world.lab, "pause", "1", &manifest);

    let before = world.lab.log().mark();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let logs = world.work.sub("logs");
    runtime.block_on(async {
        let cri = Cri::connect(&world.containerd.socket()).await.unwrap();
        let pod = cri::pod("pod", &logs);
        cri.pull_image(&image.reference, Some(pod.clone()))
            .await
            .unwrap();
        let sandbox = cri.run_sandbox(&pod).await.unwrap();
        let command = ["/usr/bin/python3", "/app/ready.py"];
        let container = cri
            .start_container(&sandbox, &pod, "main", &image.reference, &command)
            .await
            .unwrap();
        let status = cri.wait(&container, Duration::from_secs(60)).await.unwrap();
        assert_eq!(status.exit_code, 0, "{status:?}");
        cri.remove_sandbox(&sandbox).await.unwrap();
    });
    let log = std::fs::read_to_string(logs.join("main.log")).unwrap();
    assert!(log.contains("ready"), "{log}");
    let served = world.lab.log().totals_since(&before);
    assert!(
        served.blob_bytes < image.layer_bytes(),
        "{} of {} bytes",
        served.blob_bytes,
        image.layer_bytes()
    );
}

#[test]
fn a_pod_starts_lazily_on_2_4() {
    kubernetes(Line::V2_4);
}

#[test]
fn a_pod_starts_lazily_on_2_3() {
    kubernetes(Line::V2_3);
}

#[test]
fn a_pod_starts_lazily_on_1_6() {
    kubernetes(Line::V1_6);
}
