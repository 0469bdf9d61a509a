//! Tests that cannot run on this machine say so, and are counted.
//!
//! Every crate's tests use it, so it depends on nothing.

use std::{env, fs::OpenOptions, io::Write as _};

/// Says loudly that the running test, or a part of it, cannot run here; the test returns then.
///
/// It appends a line, `CRATE TEST: why`, to the file that `$SNAPSHOTTERD_SKIPS` names, where
/// `./run test` counts the tests.
///
/// # Panics
/// When that file cannot be written: an uncounted skip would look like a passed test.
pub fn skip(why: &str) {
    // The harness names a test's thread after it.
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("test");
    let package = env::var("CARGO_PKG_NAME").unwrap_or_default();
    eprintln!("SKIP: {test}: {why}");
    let Some(path) = env::var_os("SNAPSHOTTERD_SKIPS") else {
        return;
    };
    let why = why.replace('\n', " ");
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("$SNAPSHOTTERD_SKIPS: {}: {error}", path.display()));
    // One write each: tests of several processes append at the same time.
    file.write_all(format!("{package} {test}: {why}\n").as_bytes())
        .unwrap_or_else(|error| panic!("$SNAPSHOTTERD_SKIPS: {}: {error}", path.display()));
}
