//! Layers are unmounted although readers that were killed have left reads behind which nothing
//! answers; who still reads is left alone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use lab::{Lab, LabOptions, RuleId};
use suite::{
    host::{Host, Mounted},
    process::wait_for,
    pushed::{PushedImage, PushedLayer},
};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    worker::{Job, Sums, Worker},
    world::{push_remote, ready, sizes},
};

const LONG: Duration = Duration::from_secs(120);
/// Less than a read may wait for its registry.
const SOON: Duration = Duration::from_secs(40);

fn fixture() -> Fixture {
    Fixture::new(&format!(
        "{CONFIG}lazy.hydration = \"off\"\nlazy.unmount_after = \"1ms\"\n\
         cache.keep_unreferenced = \"1ms\"\n"
    ))
}

struct Container {
    key: String,
    /// The image's snapshots, top first.
    chain: Vec<String>,
    root: Mounted,
}

async fn container(fixture: &Fixture, host: &Host, image: &PushedImage, name: &str) -> Container {
    let top = fixture.pull_lazily(host, image).await;
    let mut chain = vec![top.clone()];
    loop {
        let below = host.stat(chain.last().expect("one")).await.expect("Stat");
        if below.parent.is_empty() {
            break;
        }
        chain.push(below.parent);
    }
    let (key, root) = fixture.container(host, &top, name).await;
    Container { key, chain, root }
}

/// Removes the container's snapshot and the image's, and has everything unused taken back.
async fn remove(host: &Host, key: &str, chain: &[String]) {
    for key in std::iter::once(key).chain(chain.iter().map(String::as_str)) {
        host.remove(key).await.expect("Remove");
    }
    host.cleanup().await.expect("Cleanup");
}

fn blocked_reader(fixture: &Fixture, name: &str, root: &Path, sums: &Sums) -> Worker {
    let mut worker = Worker::start(&fixture.work.sub("w"), name, Job::Threads, root, sums);
    wait_for("all readers to be blocked", SOON, || {
        worker.assert_running("before it was blocked");
        worker.blocked() >= sums.len()
    });
    worker
}

/// Where layers are mounted.
fn layer_mounts(fixture: &Fixture) -> Vec<PathBuf> {
    let lowers = fixture.daemon.lowers();
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    text.lines()
        .filter_map(|line| Some(PathBuf::from(line.split(' ').nth(4)?)))
        .filter(|target| target.starts_with(&lowers))
        .collect()
}

fn mounts_of(fixture: &Fixture, image: &PushedImage) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for layer in &image.layers {
        let shown = fixture.layer(&layer.digest().to_string());
        let mounts = shown["mounts"].as_array().expect("a list").iter();
        paths.extend(mounts.map(|mount| PathBuf::from(mount["path"].as_str().expect("a path"))));
    }
    paths
}

/// Mount helpers of the daemon, which live as long as their unmount takes.
fn helpers(fixture: &Fixture) -> usize {
    let pid = fixture.daemon.pid();
    let children = fs::read_dir(format!("/proc/{pid}/task"))
        .expect("its threads")
        .flatten()
        .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let pids: Vec<String> = children
        .flat_map(|list| {
            list.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    let helping = pids.iter().filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.contains("mount-helper"))
    });
    helping.count()
}

#[test]
fn a_layer_with_reads_of_killed_readers_is_unmounted() {
    if !ready(200) {
        return;
    }
    let fixture = fixture();
    let other = Lab::start_blocking(LabOptions::new(fixture.work.sub("registry-b")))
        .expect("a second lab registry");
    let (a, a_sums) = push_remote(
        &fixture.lab,
        "a/killed",
        21,
        &[sizes(0, &[600_000, 70_000]), sizes(0, &[300_000])],
    );
    let (b, b_sums) = push_remote(&other, "b/alive", 22, &[sizes(0, &[500_000, 5000])]);
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let a_container = container(&fixture, &host, &a, "a").await;
        let b_container = container(&fixture, &host, &b, "b").await;
        let stall = |layer: &PushedLayer| fixture.lab.stall(layer.digest());
        let a_stalls: Vec<RuleId> = a.layers.iter().map(stall).collect();
        let b_stall = other.stall(b.layers[0].digest());
        let mut killed = blocked_reader(&fixture, "a", a_container.root.path(), &a_sums);
        let mut alive = blocked_reader(&fixture, "b", b_container.root.path(), &b_sums);
        let gone = mounts_of(&fixture, &a);
        assert_eq!(gone.len(), 2);
        assert!(
            gone.iter()
                .all(|path| layer_mounts(&fixture).contains(path))
        );
        killed.send_kill();
        killed.ended(SOON);
        drop(a_container.root);
        remove(&host, &a_container.key, &a_container.chain).await;
        wait_for(
            "the mounts of A to be gone",
            Duration::from_secs(20),
            || {
                let mounted = layer_mounts(&fixture);
                gone.iter().all(|path| !mounted.contains(path))
            },
        );
        // The superblocks too: no unmount is under way any more. The stall goes on.
        wait_for("no unmount", Duration::from_secs(20), || {
            helpers(&fixture) == 0
        });
        assert!(
            fixture.daemon.log().contains("gave up reads"),
            "nothing had to be given up: the test proves nothing"
        );
        let (status, _) = fixture.admin("GET", "/v1/status");
        assert_eq!(status, 200);
        alive.assert_running("while another layer was unmounted");
        assert_eq!(alive.blocked(), b_sums.len());
        other.release(b_stall);
        assert_eq!(alive.finish(LONG).passes, b_sums.len() as u64);
        // What was removed can be pulled again.
        for stall in a_stalls {
            fixture.lab.release(stall);
        }
        let again = container(&fixture, &host, &a, "again").await;
        let once = Job::Passes {
            stop: "/".into(),
            hold: false,
        };
        let scratch = fixture.work.sub("w");
        Worker::start(&scratch, "again", once, again.root.path(), &a_sums).finish(LONG);
    });
}

/// A process with a mount namespace of its own, a copy of this one.
struct Copy(Child);

impl Copy {
    fn start() -> Self {
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sleep", "300"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare(1)");
        let copy = Self(child);
        let ours = fs::read_link("/proc/self/ns/mnt").expect("a namespace");
        wait_for("a namespace of its own", SOON, || {
            fs::read_link(format!("/proc/{}/ns/mnt", copy.0.id())).is_ok_and(|ns| ns != ours)
        });
        copy
    }

    fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.0.id()));
        root.join(path.strip_prefix("/").expect("an absolute path"))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One reader on a container whose snapshots were removed below it, one on a copy of the layer's
/// mount in another mount namespace.
#[test]
fn an_unmounted_layer_that_lives_on_elsewhere_is_read_right() {
    if !ready(200) {
        return;
    }
    let fixture = fixture();
    let (image, sums) = push_remote(&fixture.lab, "a/shared", 23, &[vec![600_000, 7000, 90_000]]);
    let (first, second): (Sums, Sums) = sums.into_iter().partition(|(path, _)| path.ends_with("1"));
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let container = container(&fixture, &host, &image, "c").await;
        let rule = fixture.lab.stall(image.layers[0].digest());
        let mounts = mounts_of(&fixture, &image);
        assert_eq!(mounts.len(), 1);
        let copy = Copy::start();
        let mut inside = blocked_reader(&fixture, "c", container.root.path(), &first);
        let mut copied = blocked_reader(&fixture, "copy", &copy.path(&mounts[0]), &second);
        remove(&host, &container.key, &container.chain).await;
        wait_for("the mount to be gone", Duration::from_secs(20), || {
            !layer_mounts(&fixture).contains(&mounts[0])
        });
        host.cleanup().await.expect("Cleanup");
        // Longer than an unmount that hangs is left alone.
        tokio::time::sleep(Duration::from_secs(2)).await;
        inside.assert_running("after its layer was unmounted");
        copied.assert_running("after its layer was unmounted");
        fixture.lab.release(rule);
        inside.finish(LONG);
        copied.finish(LONG);
    });
}

#[test]
fn unmount_gets_past_killed_readers_of_a_killed_daemon() {
    if !ready(200) {
        return;
    }
    let mut fixture = fixture();
    let (image, sums) = push_remote(
        &fixture.lab,
        "a/killed",
        24,
        &[vec![600_000], vec![70_000], vec![9000], vec![80_000]],
    );
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let container = container(&fixture, &host, &image, "c").await;
        for layer in &image.layers {
            fixture.lab.stall(layer.digest());
        }
        let mut killed = blocked_reader(&fixture, "c", container.root.path(), &sums);
        fixture.daemon.kill();
        killed.send_kill();
        killed.ended(SOON);
    });
    // Under the harness's own bound.
    let output = fixture.daemon.unmount();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {told}", output.status);
    assert_eq!(layer_mounts(&fixture), Vec::<PathBuf>::new(), "{told}");
}
