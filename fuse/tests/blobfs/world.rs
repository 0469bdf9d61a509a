//! A private place with daemons, holders, mounts and readers, all of them other processes: this
//! one never touches a BlobFs path, so a hang ends with a kill and a failed test.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{ffi::OsStrExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use formats::{
    erofs,
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Regular},
    units::DecodedOffset,
};
use fuse::mounts::{MountInfo, mountinfo};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use skip::skip;
use tempfile::TempDir;

pub(crate) const FIXTURE: &str = env!("CARGO_BIN_EXE_blobfs-fixture");
/// Whatever takes longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct World {
    dir: TempDir,
}

impl World {
    /// `None`, said on stderr, where this machine cannot run such a test.
    pub(crate) fn new(nodes: &Value) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("mounting needs root");
            return None;
        }
        if !Path::new("/dev/fuse").exists() {
            skip("no /dev/fuse");
            return None;
        }
        // Not /tmp: that is often a tmpfs, from which EROFS cannot be mounted.
        let dir = TempDir::new_in("/var/tmp").unwrap();
        let script = json!({ "release": dir.path().join("release"), "nodes": nodes });
        fs::write(dir.path().join("script.json"), script.to_string()).unwrap();
        Some(Self { dir })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn node(&self, number: u64) -> PathBuf {
        self.path("mnt").join(number.to_string())
    }

    /// Lets stalled regions go.
    pub(crate) fn release(&self) {
        fs::write(self.path("release"), b"").unwrap();
    }

    pub(crate) fn spawn_daemon(&self, more: &[&str]) -> Daemon {
        let mut child = Command::new(FIXTURE)
            .arg("serve")
            .arg("--state")
            .arg(self.path("state"))
            .arg("--mount")
            .arg(self.path("mnt"))
            .arg("--script")
            .arg(self.path("script.json"))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Daemon {
            stdin: child.stdin.take().unwrap(),
            child,
            lines,
            ready: Value::Null,
        }
    }

    /// A daemon that serves.
    pub(crate) fn daemon(&self) -> Daemon {
        let mut daemon = self.spawn_daemon(&[]);
        daemon.ready = daemon.answer("ready");
        daemon
    }

    /// A metadata image over a device of `device_len` bytes, with files at (offset, length).
    pub(crate) fn image(&self, name: &str, device_len: u64, files: &[(&str, u64, u64)]) -> PathBuf {
        let mut root = Directory::default();
        let mut inodes = vec![Inode {
            attrs: Attrs::implied_directory(),
            kind: Kind::Directory(Directory::default()),
            nlink: 2,
        }];
        for (file, offset, len) in files {
            let id = InodeId(u32::try_from(inodes.len()).unwrap());
            root.entries.insert(file.as_bytes().to_vec(), id);
            inodes.push(Inode {
                attrs: Attrs {
                    mode: 0o444,
                    ..Attrs::default()
                },
                kind: Kind::Regular(Regular {
                    size: *len,
                    extents: vec![Extent {
                        file_offset: 0,
                        len: *len,
                        decoded: DecodedOffset(*offset),
                    }],
                }),
                nlink: 1,
            });
        }
        inodes[0].kind = Kind::Directory(root);
        let tree = LayerTree::from_inodes(inodes).unwrap();
        let path = self.path(name);
        fs::write(&path, erofs::write(&tree, device_len).unwrap()).unwrap();
        path
    }

    /// Mounts an image with a node as its device; SKIP and false where the kernel cannot.
    pub(crate) fn mount_erofs(&self, image: &Path, node: u64, target: &str) -> bool {
        let target = self.path(target);
        fs::create_dir_all(&target).unwrap();
        let answer = self.helper(&json!({
            "op": "mount_erofs", "metadata": image, "devices": [self.node(node)],
            "target": target, "direct_io": false,
        }));
        let done = answer["result"] == json!("done");
        if !done {
            skip(&format!("no EROFS on FUSE here: {answer}"));
        }
        done
    }

    /// One request to a mount helper process.
    pub(crate) fn helper(&self, operation: &Value) -> Value {
        self.spawn_helper(operation).answer()
    }

    #[expect(clippy::unused_self, reason = "reads as what happens in this world")]
    pub(crate) fn spawn_helper(&self, operation: &Value) -> HelperProcess {
        let mut child = Command::new(FIXTURE)
            .arg("mount-helper")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let request = json!({ "claims": null, "operation": operation }).to_string();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(request.as_bytes()).unwrap();
        drop(stdin);
        HelperProcess(child)
    }

    #[expect(clippy::unused_self, reason = "reads as what happens in this world")]
    pub(crate) fn reader(&self, path: &Path, more: &[&str]) -> Reader {
        let child = Command::new(FIXTURE)
            .arg("read")
            .arg("--path")
            .arg(path)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Reader(Some(child))
    }

    pub(crate) fn mounts(&self) -> Vec<MountInfo> {
        let mut mounts = mountinfo().unwrap();
        mounts.retain(|m| m.target.starts_with(self.dir.path()));
        mounts
    }

    /// The holder of this world, found by the socket only it can have.
    pub(crate) fn holder(&self) -> Option<Pid> {
        let socket = self.path("state").join("holder.sock");
        let pids = fs::read_dir("/proc").unwrap();
        pids.flatten().find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let mut args = line.split(|b| *b == 0);
            let ours = args.nth(1) == Some(b"holder")
                && args.any(|arg| arg == socket.as_os_str().as_bytes());
            ours.then(|| Pid::from_raw(pid)).flatten()
        })
    }

    /// kill -9 of the holder; returns when it is gone.
    pub(crate) fn kill_holder(&self) {
        let Some(pid) = self.holder() else {
            return;
        };
        kill_process(pid, Signal::KILL).unwrap();
        let gone = || self.holder() != Some(pid);
        eventually("the holder dies", gone);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Daemons are gone by now (their handles die first). Without the holder every read that
        // still waits fails; with it, an EROFS superblock could not be torn down.
        if let Some(pid) = self.holder() {
            let _ = kill_process(pid, Signal::KILL);
        }
        for mount in self.mounts().iter().rev() {
            self.helper(&json!({ "op": "umount", "target": mount.target, "lazy": true }));
        }
    }
}

pub(crate) struct Daemon {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    pub(crate) ready: Value,
}

impl Daemon {
    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// The next line that begins with `word`.
    pub(crate) fn answer(&mut self, word: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(word) {
                        return serde_json::from_str(rest).unwrap();
                    }
                }
                Err(e) => {
                    let _ = self.child.kill();
                    let mut stderr = String::new();
                    let pipe = self.child.stderr.take();
                    let _ = pipe.map(|mut pipe| pipe.read_to_string(&mut stderr));
                    let hangs = e == RecvTimeoutError::Timeout;
                    panic!("no {word:?} from the daemon (hangs: {hangs}): {stderr}");
                }
            }
        }
    }

    pub(crate) fn ask(&mut self, command: &str, word: &str) -> Value {
        self.tell(command);
        self.answer(word)
    }

    pub(crate) fn stats(&mut self, field: &str) -> u64 {
        self.ask("stats", "stats")[field].as_u64().unwrap()
    }

    /// kill -9; returns at once, as the next daemon would start.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for an exit and returns status and stderr.
    pub(crate) fn exit(mut self) -> (ExitStatus, String) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let mut stderr = String::new();
                let pipe = self.child.stderr.take();
                let _ = pipe.map(|mut pipe| pipe.read_to_string(&mut stderr));
                return (status, stderr);
            }
            assert!(Instant::now() < until, "the daemon does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A mount helper at work.
pub(crate) struct HelperProcess(Child);

impl HelperProcess {
    pub(crate) fn answer(self) -> Value {
        let (_, output) = finish(self.0, PATIENCE);
        serde_json::from_str(output.trim()).unwrap_or(json!({ "result": "none" }))
    }
}

/// A reading process.
pub(crate) struct Reader(Option<Child>);

impl Reader {
    /// What it saw.
    pub(crate) fn report(mut self) -> Report {
        let child = self.0.take().unwrap();
        let (status, output) = finish(child, Duration::from_mins(1));
        assert!(status.success(), "reader: {status} {output}");
        Report(serde_json::from_str(output.trim()).unwrap())
    }

    pub(crate) fn runs(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_child(self.0.as_ref().unwrap());
        kill_process(pid, signal).unwrap();
    }

    /// SIGKILL, and the proof that it died of it.
    pub(crate) fn dies(mut self) {
        self.signal(Signal::KILL);
        let mut child = self.0.take().unwrap();
        let status = wait(&mut child, PATIENCE).expect("a killed reader does not die");
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = wait(&mut child, Duration::from_secs(5));
        }
    }
}

#[derive(Debug)]
pub(crate) struct Report(pub(crate) Value);

impl Report {
    pub(crate) fn number(&self, field: &str) -> u64 {
        self.0[field].as_u64().unwrap()
    }

    /// No error, no wrong byte.
    #[track_caller]
    pub(crate) fn is_right(&self) -> &Self {
        assert_eq!(self.0["errors"], json!([]), "{:?}", self.0);
        assert_eq!(self.0["wrong"], json!([]), "{:?}", self.0);
        self
    }
}

/// Waits for a condition that must come true.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn finish(mut child: Child, bound: Duration) -> (ExitStatus, String) {
    let mut output = String::new();
    let status = wait(&mut child, bound);
    let Some(status) = status else {
        let _ = child.kill();
        panic!("a process does not end within {bound:?}");
    };
    let pipe = child.stdout.take();
    let _ = pipe.map(|mut pipe| pipe.read_to_string(&mut output));
    (status, output)
}

fn wait(child: &mut Child, bound: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + bound;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}
