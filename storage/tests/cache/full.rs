//! A disk that is full, or has no inodes left: readers notice nothing, and nothing is said to be
//! stored that is not.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::geteuid;
use storage::{
    cache::{LayerBlob, Scheduler, SchedulerOptions},
    hydrate::{Mode, Phase},
};

use crate::{
    fixture::{Layer, open_with, options, ramp, read, until},
    restart::local_chunks,
};

/// Set in the process that has the small file system.
const DISK: &str = "STORAGE_TEST_DISK";

/// Runs the test again in a process of its own, in a mount namespace with a small file system, and
/// under a deadline; `None` in the process that starts it. The mount goes with the namespace.
fn small_disk(test: &str, mount: &str) -> Option<PathBuf> {
    if let Some(disk) = env::var_os(DISK) {
        return Some(disk.into());
    }
    if !geteuid().is_root() {
        skip::skip("mounting needs root");
        return None;
    }
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = format!("cd {} && {mount} && exec \"$@\"", work.path().display());
    let status = Command::new("timeout")
        .args([
            "-k",
            "5",
            "150",
            "unshare",
            "--mount",
            "--propagation",
            "private",
        ])
        .args(["sh", "-ec", &script, "sh"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DISK, &disk)
        .status()
        .unwrap();
    assert!(status.success(), "{test} with {mount}: {status}");
    None
}

const TMPFS: &str = "mount -t tmpfs -o size=40m none disk";
const EXT4: &str =
    "truncate -s 64M image && mkfs.ext4 -q -F -m 0 image && mount -o loop image disk";

/// About 12 MB that cannot be had from anywhere but the source.
fn layer() -> Layer {
    let sizes: Vec<usize> = (0..180)
        .map(|i| [3, 700, 4096, 20_000, 100_000, 150_001, 210_000][i % 7])
        .collect();
    Layer::new(&sizes, 60_000, 1)
}

/// Little memory, so that most of what is served has to be dropped again.
fn scheduler() -> Arc<Scheduler> {
    let options = SchedulerOptions {
        memory_bytes: 2 << 20,
        ..SchedulerOptions::default()
    };
    Scheduler::new(tokio::runtime::Handle::current(), options)
}

/// Writes until nothing more fits.
fn fill(disk: &Path) {
    let mut file = fs::File::create(disk.join("filler")).unwrap();
    let bytes = ramp(9, 1 << 20);
    let mut step = bytes.len();
    while step > 0 {
        match file.write(&bytes[..step]) {
            Ok(n) if n > 0 => {}
            _ => step /= 2,
        }
    }
}

fn free(disk: &Path) {
    fs::remove_file(disk.join("filler")).unwrap();
}

/// Reads everything as several containers would, each in an order of its own.
async fn read_all(blob: &Arc<LayerBlob>, layer: &Layer, readers: usize) {
    const STEP: usize = 50_000;
    let steps = layer.decoded.len().div_ceil(STEP);
    let tasks: Vec<_> = (0..readers)
        .map(|reader| {
            let (blob, layer) = (Arc::clone(blob), layer.clone());
            tokio::spawn(async move {
                for step in 0..steps {
                    // The first reader goes in order and reads everything.
                    let at = (step * (1 + reader * 6) + reader * 13) % steps * STEP;
                    let bytes = read(&blob, at as u64, STEP).await.unwrap();
                    let end = layer.decoded.len().min(at + STEP);
                    assert!(bytes == layer.decoded[at..end], "wrong bytes at {at}");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

async fn served_from_memory(disk: &Path) {
    let layer = layer();
    let source = layer.source();
    let scheduler = scheduler();
    let dir = disk.join("layer");
    fs::create_dir(&dir).unwrap();
    let blob = open_with(&dir, &layer, &source, &scheduler, options());
    read(&blob, 0, 500_000).await.unwrap();
    let stored = blob.status().local_bytes;
    fill(disk);
    read_all(&blob, &layer, 3).await;
    let report = scheduler.disk_report();
    assert!(report.full && report.refused_writes > 0, "{report:?}");
    assert!(report.unstored_bytes > 0, "{report:?}");
    assert!(report.memory_bytes <= 2 << 20, "{report:?}");
    let status = blob.status();
    assert_eq!((status.failed_reads, status.events), (0, Vec::new()));
    assert!(
        status.local_bytes < status.payload_bytes,
        "it cannot have been stored"
    );
    assert!(status.local_bytes >= stored);

    blob.hydrate(layer.hydrate_options());
    until(|| blob.hydration_progress().phase == Phase::Retrying).await;
    let fetched = source.served();

    // What is on disk says the truth about itself.
    let copied = tempfile::tempdir().unwrap();
    for name in ["wire.map", "data.map", "wire", "data"] {
        if dir.join(name).exists() {
            fs::copy(dir.join(name), copied.path().join(name)).unwrap();
        }
    }
    local_chunks(copied.path(), &layer).await;
    assert_eq!(source.served(), fetched, "hydration waits");

    free(disk);
    until(|| !scheduler.disk_report().full).await;
    assert!(blob.hydrated().await.unwrap().complete);
    read_all(&blob, &layer, 1).await;
    assert!(fs::read(blob.data_path()).unwrap() == *layer.decoded);
    blob.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_tmpfs() {
    if let Some(disk) = small_disk("full::a_full_tmpfs", TMPFS) {
        served_from_memory(&disk).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_ext4() {
    if !has_ext4() {
        return;
    }
    if let Some(disk) = small_disk("full::a_full_ext4", EXT4) {
        served_from_memory(&disk).await;
    }
}

fn has_ext4() -> bool {
    let found = Path::new("/dev/loop-control").exists()
        && Command::new("mkfs.ext4")
            .arg("-V")
            .output()
            .is_ok_and(|output| output.status.success());
    if !found {
        skip::skip("ext4 on a loop device needs mkfs.ext4 and /dev/loop-control");
    }
    found
}

/// The disk fills up and is freed again and again while readers and hydration are at work.
async fn in_turns(disk: &Path) {
    let layer = layer();
    let source = layer.source();
    let scheduler = scheduler();
    let over = Arc::new(AtomicBool::new(false));
    let filler = thread::spawn({
        let (disk, over) = (disk.to_owned(), Arc::clone(&over));
        move || {
            while !over.load(Ordering::SeqCst) {
                fill(&disk);
                thread::sleep(Duration::from_millis(700));
                free(&disk);
                thread::sleep(Duration::from_millis(300));
            }
        }
    });
    // Until readers have met a full disk in a few of them.
    let (mut round, mut met) = (0, 0);
    while met < 4 {
        let before = scheduler.disk_report().refused_writes;
        let dir = disk.join(format!("layer{round}"));
        fs::create_dir(&dir).unwrap();
        let blob = open_with(&dir, &layer, &source, &scheduler, options());
        let mode = if round % 2 == 0 {
            Mode::Full
        } else {
            Mode::Off
        };
        blob.hydrate(storage::hydrate::HydrateOptions {
            mode,
            ..layer.hydrate_options()
        });
        read_all(&blob, &layer, 3).await;
        let status = blob.status();
        assert_eq!((status.failed_reads, status.corrupt_chunks), (0, 0));
        // Fails while the map has no room, and that is all it does.
        let _ = blob.close().await;
        drop(blob);
        let copied = tempfile::tempdir().unwrap();
        for name in ["wire.map", "data.map", "wire", "data"] {
            if dir.join(name).exists() {
                fs::copy(dir.join(name), copied.path().join(name)).unwrap();
            }
        }
        local_chunks(copied.path(), &layer).await;
        fs::remove_dir_all(&dir).unwrap();
        round += 1;
        met += u32::from(scheduler.disk_report().refused_writes > before);
    }
    over.store(true, Ordering::SeqCst);
    filler.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tmpfs_that_is_full_in_turns() {
    if let Some(disk) = small_disk("full::a_tmpfs_that_is_full_in_turns", TMPFS) {
        in_turns(&disk).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ext4_that_is_full_in_turns() {
    if !has_ext4() {
        return;
    }
    if let Some(disk) = small_disk("full::an_ext4_that_is_full_in_turns", EXT4) {
        in_turns(&disk).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_inodes() {
    let mount = "mount -t tmpfs -o size=64m,nr_inodes=32 none disk";
    let Some(disk) = small_disk("full::a_disk_without_inodes", mount) else {
        return;
    };
    let layer = layer();
    let source = layer.source();
    let scheduler = scheduler();
    let dir = disk.join("layer");
    fs::create_dir(&dir).unwrap();
    let used: Vec<PathBuf> = (0..1000)
        .map(|number| disk.join(format!("empty{number}")))
        .take_while(|path| fs::File::create(path).is_ok())
        .collect();
    let blob = open_with(&dir, &layer, &source, &scheduler, options());
    read_all(&blob, &layer, 2).await;
    assert_eq!(
        fs::read_dir(&dir).unwrap().count(),
        0,
        "there is no room for a file"
    );
    let status = blob.status();
    assert_eq!((status.failed_reads, status.local_bytes), (0, 0));
    for path in &used[..8] {
        fs::remove_file(path).unwrap();
    }
    until(|| !scheduler.disk_report().full).await;
    // What is read is stored again, what was in memory too.
    read_all(&blob, &layer, 2).await;
    until(|| blob.status().percent_local >= 100.0).await;
    blob.close().await.unwrap();
    drop(blob);
    let copied = tempfile::tempdir().unwrap();
    for name in ["wire.map", "data.map", "wire", "data"] {
        fs::copy(dir.join(name), copied.path().join(name)).unwrap();
    }
    assert_eq!(
        local_chunks(copied.path(), &layer).await,
        layer.map.chunks().len()
    );
}
