//! What an image of many layers costs inside the snapshotter's requests.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use benches::{
    client, containerd,
    sample::{LayerFiles, write_layout},
};
use clap::Parser;
use formats::digest::Digest;
use harness::{
    containerd::{Containerd, Line, PLUGIN},
    daemon::Daemon,
    machine::binary,
    workdir::Workdir,
};
use lab::{Lab, LabOptions, LinkModel, LogEntry};

/// Pull an image of many layers through containerd 2.4.2 and print where the time went: inside
/// snapshotterd's requests, and in containerd itself. The layers have no start list and hydration
/// is off, so that nothing but what a mount needs crosses the link.
///
/// The bound: the time inside all requests together is at most the slowest layer's (from asking for
/// its index until it can be mounted, all layers at once) plus two round trips.
#[derive(Debug, Parser)]
#[command(
    name = "many-layers",
    max_term_width = 100,
    after_help = "Examples:\n  many-layers\n  many-layers --layers 120 --links wan --rounds 5"
)]
struct Options {
    /// Layers of the image.
    #[arg(long, default_value_t = 40)]
    layers: usize,
    /// Files of each layer.
    #[arg(long, default_value_t = 100)]
    files: usize,
    /// Links to measure.
    #[arg(long, value_delimiter = ',', default_values = ["wan", "cloud"])]
    links: Vec<LinkModel>,
    /// Rounds on each link, on fresh directories.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where temporary files go.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Fail when the bound is missed.
    #[arg(long)]
    strict: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(why) = Line::V2_4.missing() {
        bail!("this benchmark needs containerd 2.4.2: {why}");
    }
    let work = Workdir::below(&options.scratch);
    let lab = Lab::start_blocking(LabOptions::new(work.sub("registry")))?;
    let image = format!("{}/many/layers:1", lab.host());
    push(&work.sub("image"), &options, &image)?;
    println!(
        "image of {} layers, {} files each; containerd {}; time in seconds",
        options.layers,
        options.files,
        Line::V2_4.version()
    );
    println!(
        "{:26} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}  {:6} HTTP requests per layer",
        "link", "pull", "requests", "bound", "slowest", "(wire)", "mount", "containerd", ""
    );
    let mut missed = 0;
    for link in &options.links {
        for _ in 0..options.rounds {
            let pull = measure(&options.scratch, &lab, &image, *link)?;
            let bound = pull.slowest_layer + 2.0 * link.rtt.as_secs_f64();
            let met = pull.inside() <= bound;
            missed += usize::from(!met);
            println!(
                "{:26} {:6.2} {:9.3} {bound:9.3} {:9.3} {:9.3} {:9.3} {:11.3}  {:6} {:.2} (max {})",
                link.to_string(),
                pull.seconds,
                pull.inside(),
                pull.slowest_layer,
                pull.slowest_on_wire,
                pull.mount_seconds,
                pull.seconds - pull.inside(),
                if met { "met" } else { "MISSED" },
                pull.blob_requests as f64 / options.layers as f64,
                pull.most_requests,
            );
            let longest = pull.requests.iter().map(|(method, answered)| {
                format!("{method} {} in {:.3}", answered.count, answered.seconds)
            });
            eprintln!("many-layers: {}", longest.collect::<Vec<_>>().join(", "));
        }
    }
    println!(
        "pull: `ctr images pull`, until the last layer is there; requests: time inside snapshotterd, summed over\n\
         all requests; slowest: the layer that took longest, (wire): as the registry saw it, from its first request\n\
         to its last byte; mount: `ctr images mount` of the whole chain; containerd: the pull without the requests"
    );
    if options.strict && missed > 0 {
        bail!("the bound is missed {missed} times");
    }
    Ok(())
}

struct Pull {
    seconds: f64,
    mount_seconds: f64,
    slowest_layer: f64,
    slowest_on_wire: f64,
    requests: BTreeMap<String, client::Answered>,
    blob_requests: usize,
    most_requests: usize,
}

impl Pull {
    /// Seconds inside the snapshotter.
    fn inside(&self) -> f64 {
        self.requests
            .values()
            .map(|answered| answered.seconds)
            .sum()
    }
}

fn measure(scratch: &Path, lab: &Lab, image: &str, link: LinkModel) -> Result<Pull> {
    let work = Workdir::below(scratch);
    let config = format!(
        "[lazy]\nhydration = \"off\"\n[containerd]\naddress = {:?}\n",
        work.path().join("c/c.sock").display().to_string()
    );
    let daemon = Daemon::start(&work.sub("d"), &config);
    let setup = containerd::tuned(Line::V2_4, &work, Some(&daemon));
    let containerd = Containerd::start(&work.sub("c"), setup);
    client::wait_until_settled(&daemon.admin())?;
    let earlier = client::requests(&daemon.admin())?;
    lab.set_link(Some(link));
    let mark = lab.log().mark();
    let seconds = containerd::pull(&containerd, PLUGIN, image)?;
    lab.set_link(None);
    let mut requests = client::requests(&daemon.admin())?;
    for (method, before) in earlier {
        let now = requests.entry(method).or_default();
        now.count -= before.count;
        now.seconds -= before.seconds;
    }
    requests.retain(|_, answered| answered.count > 0.0);
    let known = client::lazy_layers(&daemon.admin())?;
    let layers = layer_requests(&known, &lab.log().entries_since(&mark))?;
    let slowest_ms = known
        .iter()
        .filter_map(|layer| layer["resolve_ms"].as_f64())
        .fold(0.0, f64::max);

    let target = work.sub("mounted").display().to_string();
    let started = Instant::now();
    containerd.ctr(["images", "mount", "--snapshotter", PLUGIN, image, &target]);
    let mount_seconds = started.elapsed().as_secs_f64();
    containerd.ctr([
        "images",
        "unmount",
        "--rm",
        "--snapshotter",
        PLUGIN,
        &target,
    ]);
    Ok(Pull {
        seconds,
        mount_seconds,
        slowest_layer: slowest_ms / 1e3,
        slowest_on_wire: layers
            .values()
            .map(LayerRequests::seconds)
            .fold(0.0, f64::max),
        requests,
        blob_requests: layers.values().map(|layer| layer.requests).sum(),
        most_requests: layers
            .values()
            .map(|layer| layer.requests)
            .max()
            .unwrap_or(0),
    })
}

/// One layer, as the registry saw it.
struct LayerRequests {
    requests: usize,
    first_ms: f64,
    last_ms: f64,
}

impl LayerRequests {
    fn seconds(&self) -> f64 {
        (self.last_ms - self.first_ms) / 1e3
    }
}

fn layer_requests(
    layers: &[serde_json::Value],
    entries: &[LogEntry],
) -> Result<BTreeMap<Digest, LayerRequests>> {
    let mut seen = BTreeMap::new();
    for layer in layers {
        let digest: Digest = layer["digest"]
            .as_str()
            .context("a layer's digest")?
            .parse()?;
        let of_layer = |entry: &&LogEntry| entry.digest == Some(digest);
        let times = entries.iter().filter(of_layer).map(|entry| {
            (
                entry.time_ms,
                entry.time_ms + entry.duration_ms.unwrap_or(0.0),
            )
        });
        let (first, last) = times.fold((f64::INFINITY, 0.0_f64), |(first, last), (from, to)| {
            (first.min(from), last.max(to))
        });
        let requests = entries.iter().filter(of_layer).count();
        if requests == 0 {
            bail!("layer {digest} came without a request");
        }
        seen.insert(
            digest,
            LayerRequests {
                requests,
                first_ms: first,
                last_ms: last,
            },
        );
    }
    Ok(seen)
}

/// Text that hardly compresses: hexadecimal digits of hashes.
fn incompressible(layer: &str, file: usize, len: usize) -> String {
    let mut text = String::with_capacity(len + 64);
    while text.len() < len {
        let seed = format!("{layer}/{file}/{}", text.len());
        text.push_str(&Digest::of(seed.as_bytes()).hex());
    }
    text
}

/// Builds the image, each layer with files of its own and one that all of them change.
fn push(dir: &Path, options: &Options, image: &str) -> Result<()> {
    let layers: Vec<LayerFiles> = (0..options.layers)
        .map(|layer| {
            let mut files = LayerFiles::new();
            let own = format!("layer-{layer:03}");
            files.add_directory(Path::new(&own), 0o755);
            files.add_text(Path::new("changed-by-all"), &own);
            for file in 0..options.files {
                let text = incompressible(&own, file, 4096 + file * 977 % 24_576);
                files.add_text(Path::new(&format!("{own}/{file:05}")), &text);
            }
            files
        })
        .collect();
    let layout = write_layout(dir, &layers, &["/none"], &mut |_| {})?;
    let output = Command::new(binary("snapctl"))
        .args([
            "image",
            "convert",
            &format!("oci:{}", layout.dir.display()),
            image,
        ])
        .output()
        .context("snapctl")?;
    if !output.status.success() {
        bail!(
            "snapctl image convert: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
