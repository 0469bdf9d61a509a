//! A sample image made of the machine's own files: python3 with its standard library, a shell and
//! a few tools with the libraries they need, padded with the machine's own libraries and data.
//!
//! The result is an OCI image layout with ordinary `tar+gzip` layers.

mod layout;
mod tree;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

pub use layout::{Layout, write_layout};
pub use tree::LayerFiles;

/// The program every sample image runs: imports 20 modules and prints a line.
pub const READY_SCRIPT: &str = "\
import argparse, asyncio, collections, csv, datetime, decimal, email.message, hashlib, http.client, json
import logging, random, re, sqlite3, ssl, statistics, subprocess, unittest, urllib.request, xml.etree.ElementTree
print('ready', flush=True)
";

/// The line that says the workload is ready.
pub const READY_LINE: &str = "ready";

const TOOLS: &[&str] = &[
    "/bin/sh",
    "/usr/bin/cat",
    "/usr/bin/find",
    "/usr/bin/sha256sum",
    "/usr/bin/sort",
    "/usr/bin/xargs",
    "/usr/bin/stat",
    "/usr/bin/sleep",
    "/usr/bin/touch",
    "/usr/bin/dd",
    "/usr/bin/ls",
    "/usr/bin/env",
    "/usr/bin/wc",
    "/usr/bin/head",
    "/usr/bin/cp",
    "/usr/bin/rm",
    "/usr/bin/mkdir",
    "/usr/bin/getfattr",
];

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct SampleOptions {
    /// Uncompressed bytes of file payload to reach by padding.
    pub payload_bytes: u64,
    /// Entries to stay below.
    pub entries: usize,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self {
            payload_bytes: 420 << 20,
            entries: 16_000,
        }
    }
}

/// Builds the image below `dir` and returns its layout. `progress` is called with a line for each
/// step. Deterministic for an unchanged machine.
pub fn build(dir: &Path, options: SampleOptions, progress: &mut dyn FnMut(&str)) -> Result<Layout> {
    let python = Path::new("/usr/bin/python3");
    if !python.exists() {
        bail!("{} is missing: install Debian's python3", python.display());
    }
    let stdlib = python_stdlib(python)?;
    let mut seen = BTreeSet::new();

    progress("collecting a shell, its tools and their libraries");
    let mut base = LayerFiles::new();
    for name in ["bin", "sbin", "lib", "lib64"] {
        // On merged-usr systems these are links; elsewhere they are ordinary directories.
        if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
            base.add_symlink(Path::new(name), &target);
        }
    }
    base.add_directory(Path::new("tmp"), 0o1777);
    base.add_text(
        Path::new("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    );
    base.add_text(Path::new("etc/group"), "root:x:0:\nnogroup:x:65534:\n");
    for name in ["proc", "sys", "dev", "run", "root", "var"] {
        base.add_directory(Path::new(name), 0o755);
    }
    for tool in TOOLS.iter().map(Path::new).filter(|tool| tool.exists()) {
        add_program(&mut base, tool, &mut seen)?;
    }

    progress("collecting python3 and its standard library");
    let mut runtime = LayerFiles::new();
    add_program(&mut runtime, python, &mut seen)?;
    runtime.add_tree(&stdlib, &mut seen, &mut |path| {
        !path
            .components()
            .any(|part| part.as_os_str() == "__pycache__")
    })?;
    for module in extension_modules(&stdlib)? {
        for library in libraries(&module)? {
            add_with_links(&mut runtime, &library, &mut seen)?;
        }
    }

    progress("padding with the machine's own libraries and data");
    let mut padding = LayerFiles::new();
    let have = base.payload_bytes() + runtime.payload_bytes();
    let entries = base.len() + runtime.len();
    pad(
        &mut padding,
        options.payload_bytes.saturating_sub(have),
        options.entries.saturating_sub(entries),
        &mut seen,
    )?;

    let mut app = LayerFiles::new();
    app.add_directory(Path::new("app"), 0o755);
    app.add_text(Path::new("app/ready.py"), READY_SCRIPT);

    write_layout(
        dir,
        &[base, runtime, padding, app],
        &["/usr/bin/python3", "/app/ready.py"],
        progress,
    )
}

fn python_stdlib(python: &Path) -> Result<PathBuf> {
    let output = Command::new(python)
        .args([
            "-I",
            "-c",
            "import sysconfig; print(sysconfig.get_paths()['stdlib'])",
        ])
        .output()
        .context("asking python3 for its library")?;
    let path = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    if !path.join("json").is_dir() {
        bail!(
            "{}: python3's standard library is incomplete; install Debian's python3",
            path.display()
        );
    }
    Ok(path)
}

fn extension_modules(stdlib: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let folder = stdlib.join("lib-dynload");
    if folder.is_dir() {
        for entry in fs::read_dir(&folder)? {
            found.push(entry?.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Shared libraries a program needs, as the dynamic loader finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.lines().filter_map(|line| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        path.starts_with('/')
            .then(|| PathBuf::from(path.split(" (").next().unwrap_or(path)))
    });
    Ok(paths.collect())
}

fn add_program(layer: &mut LayerFiles, program: &Path, seen: &mut BTreeSet<PathBuf>) -> Result<()> {
    add_with_links(layer, program, seen)?;
    for library in libraries(program)? {
        add_with_links(layer, &library, seen)?;
    }
    Ok(())
}

/// Adds `path` and every symbolic link on the way to the real file.
fn add_with_links(layer: &mut LayerFiles, path: &Path, seen: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut at = canonical_parent(path)?;
    for _ in 0..16 {
        layer.add_host(&at, seen)?;
        let Ok(target) = fs::read_link(&at) else {
            return Ok(());
        };
        let parent = at.parent().unwrap_or(Path::new("/"));
        at = canonical_parent(&parent.join(target))?;
    }
    bail!("{}: too many symbolic links", path.display())
}

/// The path with its directory part resolved, the last component as it is.
fn canonical_parent(path: &Path) -> Result<PathBuf> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let name = path
        .file_name()
        .with_context(|| format!("{}: no file name", path.display()))?;
    Ok(fs::canonicalize(parent)
        .with_context(|| parent.display().to_string())?
        .join(name))
}

/// Adds files in an order that looks random but is the same on every run.
fn pad(
    layer: &mut LayerFiles,
    bytes: u64,
    entries: usize,
    seen: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    const LARGEST: u64 = 24 << 20;
    let mut candidates = Vec::new();
    for folder in ["/usr/lib", "/usr/share", "/usr/bin", "/usr/sbin"] {
        tree::files_below(Path::new(folder), &mut |path, meta| {
            if meta.is_file() && meta.len() <= LARGEST && !seen.contains(path) {
                candidates.push((tree::shuffle_key(path), path.to_owned(), meta.len()));
            }
        })?;
    }
    candidates.sort();
    let mut left = bytes;
    // Large files would use the bytes up long before the entries: aim at the wanted mean.
    let mean = bytes / entries.max(1) as u64;
    for (_, path, len) in candidates {
        if left == 0 || layer.len() >= entries {
            break;
        }
        let used = bytes - left;
        let too_large = len > 64 * mean.max(1) && used > mean * layer.len() as u64;
        if !too_large && len <= left {
            layer.add_host(&path, seen)?;
            left -= len;
        }
    }
    Ok(())
}
