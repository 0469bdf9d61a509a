//! What this machine has: binaries of this build, privately unpacked programs.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Whether the process is root, which everything that mounts needs.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A binary of this workspace: `snapshotterd`, `snapctl`, `lab-registry`.
///
/// # Panics
/// When it has not been built (`cargo build --workspace --bins`).
pub fn binary(name: &str) -> PathBuf {
    let given = env::var_os("SNAPSHOTTERD_BIN_DIR").map(PathBuf::from);
    let exe = env::current_exe().expect("this program's own path");
    // A binary lies in target/PROFILE, a test or an example one folder deeper.
    let near = exe.ancestors().skip(1).take(2).map(Path::to_owned);
    let found = given
        .into_iter()
        .chain(near)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run `cargo build --workspace --bins` first")
    })
}

/// Where downloads and builds of real components are kept (`$SNAPSHOTTERD_CACHE`).
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = env::var_os("SNAPSHOTTERD_CACHE") {
        return dir.into();
    }
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            Path::new(&env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache")
        });
    base.join("snapshotterd")
}

/// A program from a privately unpacked Debian package (`tests/peers/debs`), e.g.
/// `("runc", "usr/sbin/runc")`.
pub fn deb_program(package: &str, path: &str) -> Option<PathBuf> {
    let path = cache_dir().join("debs").join(package).join(path);
    path.exists().then_some(path)
}

/// A program on `PATH`.
pub fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// runc: the machine's own or the unpacked one.
pub fn runc() -> Option<PathBuf> {
    on_path("runc").or_else(|| deb_program("runc", "usr/sbin/runc"))
}

/// Whether a cgroup hierarchy is mounted here: runc starts nothing without one, and folders that
/// one enters by chroot(8) often have none.
pub fn has_cgroups() -> bool {
    mountinfo_has_cgroups(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

fn mountinfo_has_cgroups(mountinfo: &str) -> bool {
    mountinfo
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .any(|(_, rest)| rest.starts_with("cgroup ") || rest.starts_with("cgroup2 "))
}

/// The third-party image fixtures, never part of this repository.
pub fn fixtures() -> Option<PathBuf> {
    let dir = env::var_os("SNAPSHOTTERD_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"),
        PathBuf::from,
    );
    dir.is_dir().then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_told_by_their_type() {
        let both = "31 24 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
                    29 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n";
        assert!(mountinfo_has_cgroups(both));
        let none = "24 1 0:22 / /sys rw shared:7 - sysfs sysfs rw\n\
                    29 24 0:26 / /sys/fs/cgroup rw - tmpfs cgroup rw\n";
        assert!(!mountinfo_has_cgroups(none));
    }
}
