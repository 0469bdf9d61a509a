//! Pulling images by containerd, and looking at what came.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::mount::{UnmountFlags, unmount};

use crate::{
    containerd::{Containerd, Line},
    listing::{self, Listing},
};

impl Containerd {
    /// `ctr images pull`; on 2.x through the transfer service, which is lazy where the snapshotter is.
    ///
    /// # Panics
    /// When it fails.
    pub fn pull(&self, reference: &str, snapshotter: &str) {
        let pull = ["images", "pull", "--plain-http"];
        self.ctr([&pull[..], &["--snapshotter", snapshotter, reference]].concat());
    }

    /// As [`Self::pull`], but so that 1.6 is lazy too: by upstream's `ctr-remote images rpull`.
    ///
    /// # Panics
    /// When it fails, or ctr-remote is needed and missing.
    pub fn pull_lazily(&self, reference: &str, snapshotter: &str) {
        if self.line() != Line::V1_6 {
            return self.pull(reference, snapshotter);
        }
        let pull = ["images", "rpull", "--plain-http"];
        let output = self
            .ctr_remote([&pull[..], &["--snapshotter", snapshotter, reference]].concat())
            .expect("ctr-remote (tests/peers/debs unpacks it)");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rpull {reference}: {error}");
    }

    /// Runs a container of an image until it ends, and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, reference: &str, snapshotter: &str) -> String {
        static SEQUENCE: AtomicU64 = AtomicU64::new(1);
        let mut args = ["run", "--rm", "--snapshotter", snapshotter]
            .map(String::from)
            .to_vec();
        args.extend(self.run_flags());
        // runc keeps its state by name, outside of the private directories.
        let number = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let name = format!("run-{number}-{}", std::process::id());
        args.extend([reference.to_owned(), name]);
        self.ctr(args)
    }

    /// Every name and attribute below the snapshot `chain` of a snapshotter.
    ///
    /// # Panics
    /// As [`Self::look`], or when the tree cannot be read.
    pub fn list(&self, chain: &str, snapshotter: &str, target: &Path) -> Listing {
        let list = |root: &Path| listing::list(root).expect("a readable tree");
        self.look("view", chain, snapshotter, target, list)
    }

    /// Makes a snapshot on `chain` (`kind`: `view`, or `prepare` for a writable one), mounts it at
    /// `target` as containerd is told to, and looks at it. (`ctr images mount` of 1.6 ignores the
    /// snapshotter that it is given.)
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn look<T>(
        &self,
        kind: &str,
        chain: &str,
        snapshotter: &str,
        target: &Path,
        look: impl FnOnce(&Path) -> T,
    ) -> T {
        static SEQUENCE: AtomicU64 = AtomicU64::new(1);
        let name = format!("look-{}", SEQUENCE.fetch_add(1, Ordering::Relaxed));
        let snapshots = ["snapshots", "--snapshotter", snapshotter];
        // Nothing refers to the snapshot until it has the label: the garbage collector of the pull
        // that has just ended may be quicker, so it is made again.
        let labelled = (0..20).any(|_| {
            let succeeds = |args: &[&str]| {
                let output = self.ctr_within(60, snapshots.iter().chain(args));
                if !output.status.success() {
                    eprintln!("ctr {args:?}: {}", String::from_utf8_lossy(&output.stderr));
                }
                output.status.success()
            };
            succeeds(&[kind, &name, chain])
                && succeeds(&["label", &name, "containerd.io/gc.root=test"])
        });
        assert!(labelled, "{name} is taken away again and again");
        let path = target.display().to_string();
        let command = self.ctr(snapshots.iter().chain(&["mounts", &path, &name]));
        std::fs::create_dir_all(target).expect("a mount point");
        // Newer mount(8) passes each option by fsconfig(2), which takes 255 bytes.
        let mounted = Command::new("sh")
            .args(["-c", &command])
            .env("LIBMOUNT_FORCE_MOUNT2", "always")
            .output();
        let mounted = mounted.expect("sh(1) starts");
        let error = String::from_utf8_lossy(&mounted.stderr);
        assert!(mounted.status.success(), "{command}: {error}");
        let found = look(target);
        unmount(target, UnmountFlags::empty()).expect("nobody uses the mount any more");
        self.ctr(snapshots.iter().chain(&["rm", &name]));
        found
    }
}
