//! The demo: one image, started three ways over a slow link.
//!
//! Needs no containerd: `snapctl run` is the client of the daemon's snapshots service. Every row
//! starts a fresh daemon on fresh directories, so that nothing is local before it.

mod rows;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use lab::{Lab, LabOptions, LinkModel};

use crate::sample::{self, Layout, SampleOptions};

pub use rows::{Figures, Way};

/// What the demo does.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// The link between registry and node.
    pub link: LinkModel,
    /// Size of the sample image.
    pub sample: SampleOptions,
    /// Where temporary files go.
    pub scratch: PathBuf,
}

/// Prints steps as they are done and knows whether to stop.
#[derive(Clone, Debug)]
pub struct Talk {
    stop: Arc<AtomicBool>,
}

impl Talk {
    /// Stops at the next step once `stop` is set (by Ctrl-C).
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Self { stop }
    }

    /// Says what is being done; fails when the user wants to stop.
    pub fn step(&self, text: &str) -> Result<()> {
        self.check()?;
        eprintln!("demo: {text}");
        Ok(())
    }

    /// Fails when the user wants to stop.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("stopped by Ctrl-C; everything the demo made is removed");
        }
        Ok(())
    }
}

/// Prepares the images, runs every way, and returns its figures.
pub fn run(options: &DemoOptions, talk: &Talk) -> Result<Vec<Figures>> {
    let work = harness::workdir::Workdir::below(&options.scratch);
    let refused = lazy_refusal();
    talk.step("starting our own registry on loopback")?;
    let registry =
        Lab::start_blocking(LabOptions::new(work.sub("registry"))).context("the registry")?;

    talk.step("building a sample image from this machine's files")?;
    let layout = sample::build(&work.sub("image"), options.sample, &mut |line| {
        let _ = talk.step(&format!("  {line}"));
    })?;
    talk.check()?;
    talk.step(&format!(
        "the image has {} entries and {:.0} MB compressed",
        layout.entries,
        layout.compressed_bytes as f64 / 1e6
    ))?;
    let images = prepare(&work, &registry, &layout, refused.is_none(), talk)?;

    let mut figures = Vec::new();
    registry.set_link(Some(options.link));
    for (way, image) in images {
        talk.step(&format!("starting a container: {}", way.describe()))?;
        figures.push(rows::measure(way, &image, &work, &registry, talk)?);
    }
    if let Some(why) = refused {
        eprintln!("demo: only the full pull is shown: {why}");
    }
    Ok(figures)
}

/// Why this kernel cannot show a layer before it is local, if so.
fn lazy_refusal() -> Option<String> {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 12) {
        return Some(format!(
            "Linux {release} cannot mount EROFS from a file; 6.12 or later can"
        ));
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse (modprobe fuse)".into());
    }
    None
}

/// Pushes the image as it is and as eStargz, records a start, pushes the optimised image.
fn prepare(
    work: &harness::workdir::Workdir,
    registry: &Lab,
    layout: &Layout,
    lazy: bool,
    talk: &Talk,
) -> Result<Vec<(Way, String)>> {
    let host = registry.host();
    let source = format!("oci:{}", layout.dir.display());
    let scratch = work.sub("scratch");
    let scratch = scratch.to_string_lossy();
    let named = |tag: &str| format!("{host}/sample:{tag}");
    talk.step("pushing it as an ordinary image")?;
    let command = ["image", "copy", "--scratch", &scratch];
    snapctl(&[&command[..], &[&source, &named("plain")]].concat(), talk)?;
    let mut images = vec![(Way::Eager, named("plain"))];
    if lazy {
        talk.step("converting it to eStargz and pushing that")?;
        let command = ["image", "convert", "--scratch", &scratch];
        snapctl(&[&command[..], &[&source, &named("esgz")]].concat(), talk)?;
        talk.step("running it once to record which files its start reads")?;
        let record = work.path().join("record.json");
        let record = record.to_string_lossy();
        snapctl(
            &[
                "image",
                "record",
                &source,
                "--until-line",
                sample::READY_LINE,
                "--out",
                &record,
            ],
            talk,
        )?;
        talk.step("converting it with those files placed first, and pushing that")?;
        snapctl(
            &[
                "image",
                "convert",
                "--scratch",
                &scratch,
                "--record",
                &record,
                &source,
                &named("optimised"),
            ],
            talk,
        )?;
        images.push((Way::Lazy, named("esgz")));
        images.push((Way::Optimised, named("optimised")));
    }
    Ok(images)
}

fn snapctl(args: &[&str], talk: &Talk) -> Result<()> {
    talk.check()?;
    let output = Command::new(harness::machine::binary("snapctl"))
        .args(args)
        .output()
        .context("snapctl")?;
    talk.check()?;
    if !output.status.success() {
        bail!(
            "snapctl {}:\n{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
