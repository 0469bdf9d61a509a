//! The daemon as a process: restarts, kills, two at a time, many clients, the admin socket. With
//! driver overlayfs; nothing here mounts.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use snapshotterd::api::snapshots::Kind;
use suite::{
    daemon::Daemon,
    machine::{self, binary},
    skip,
    snapshotter::Snapshotter,
    workdir::Workdir,
};
use tonic::Code;

const CONFIG: &str = "default_driver = \"overlayfs\"\n";

fn start(work: &Workdir) -> Option<Daemon> {
    if !machine::is_root() {
        skip("the daemon needs root");
        return None;
    }
    Some(Daemon::start(&work.sub("d"), CONFIG))
}

fn connect(daemon: &Daemon) -> Snapshotter {
    Snapshotter::connect(&daemon.socket(), "overlayfs")
}

fn get(daemon: &Daemon, path: &str) -> String {
    let mut stream = UnixStream::connect(daemon.admin()).expect("the admin socket");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn snapshots_outlive_restarts_of_both_kinds() {
    let work = Workdir::new();
    let Some(mut daemon) = start(&work) else {
        return;
    };
    let sn = connect(&daemon);
    sn.prepare("base-a", "").expect("prepare");
    sn.commit("base", "base-a").expect("commit");
    let mounts = sn.prepare("a", "base").expect("prepare");
    let before = sn.list(&[]).expect("list");
    for clean in [true, false] {
        if clean {
            daemon.terminate();
        } else {
            daemon.kill();
        }
        daemon.restart();
        let sn = connect(&daemon);
        assert_eq!(sn.list(&[]).expect("list"), before);
        assert_eq!(sn.mounts("a").expect("mounts"), mounts);
    }
}

#[test]
fn plugin_names_have_key_spaces_of_their_own() {
    let work = Workdir::new();
    let Some(daemon) = start(&work) else { return };
    let (one, other) = (connect(&daemon), connect(&daemon).named("other"));
    one.prepare("a", "").expect("prepare");
    assert_eq!(
        other.stat("a").expect_err("not here").code(),
        Code::NotFound
    );
    other.prepare("a", "").expect("the same key");
    other.commit("c", "a").expect("commit");
    let orphan = one.prepare("b", "c").expect_err("the parent is another's");
    assert_eq!(orphan.code(), Code::NotFound);
    assert_eq!(one.list(&[]).expect("list").len(), 1);
    // Directories are shared, so a clean-up for one name must spare the other's.
    one.cleanup().expect("cleanup");
    let mounts = one.prepare("x", "").expect("prepare");
    other.cleanup().expect("cleanup");
    assert!(Path::new(&mounts[0].source).is_dir());
}

#[test]
fn a_second_daemon_says_who_is_there() {
    let work = Workdir::new();
    let Some(daemon) = start(&work) else { return };
    // Lower directories have short paths.
    let short = Workdir::below(Path::new("/tmp"));
    let second = |root: &Path, state: &Path| {
        let lowers = short.path().join("l2");
        let output = Command::new("timeout")
            .args(["-k", "5", "20"])
            .arg(binary("snapshotterd"))
            .arg("--root")
            .arg(root)
            .arg("--state")
            .arg(state)
            .arg("--lowers")
            .arg(lowers)
            .output()
            .expect("snapshotterd starts");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let expected = format!("is in use by another daemon (pid {})", daemon.pid());
    for (root, state) in [
        (daemon.root(), work.path().join("s2")),
        (work.path().join("r2"), work.path().join("d/run")),
    ] {
        let said = second(&root, &state);
        assert!(said.contains(&expected), "{said}");
    }
    let unmount = Command::new(binary("snapshotterd"))
        .arg("--root")
        .arg(daemon.root())
        .arg("--state")
        .arg(work.path().join("s3"))
        .arg("--lowers")
        .arg(short.path().join("l3"))
        .arg("--unmount")
        .output()
        .expect("snapshotterd starts");
    assert!(!unmount.status.success(), "not under a running daemon");
    assert_eq!(connect(&daemon).list(&[]).expect("undisturbed"), []);
}

/// What a client was told before the kill holds after it, and nothing half-made is left.
#[test]
fn kills_lose_nothing_that_was_answered() {
    let work = Workdir::new();
    let Some(mut daemon) = start(&work) else {
        return;
    };
    let committed: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    for round in 0..6_u64 {
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (stop, committed) = (Arc::clone(&stop), Arc::clone(&committed));
                let sn = connect(&daemon);
                thread::spawn(move || work_until_killed(&sn, round, client, &stop, &committed))
            })
            .collect();
        // Different moments, not random ones: a failure can be repeated.
        thread::sleep(Duration::from_millis(40 + 37 * round));
        daemon.kill();
        stop.store(true, Ordering::Release);
        for client in clients {
            client.join().expect("a client");
        }
        daemon.restart();
        let sn = connect(&daemon);
        let found: BTreeSet<String> = sn
            .list(&["kind==committed"])
            .expect("list")
            .into_iter()
            .map(|info| info.name)
            .collect();
        let committed = committed.lock().expect("clients have ended");
        assert!(
            !committed.is_empty(),
            "nothing was committed before the kill"
        );
        let lost: Vec<_> = committed.difference(&found).collect();
        assert!(lost.is_empty(), "round {round} lost {lost:?}");
        for info in sn.list(&[]).expect("list") {
            // Every snapshot can be used, and its parents with it.
            if info.kind() == Kind::Committed {
                sn.usage(&info.name).expect("usage");
            } else {
                assert!(!sn.mounts(&info.name).expect("mounts").is_empty());
            }
        }
        sn.cleanup().expect("cleanup");
    }
    // After a clean-up there is exactly one directory for each snapshot.
    let sn = connect(&daemon);
    sn.cleanup().expect("cleanup");
    let directories = std::fs::read_dir(daemon.root().join("snapshots"))
        .expect("the directory of snapshots")
        .count();
    assert_eq!(directories, sn.list(&[]).expect("list").len());
}

fn work_until_killed(
    sn: &Snapshotter,
    round: u64,
    client: u64,
    stop: &AtomicBool,
    committed: &Mutex<BTreeSet<String>>,
) {
    let mut parent = String::new();
    for number in 0.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let name = format!("{round}-{client}-{number}");
        let key = format!("{name}-a");
        if sn.prepare(&key, &parent).is_err() || sn.commit(&name, &key).is_err() {
            continue;
        }
        committed
            .lock()
            .expect("no client panics")
            .insert(name.clone());
        if sn.view(&format!("{name}-v"), &name).is_ok() {
            // May come back after the kill: containerd would prune it again.
            let _ = sn.remove(&format!("{name}-v"));
        }
        parent = if number % 8 == 0 { String::new() } else { name };
    }
}

/// 1,000 snapshots made by 64 clients at once. Prints latencies; asserts only that all is there.
#[test]
fn sixty_four_clients() {
    const CLIENTS: usize = 64;
    const SNAPSHOTS: usize = 1000;
    let work = Workdir::new();
    let Some(daemon) = start(&work) else { return };
    let sn = connect(&daemon);
    sn.prepare("base-a", "").expect("prepare");
    sn.commit("base", "base-a").expect("commit");
    let (alone, _) = measure(&sn, "alone", 50);
    report("one client", alone);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let sn = connect(&daemon);
            let count = SNAPSHOTS / CLIENTS + usize::from(client < SNAPSHOTS % CLIENTS);
            thread::spawn(move || measure(&sn, &client.to_string(), count))
        })
        .collect();
    let mut all = [const { Vec::new() }; 5];
    let mut made = 0;
    for client in clients {
        let (times, count) = client.join().expect("a client");
        made += count;
        for (all, times) in all.iter_mut().zip(times) {
            all.extend(times);
        }
    }
    report("64 clients", all);
    assert_eq!(made, SNAPSHOTS);
    let began = Instant::now();
    let listed = sn.list(&["kind==committed"]).expect("list");
    eprintln!("list of {}: {:?}", listed.len(), began.elapsed());
    assert_eq!(listed.len(), SNAPSHOTS + 50 + 1);
}

const STEPS: [&str; 5] = ["prepare", "mounts", "commit", "stat", "view+remove"];

fn measure(sn: &Snapshotter, client: &str, count: usize) -> ([Vec<Duration>; 5], usize) {
    let mut times = [const { Vec::new() }; 5];
    for number in 0..count {
        let (name, key) = (format!("{client}-{number}"), format!("{client}-{number}-a"));
        let mut timed = |step: usize, call: &dyn Fn()| {
            let began = Instant::now();
            call();
            times[step].push(began.elapsed());
        };
        timed(0, &|| drop(sn.prepare(&key, "base").expect("prepare")));
        timed(1, &|| drop(sn.mounts(&key).expect("mounts")));
        timed(2, &|| sn.commit(&name, &key).expect("commit"));
        timed(3, &|| drop(sn.stat(&name).expect("stat")));
        timed(4, &|| {
            sn.view(&key, &name).expect("view");
            sn.remove(&key).expect("remove");
        });
    }
    (times, count)
}

fn report(who: &str, all: [Vec<Duration>; 5]) {
    for (step, mut times) in STEPS.iter().zip(all) {
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        eprintln!(
            "{who}: {step}: p50 {:?} p99 {:?} max {:?}",
            at(50),
            at(99),
            at(100)
        );
    }
}

#[test]
fn the_admin_socket_answers() {
    let work = Workdir::new();
    let Some(daemon) = start(&work) else { return };
    connect(&daemon).prepare("a", "").expect("prepare");
    let health = get(&daemon, "/healthz");
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let status = get(&daemon, "/v1/status");
    assert!(status.contains("\"drivers\":[\"overlayfs\"]"), "{status}");
    let snapshots = get(&daemon, "/v1/snapshots?snapshotter=overlayfs&limit=5");
    assert!(
        snapshots.contains("\"key\":\"a\"") && snapshots.contains("\"total\":1"),
        "{snapshots}"
    );
    let metrics = get(&daemon, "/metrics");
    assert!(
        metrics.contains("snapshotterd_snapshots{snapshotter=\"overlayfs\",kind=\"active\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("snapshotterd_rpc_duration_seconds_count{method=\"Prepare\"} 1"));
    assert!(get(&daemon, "/nowhere").starts_with("HTTP/1.1 404"));
    assert!(get(&daemon, "/v1/snapshots?limit=x").starts_with("HTTP/1.1 400"));
}

#[test]
fn configuration_commands() {
    let work = Workdir::new();
    let run = |args: &[&str]| {
        Command::new(binary("snapshotterd"))
            .args(args)
            .output()
            .expect("snapshotterd starts")
    };
    let file = work.path().join("c.toml");
    let path = file.display().to_string();
    std::fs::write(&file, "rpc_timeout = \"12s\"\n[log]\nformat = \"json\"\n").expect("a file");
    let checked = run(&["config", "check", "--config", &path]);
    assert!(checked.status.success(), "{checked:?}");
    let dumped = run(&["config", "dump", "--config", &path, "--root", "/elsewhere"]);
    let text = String::from_utf8_lossy(&dumped.stdout);
    assert!(
        text.contains("rpc_timeout = \"12s\"") && text.contains("root = \"/elsewhere\""),
        "{text}"
    );
    std::fs::write(&file, "[log]\nformt = \"json\"\n").expect("a file");
    let refused = run(&["config", "check", "--config", &path]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(
        said.contains(&format!("{path}:2: unknown field `formt`")),
        "{said}"
    );
}

#[test]
fn the_supervisor_is_told() {
    if !machine::is_root() {
        return skip("the daemon needs root");
    }
    let work = Workdir::new();
    let path = work.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    let config = work.path().join("c.toml");
    std::fs::write(&config, CONFIG).expect("a file");
    let mut command = Command::new(binary("snapshotterd"));
    command.arg("--config").arg(config);
    for (flag, name) in [("--root", "r"), ("--state", "s"), ("--lowers", "l")] {
        command.arg(flag).arg(work.path().join(name));
    }
    command.env("NOTIFY_SOCKET", &path);
    let mut daemon =
        suite::process::Process::start("snapshotterd", &mut command, &work.path().join("log"))
            .expect("snapshotterd starts");
    let mut buffer = [0; 256];
    let mut told = || {
        let length = socket.recv(&mut buffer).expect("a message");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert!(told().starts_with("READY=1\n"));
    // READY means that requests are answered.
    let sn = Snapshotter::connect(&work.path().join("s/snapshotterd.sock"), "x");
    assert_eq!(sn.list(&[]).expect("list"), []);
    let ended = daemon.terminate(Duration::from_secs(15)).expect("it ends");
    assert!(ended.success(), "{ended}");
    assert_eq!(told(), "STOPPING=1");
}
