//! Both engines start a process in a root file system made of the machine's own shell.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use core_runtime::{
    process::Process,
    runner::{Container, Engine, Mount, Reexec, exit_code, start},
};
use skip::skip;

fn copy_program(root: &Path, program: &str) {
    let ldd = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(ldd.stdout).unwrap();
    let libraries = text.lines().filter_map(|line| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        path.starts_with('/')
            .then(|| path.split(" (").next().unwrap().to_owned())
    });
    for path in libraries.chain([program.to_owned()]) {
        let target = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&path, target).unwrap();
    }
}

fn run(engine: Engine, args: &[&str], leading_out: bool) -> Option<(u8, String)> {
    if !rustix::process::geteuid().is_root() {
        skip("starting containers needs root");
        return None;
    }
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("lower");
    copy_program(&root, "/bin/sh");
    copy_program(&root, "/bin/cat");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), "web:x:33:34::/:/bin/sh\n").unwrap();
    // An image that points a mount point out of the root must not reach the host.
    if leading_out {
        std::os::unix::fs::symlink(work.path().join("outside"), root.join("sys")).unwrap();
    }
    for name in ["upper", "work", "bundle", "bound"] {
        fs::create_dir(work.path().join(name)).unwrap();
    }
    fs::write(work.path().join("bound/file"), "bound").unwrap();
    let options = ["lowerdir", "upperdir", "workdir"]
        .iter()
        .zip(["lower", "upper", "work"])
        .map(|(option, dir)| format!("{option}={}", work.path().join(dir).display()));
    let container = Container {
        id: format!("test-{}", std::process::id()),
        bundle: work.path().join("bundle"),
        mounts: vec![Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: options.collect(),
        }],
        process: Process {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: vec!["PATH=/usr/bin:/bin".into(), "GREETING=hello".into()],
            cwd: "/".into(),
            user: "web".into(),
        },
        hostname: "inside".into(),
        binds: vec![(work.path().join("bound"), PathBuf::from("/bound"), true)],
        engine,
    };
    let reexec = Reexec {
        program: env!("CARGO_BIN_EXE_snapctl").into(),
        args: vec!["stage".into()],
    };
    let mut running = start(&container, &reexec, Stdio::piped()).unwrap();
    let mut output = String::new();
    std::io::Read::read_to_string(&mut running.take_stdout().unwrap(), &mut output).unwrap();
    let status = running.wait().unwrap();
    assert!(
        !work.path().join("outside").exists(),
        "a symbolic link of the image led out"
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(work.path().to_str().unwrap()),
        "something stayed mounted"
    );
    Some((exit_code(status), output))
}

const SCRIPT: &str = "echo $GREETING $$; cat /proc/sys/kernel/hostname; cat /bound/file; \
    (echo x > /bound/new) 2>/dev/null || echo read-only; echo x > /dev/null; while read k v; do case $k in Uid:|Gid:|NoNewPrivs:) echo $k $v;; esac; \
    done < /proc/self/status; exit 7";

#[test]
fn embedded_engine_runs_the_program_in_its_own_world() {
    let Some((code, output)) = run(Engine::Embedded, &["sh", "-c", SCRIPT], false) else {
        return;
    };
    assert_eq!(code, 7, "{output}");
    assert!(
        output.starts_with("hello 1\ninside\nboundread-only\n"),
        "{output}"
    );
    assert!(
        output.contains("Uid: 33 33 33 33") || output.contains("Uid: 33\t33"),
        "{output}"
    );
}

#[test]
fn an_image_whose_links_lead_out_is_refused_and_touches_nothing() {
    let Some((code, _)) = run(Engine::Embedded, &["sh", "-c", "exit 0"], true) else {
        return;
    };
    assert_eq!(code, 125);
}

#[test]
fn a_program_that_does_not_exist_is_an_error_that_names_it() {
    let Some((code, _)) = run(Engine::Embedded, &["/no/such/program"], false) else {
        return;
    };
    assert_eq!(code, 125);
}

#[test]
fn installed_oci_runtime_runs_the_program() {
    let cached = std::env::var_os("SNAPSHOTTERD_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/snapshotterd")))
        .map(|cache| cache.join("debs/runc/usr/sbin/runc"))
        .filter(|path| path.exists());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let engine = match (Engine::detect(&path), cached) {
        (Engine::Oci(program), _) | (Engine::Embedded, Some(program)) => Engine::Oci(program),
        (Engine::Embedded, None) => return skip("no runc, crun or youki here"),
    };
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounted.contains(" - cgroup") {
        return skip("no cgroup hierarchy is mounted: runc cannot start containers");
    }
    let script = "echo $GREETING $$; cat /bound/file; exit 7";
    let Some((code, output)) = run(engine, &["sh", "-c", script], false) else {
        return;
    };
    assert_eq!((code, output.as_str()), (7, "hello 1\nbound"));
}
