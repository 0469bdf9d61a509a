//! The process that unpacks: it mounts the snapshot in a mount namespace of its own and makes it
//! its root, so that nothing stays mounted and no path leads out.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};
use formats::{digest::Digest, gzip, limits::Limits, oci::Compression};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::Unpacker;
use crate::runner::{Mount, Reexec, mount_privately};

/// Name of the stage on the command line.
pub const STAGE: &str = "unpack";

#[derive(Debug, Serialize, Deserialize)]
struct Job {
    mounts: Vec<Mount>,
    root: PathBuf,
    gzip: bool,
    file: PathBuf,
}

/// Unpacks `file` into a snapshot's mounts; returns the digest of its tar.
pub async fn in_child(
    reexec: &Reexec,
    work: &Path,
    mounts: Vec<Mount>,
    compression: Compression,
    file: &Path,
) -> Result<Digest> {
    let root = work.join("root");
    std::fs::create_dir(&root).context("making the mount point")?;
    let job = Job {
        mounts,
        root,
        gzip: compression == Compression::Gzip,
        file: file.to_owned(),
    };
    let path = work.join("unpack.json");
    std::fs::write(&path, serde_json::to_vec(&job)?).context("describing the unpack")?;
    let output = Command::new(&reexec.program)
        .args(&reexec.args)
        .arg(STAGE)
        .arg(&path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .context("starting the unpacking process")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}

/// Body of the stage.
pub fn run_stage(path: &Path) -> ExitCode {
    match unpack(path) {
        Ok(digest) => {
            let _ = writeln!(io::stdout(), "{digest}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn unpack(path: &Path) -> Result<Digest> {
    let job: Job = serde_json::from_slice(&std::fs::read(path)?)?;
    let mut file = File::open(&job.file).with_context(|| job.file.display().to_string())?;
    mount_privately(&job.mounts, &job.root)?;
    rustix::process::chroot(&job.root).context("chroot")?;
    std::env::set_current_dir("/").context("entering the snapshot")?;

    let limits = Limits::default();
    let mut unpacker = Unpacker::new(limits);
    let mut input = vec![0; 1 << 18];
    let mut inflater = job
        .gzip
        .then(|| gzip::Inflater::new(limits.max_decoded_bytes));
    loop {
        let length = file.read(&mut input).context("reading the layer")?;
        if length == 0 {
            break;
        }
        match &mut inflater {
            Some(inflater) => {
                // The sink cannot fail, so the first failure is kept and the rest dropped.
                let mut result = Ok(());
                inflater.push(&input[..length], &mut |bytes| {
                    if result.is_ok() {
                        result = unpacker.push(bytes);
                    }
                })?;
                result?;
            }
            None => unpacker.push(&input[..length])?,
        }
    }
    if let Some(inflater) = inflater {
        inflater.finish()?;
    }
    Ok(unpacker.finish()?)
}
