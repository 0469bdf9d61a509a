//! Runs a test in a process of its own: in a private mount namespace and under a hard timeout,
//! because a hung FUSE read cannot be ended from within.

use std::{
    env,
    process::{Command, Stdio},
};

const INSIDE: &str = "SNAPSHOTTERD_TEST_INSIDE";

/// Returns true inside the isolated child. In the parent it runs the child, asserts that it
/// succeeded, and returns false: `if !isolate::enter(120) { return }`.
///
/// # Panics
/// When the child fails or needs longer than `seconds`.
pub fn enter(seconds: u32) -> bool {
    let name = std::thread::current()
        .name()
        .expect("tests have named threads")
        .to_owned();
    if env::var_os(INSIDE).is_some_and(|inside| inside == *name) {
        return true;
    }
    let exe = env::current_exe().expect("the test's own path");
    let output = Command::new("timeout")
        .args([
            "-k",
            "5",
            "-s",
            "KILL",
            &seconds.to_string(),
            "unshare",
            "--mount",
            "--propagation",
            "private",
        ])
        .arg(exe)
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &name)
        .stdin(Stdio::null())
        .output()
        .expect("timeout(1) and unshare(1) start");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // What the body printed shows when the test fails, or with --nocapture.
    println!("{}", stdout.replace("test result:", "inside:"));
    eprintln!("{stderr}");
    assert!(
        output.status.success() && stdout.contains("1 passed"),
        "{name} failed in its own process: {} (killed means: longer than {seconds} s)",
        output.status
    );
    false
}
