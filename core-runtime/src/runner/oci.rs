//! Runs a container with an installed OCI runtime.

use std::{io, path::Path, process::Command};

use serde_json::{Value, json};

use super::{Container, RunError, exit_code};

/// Capabilities that container engines grant by default.
pub(super) const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

pub(super) fn run(program: &Path, container: &Container, rootfs: &Path) -> Result<u8, RunError> {
    let bundle = &container.bundle;
    let spec = spec(container, rootfs)?;
    let path = bundle.join("config.json");
    let bytes = serde_json::to_vec_pretty(&spec)
        .map_err(io::Error::from)
        .map_err(RunError::step("writing the spec"))?;
    std::fs::write(&path, bytes).map_err(RunError::step(format!("writing {}", path.display())))?;
    let status = Command::new(program)
        .arg("--root")
        .arg(bundle.join("runtime"))
        .arg("run")
        .arg("--bundle")
        .arg(bundle)
        .arg(&container.id)
        .status()
        .map_err(RunError::step(format!("starting {}", program.display())))?;
    Ok(exit_code(status))
}

fn spec(container: &Container, rootfs: &Path) -> Result<Value, RunError> {
    let process = &container.process;
    let ids = process.credentials(rootfs)?;
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
               "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
    ];
    for (from, to, read_only) in &container.binds {
        let mode = if *read_only { "ro" } else { "rw" };
        mounts.push(
            json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", mode]}),
        );
    }
    Ok(json!({
        // The oldest version every runtime in use accepts; nothing newer is asked for.
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": ids.uid, "gid": ids.gid, "additionalGids": ids.groups},
            "args": process.args,
            "env": process.env,
            "cwd": process.cwd,
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
            "noNewPrivileges": true,
        },
        "root": {"path": rootfs, "readonly": false},
        "hostname": container.hostname,
        "mounts": mounts,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))
}
