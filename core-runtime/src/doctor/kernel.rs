//! Kernel features.

use std::{fs, path::Path};

use super::Check;

const TMPFS: i64 = 0x0102_1994;
const CGROUP2: i64 = 0x6367_7270;

pub(super) fn examine() -> Vec<Check> {
    vec![
        release(),
        fuse(),
        file_system("erofs"),
        file_system("overlay"),
        cgroups(),
    ]
}

fn release() -> Check {
    const NAME: &str = "kernel";
    let text = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    match version(&text) {
        Some(version) if version >= (6, 12) => Check::good(NAME, text),
        Some(_) => Check::bad(
            NAME,
            format!("{text} cannot mount EROFS from a file"),
            "use Linux 6.12 or later (Debian 12: the backports kernel); until then layers are unpacked",
        ),
        None => Check::unknown(NAME, text),
    }
}

pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn fuse() -> Check {
    const NAME: &str = "fuse";
    if Path::new("/dev/fuse").exists() {
        Check::good(NAME, "/dev/fuse is there")
    } else {
        Check::bad(
            NAME,
            "/dev/fuse is missing",
            "load the module: modprobe fuse",
        )
    }
}

fn file_system(name: &'static str) -> Check {
    let listed = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if listed
        .lines()
        .any(|line| line.split_whitespace().last() == Some(name))
    {
        return Check::good(name, "the kernel has it");
    }
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let modules =
        fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    if modules.lines().any(|line| {
        line.split(':')
            .next()
            .is_some_and(|path| path.contains(&format!("/{name}.ko")))
    }) {
        return Check::good(name, "a module that is loaded when needed");
    }
    Check::bad(
        name,
        "the kernel does not have it",
        format!("load the module: modprobe {name}"),
    )
}

fn cgroups() -> Check {
    const NAME: &str = "cgroups";
    let kind = |path: &str| rustix::fs::statfs(path).ok().map(|found| found.f_type);
    match kind("/sys/fs/cgroup") {
        Some(CGROUP2) => Check::good(NAME, "version 2"),
        Some(TMPFS) if kind("/sys/fs/cgroup/unified") == Some(CGROUP2) => Check::warning(
            NAME,
            "hybrid (version 1)",
            "containerd deprecates cgroup version 1: boot with systemd.unified_cgroup_hierarchy=1",
        ),
        Some(TMPFS) => Check::warning(
            NAME,
            "version 1",
            "containerd deprecates cgroup version 1: boot with systemd.unified_cgroup_hierarchy=1",
        ),
        _ => Check::unknown(NAME, "/sys/fs/cgroup is not mounted"),
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(version("6.12.48+deb13-amd64"), Some((6, 12)));
        assert_eq!(version("6.1.0-31-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("weird"), None);
    }
}
