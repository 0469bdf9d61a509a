//! Measures the cache on a real layer: `cache_bench LAYER.tar [DIR]`.
//!
//! The tar is converted to eStargz (kept in DIR), served by the lab registry in this process over
//! shaped links, and read through the registry client and the cache. Prints
//!
//! 1. what a hit costs,
//! 2. decode throughput of one thread, and of the ordered pass,
//! 3. cold sequential reads against the line rate,
//! 4. a cold start of an optimised layer: the files it names, in order,
//! 5. cold scattered reads of small files, one after the other, with hydration behind them.
//!
//! `CACHE_BENCH_LOG=1` prints every request; `CACHE_BENCH_BUSY_KIB` and `CACHE_BENCH_WINDOW_KIB` set
//! what hydration may have outstanding while readers are active, and the windows of readers'
//! requests.
//!
//! CPU seconds include the lab's (same process) in 3 to 5, not in 1 and 2.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use formats::{
    digest::Digest,
    limits::Limits,
    stargz::{
        Built, MAX_FOOTER_LEN, StargzLayer, StartList, WriterOptions, build, inflate_toc,
        parse_footer, parse_toc,
    },
    tree::{InodeId, Kind},
};
use lab::{Lab, LabOptions, LinkModel};
use storage::{
    cache::{CacheOptions, LayerBlob, Scheduler, SchedulerOptions, Wire, WireOptions},
    hydrate::{HydrateOptions, Mode, StargzProof},
    ranges::{FileSource, RangeSource},
    registry::{ClientOptions, RegistryClient, Repository},
    source::{BlobSource as _, Cause, ReadNow},
};

const READ: usize = 128 << 10;

struct Layer {
    path: PathBuf,
    digest: Digest,
    diff_id: Digest,
    len: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let tar = args.next().context("usage: cache_bench LAYER.tar [DIR]")?;
    let dir = args.next().unwrap_or_else(std::env::temp_dir);
    let layer = prepare(&tar, &dir, "plain", Vec::new())?;
    let (hot, paths) = hot_files(&layer)?;
    let optimised = prepare(&tar, &dir, "optimised", paths)?;
    println!("layer: {:.1} MB compressed", mb(layer.len));
    local(&layer).await?;
    for (name, link) in [("wan", LinkModel::wan()), ("cloud", LinkModel::cloud())] {
        sequential(&layer, name, link).await?;
        start_list(&optimised, hot, name, link).await?;
        scattered(&layer, name, link, Mode::Off).await?;
        scattered(&layer, name, link, Mode::Full).await?;
    }
    Ok(())
}

/// 600 files spread over the layer: their bytes, and their paths.
fn hot_files(layer: &Layer) -> Result<(u64, Vec<Vec<u8>>)> {
    let tree = parse_file(layer)?.tree;
    let files: Vec<_> = (0..tree.inodes().len())
        .map(|id| InodeId(u32::try_from(id).unwrap_or(u32::MAX)))
        .filter_map(|id| match &tree.inode(id).kind {
            Kind::Regular(file) if (1..200_000).contains(&file.size) => Some((id, file.size)),
            _ => None,
        })
        .collect();
    let mut bytes = 0;
    let mut paths = Vec::new();
    for step in 0..600 {
        let (id, size) = files[step * 7_919 % files.len()];
        bytes += size;
        paths.extend(tree.path(id).map(|path| path.as_bytes().to_vec()));
    }
    Ok((bytes, paths))
}

fn parse_file(layer: &Layer) -> Result<StargzLayer> {
    let blob = fs::read(&layer.path)?;
    let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let tail = &blob[blob.len() - at(MAX_FOOTER_LEN)..];
    let footer = parse_footer(tail, layer.len)?;
    let toc = footer.toc_range(layer.len);
    let json = inflate_toc(&blob[at(toc.start)..at(toc.end)], &Limits::default())?;
    Ok(parse_toc(&json, footer.toc_offset, &Limits::default())?)
}

fn prepare(tar: &Path, dir: &Path, kind: &str, prioritized: Vec<Vec<u8>>) -> Result<Layer> {
    let blob = dir.join(format!("cache_bench-{kind}.esgz"));
    let notes = dir.join(format!("cache_bench-{kind}.txt"));
    if !blob.exists() || !notes.exists() {
        let out = BufWriter::new(File::create(&blob)?);
        let options = WriterOptions {
            level: 6,
            prioritized,
            ..WriterOptions::default()
        };
        let tar = BufReader::new(File::open(tar)?);
        let built: Built = build(tar, out, &options, &Limits::default())?;
        fs::write(
            &notes,
            format!("{}\n{}\n", built.blob_digest, built.diff_id),
        )?;
    }
    let text = fs::read_to_string(&notes)?;
    let mut lines = text.lines().map(str::parse);
    let (Some(digest), Some(diff_id)) = (lines.next(), lines.next()) else {
        bail!("{} is damaged: remove it", notes.display());
    };
    Ok(Layer {
        len: fs::metadata(&blob)?.len(),
        path: blob,
        digest: digest?,
        diff_id: diff_id?,
    })
}

struct Opened {
    layer: Arc<StargzLayer>,
    blob: Arc<LayerBlob>,
    _dir: tempfile::TempDir,
}

async fn open(source: Arc<dyn RangeSource>, identity: Digest) -> Result<Opened> {
    let dir = tempfile::tempdir()?;
    let mut limits = SchedulerOptions::default();
    let mut cache = CacheOptions::default();
    if let Some(bytes) = knob("CACHE_BENCH_BUSY_KIB")? {
        limits.hydration_busy_bytes = bytes << 10;
    }
    if let Some(bytes) = knob("CACHE_BENCH_WINDOW_KIB")? {
        cache.plan.window_bytes = Some(bytes << 10);
    }
    let scheduler = Scheduler::new(tokio::runtime::Handle::current(), limits);
    let options = WireOptions {
        dir: dir.path().to_owned(),
        identity,
        name: "bench layer".to_owned(),
    };
    let wire = Wire::open(options, source, scheduler)?;
    let toc = wire.fetch_index(&Limits::default()).await?;
    let layer = Arc::new(parse_toc(&toc.json, toc.toc_offset, &Limits::default())?);
    let map = Arc::new(layer.map.clone());
    let blob = LayerBlob::open(wire, map, cache)?;
    Ok(Opened {
        layer,
        blob,
        _dir: dir,
    })
}

fn knob(name: &str) -> Result<Option<u64>> {
    Ok(std::env::var(name)
        .ok()
        .map(|text| text.parse())
        .transpose()?)
}

async fn read(blob: &Arc<LayerBlob>, offset: u64, buf: &mut [u8]) -> Result<usize> {
    loop {
        match blob.try_read(offset, buf)? {
            ReadNow::Ready(n) => return Ok(n),
            ReadNow::Pending => {
                let len = buf.len() as u64;
                Arc::clone(blob).ensure(offset, len, Cause::Demand).await?;
            }
        }
    }
}

/// User and system time of this process so far.
fn cpu() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

async fn local(layer: &Layer) -> Result<()> {
    let source = Arc::new(FileSource::open(&layer.path)?);
    let opened = open(source, layer.digest).await?;
    let blob = &opened.blob;
    let wire = blob.wire();

    // Everything into the wire without decoding, then decode one chunk after the other.
    wire.fetch_head(layer.len);
    while wire.present_bytes() < layer.len {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (begun, cpu_before) = (Instant::now(), cpu()?);
    let mut buf = vec![0; READ];
    for chunk in opened.layer.map.chunks() {
        read(blob, chunk.decoded.0, &mut buf[..1]).await?;
    }
    let status = blob.status();
    println!(
        "decode: {:.0} MB in {:.2} s, one chunk after the other; {:.0} MB/s per core inside the decoder, {:.2} CPU s per GB in all",
        mb(status.decoded_bytes),
        begun.elapsed().as_secs_f64(),
        mb(status.decoded_bytes) / (f(status.decode_nanos) / 1e9),
        (cpu()? - cpu_before) / (f(status.decoded_bytes) / 1e9),
    );

    let len = blob.len();
    for size in [1, 4 << 10, READ] {
        let mut at = 0;
        let rounds = 200_000_u32;
        let (begun, before) = (Instant::now(), cpu()?);
        for _ in 0..rounds {
            at = (at + 7_919 * 4096) % (len - READ as u64) / 4096 * 4096;
            let got = blob.try_read(at, &mut buf[..size])?;
            ensure!(got == ReadNow::Ready(size), "not local");
        }
        let each = begun.elapsed().as_nanos() / u128::from(rounds);
        let spent = (cpu()? - before) / f64::from(rounds) * 1e9;
        println!("hit: {each} ns ({spent:.0} ns of CPU) for {size} bytes");
    }

    let source = Arc::new(FileSource::open(&layer.path)?);
    let opened = open(source, layer.digest).await?;
    let (begun, cpu_before) = (Instant::now(), cpu()?);
    hydrate(&opened, layer, Mode::Full);
    let record = opened.blob.hydrated().await.context("hydrated")?;
    let decoded = opened.layer.map.decoded_len();
    println!(
        "hydration from a local file: {:?} in {:.2} s, {:.2} CPU s per GB decoded",
        record.verdict,
        begun.elapsed().as_secs_f64(),
        (cpu()? - cpu_before) / (f(decoded) / 1e9),
    );
    Ok(())
}

fn hydrate(opened: &Opened, layer: &Layer, mode: Mode) {
    opened.blob.hydrate(HydrateOptions {
        layer_digest: layer.digest,
        mode,
        prover: Arc::new(StargzProof {
            layer: Arc::clone(&opened.layer),
            diff_id: layer.diff_id,
            limits: Limits::default(),
        }),
    });
}

async fn start(
    layer: &Layer,
    link: LinkModel,
) -> Result<(Lab, Opened, Instant, tempfile::TempDir)> {
    let store = tempfile::tempdir()?;
    let lab = Lab::start(LabOptions {
        link: Some(link),
        ..LabOptions::new(store.path())
    })
    .await?;
    lab.push_blob_from("bench", File::open(&layer.path)?)?;
    let client = RegistryClient::new(ClientOptions::default());
    let repository = Repository::new(&lab.host(), "bench")?;
    let begun = Instant::now();
    let remote = client.blob(&repository, layer.digest, layer.len);
    let opened = open(Arc::new(remote), layer.digest).await?;
    Ok((lab, opened, begun, store))
}

async fn sequential(layer: &Layer, name: &str, link: LinkModel) -> Result<()> {
    let (lab, opened, begun, _store) = start(layer, link).await?;
    let index = begun.elapsed();
    let cpu_before = cpu()?;
    let mut buf = vec![0; READ];
    let mut at = 0;
    while at < opened.blob.len() {
        at += read(&opened.blob, at, &mut buf).await? as u64;
    }
    log(&lab, &opened);
    let took = begun.elapsed().as_secs_f64();
    let rate = f(layer.len) * 8.0 / took / 1e6;
    println!(
        "{name}: sequential, cold: {took:.2} s ({:.3} s for the index), {rate:.0} Mbit/s = {:.1} % of the line; {} requests, {:.3} of the layer fetched; {:.2} CPU s with the lab's",
        index.as_secs_f64(),
        rate * 1e8 / f(link.rate_bits_per_s),
        lab.log().totals().blob_requests,
        f(lab.log().totals().blob_bytes) / f(layer.len),
        cpu()? - cpu_before,
    );
    lab.stop().await;
    Ok(())
}

/// What a container start does with an optimised layer.
async fn start_list(layer: &Layer, needed: u64, name: &str, link: LinkModel) -> Result<()> {
    let (lab, opened, begun, _store) = start(layer, link).await?;
    let index = begun.elapsed().as_secs_f64();
    opened.blob.prefetch_list(&opened.layer.start_list);
    hydrate(&opened, layer, Mode::Full);
    let StartList::Until(end) = opened.layer.start_list else {
        bail!("the optimised layer has no landmark");
    };
    let chunks = opened.layer.map.chunks();
    let mut buf = vec![0; 4 << 20];
    for chunk in chunks.iter().filter(|c| c.remote < end) {
        let len = chunk.len as usize;
        read(&opened.blob, chunk.decoded.0, &mut buf[..len]).await?;
    }
    let took = begun.elapsed().as_secs_f64();
    let traffic = opened.blob.status().traffic;
    // Four round trips, one slow start from ten segments, and the bytes at line rate.
    let rate = f(link.rate_bits_per_s) / 8.0;
    let round_trip = link.rtt.as_secs_f64();
    let slow_start = (rate * round_trip / 14_600.0).log2().max(0.0) * round_trip / 2.0;
    let floor = 4.0 * round_trip + slow_start + f(end.0) / rate;
    println!(
        "{name}: optimised start: {:.1} MB of start list ({:.1} MB decoded) read after {took:.2} s (index {index:.2} s), {:.2} x the floor of {floor:.2} s; metadata {:.1} MB, prefetch {:.1} MB in {} requests, demand {:.1} MB in {}, hydration {:.1} MB",
        mb(end.0),
        mb(needed),
        took / floor,
        mb(traffic.metadata.bytes),
        mb(traffic.prefetch.bytes),
        traffic.prefetch.requests,
        mb(traffic.demand.bytes),
        traffic.demand.requests,
        mb(traffic.hydration.bytes),
    );
    log(&lab, &opened);
    lab.stop().await;
    Ok(())
}

fn log(lab: &Lab, opened: &Opened) {
    if std::env::var_os("CACHE_BENCH_LOG").is_some() {
        for entry in lab.log().entries() {
            println!(
                "{:.1} +{:.1} {:?} {:?} on {}",
                entry.time_ms % 1e6,
                entry.duration_ms.unwrap_or(0.0),
                entry.range,
                entry.bytes,
                entry.connection
            );
        }
        println!("{:?}", opened.blob.status());
    }
}

/// 300 files spread over the layer in an order of their own, each read whole.
async fn scattered(layer: &Layer, name: &str, link: LinkModel, mode: Mode) -> Result<()> {
    let (lab, opened, begun, _store) = start(layer, link).await?;
    let chunks = opened.layer.map.chunks();
    let small: Vec<_> = chunks.iter().filter(|c| c.len < 40_000).collect();
    hydrate(&opened, layer, mode);
    let mut buf = vec![0; 64 << 10];
    let mut needed = 0;
    for step in 0..300 {
        let chunk = small[step * 7_919 % small.len()];
        needed += u64::from(chunk.len);
        let len = chunk.len as usize;
        read(&opened.blob, chunk.decoded.0, &mut buf[..len]).await?;
    }
    let took = begun.elapsed().as_secs_f64();
    let traffic = opened.blob.status().traffic;
    println!(
        "{name}: 300 small files one after the other ({:.1} MB), hydration {mode:?}: {took:.2} s; demand {:.1} MB in {} requests, hydration {:.1} MB in {}",
        mb(needed),
        mb(traffic.demand.bytes),
        traffic.demand.requests,
        mb(traffic.hydration.bytes),
        traffic.hydration.requests,
    );
    if mode == Mode::Full {
        let record = opened.blob.hydrated().await.context("hydrated")?;
        println!(
            "{name}: hydrated after {:.2} s: {:?}, {:.4} of the layer fetched",
            begun.elapsed().as_secs_f64(),
            record.verdict,
            f(lab.log().totals().blob_bytes) / f(layer.len),
        );
    }
    lab.stop().await;
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for printing")]
fn f(n: u64) -> f64 {
    n as f64
}

fn mb(n: u64) -> f64 {
    f(n) / 1e6
}
