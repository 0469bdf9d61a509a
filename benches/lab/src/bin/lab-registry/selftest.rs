//! Measures the registry on this machine: throughput without a link, accuracy with one.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::Args;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use lab::{Lab, LabOptions, LinkModel};
use tokio::{net::TcpStream, task::JoinSet};

/// Blob the measurements read.
const BLOB: usize = 256 << 20;
const REPO: &str = "lab/selftest";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Directory for a blob of 256 MiB, removed afterwards; default: a new one under the system's
    /// temporary directory
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seconds per measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    let dir = options.dir.clone().unwrap_or_else(|| {
        std::env::temp_dir().join(format!("lab-selftest-{}", std::process::id()))
    });
    let outcome = measure(&dir, options).await;
    for name in ["blobs", "repositories", "incoming"] {
        // What is left behind after a failure is named by that failure.
        let _ = fs::remove_dir_all(dir.join(name));
    }
    // Removes the directory only if nothing else is in it.
    let _ = fs::remove_dir(&dir);
    outcome
}

async fn measure(dir: &std::path::Path, options: &Options) -> anyhow::Result<()> {
    let lab = Lab::start(LabOptions::new(dir)).await?;
    let mut noise = vec![0_u8; BLOB];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in noise.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    let digest = lab.push_blob(REPO, &noise)?;
    drop(noise);
    let run = Run {
        addr: lab.addr(),
        path: format!("/v2/{REPO}/blobs/{digest}"),
        time: Duration::from_secs_f64(options.seconds),
    };

    println!("throughput without a link (client and server share the machine)");
    for (connections, size) in [(1, BLOB), (4, BLOB), (4, 4 << 20), (4, 64 << 10), (1, 4096)] {
        let cpu = cpu_seconds();
        let sample = run.load(connections, size).await?;
        let cpu = cpu_seconds() - cpu;
        println!(
            "  {connections} x {:>9} bytes: {:8.1} MB/s {:8.0} requests/s {:5.2} CPU s/GB (both sides)",
            size,
            sample.rate() / 1e6,
            float(sample.requests) / sample.seconds,
            cpu / (float(sample.bytes) / 1e9),
        );
    }

    for (name, model) in [
        ("wan", LinkModel::wan()),
        ("cloud", LinkModel::cloud()),
        ("lan", LinkModel::lan()),
    ] {
        lab.set_link(Some(model));
        println!("{name}: {model}");
        for connections in [1, 4, 16] {
            let sample = run.load(connections, BLOB).await?;
            println!(
                "  {connections:>2} connections: {:9.3} Mbit/s, {:+.2} %",
                sample.rate() * 8.0 / 1e6,
                (sample.rate() * 8.0 / float(model.rate_bits_per_s) - 1.0) * 100.0,
            );
        }
        run.latency(&model).await?;
        run.small_beside_large(&model).await?;
    }
    lab.stop().await;
    Ok(())
}

struct Run {
    addr: SocketAddr,
    path: String,
    time: Duration,
}

struct Sample {
    bytes: u64,
    requests: u64,
    seconds: f64,
}

impl Sample {
    fn rate(&self) -> f64 {
        float(self.bytes) / self.seconds
    }
}

impl Run {
    /// Bytes received over `connections` while each asks for `size` bytes again and again. Counts
    /// from when all have received a first frame and their windows had time to open.
    async fn load(&self, connections: usize, size: usize) -> anyhow::Result<Sample> {
        let warm = Duration::from_millis(700);
        let begin = Instant::now() + warm;
        let end = begin + self.time;
        let mut tasks = JoinSet::new();
        for n in 0..connections {
            let (addr, path) = (self.addr, self.path.clone());
            tasks.spawn(async move {
                let mut sender = connect(addr).await?;
                let (mut bytes, mut requests) = (0_u64, 0_u64);
                let mut at = n * size;
                loop {
                    let first = at % (BLOB - size + 1);
                    at += size;
                    let mut body = get(&mut sender, &path, first, size).await?;
                    while let Some(frame) = body.frame().await {
                        let len = frame?.data_ref().map_or(0, Bytes::len) as u64;
                        let now = Instant::now();
                        if now >= end {
                            return anyhow::Ok((bytes, requests));
                        }
                        if now >= begin {
                            bytes += len;
                        }
                    }
                    requests += u64::from(Instant::now() >= begin);
                }
            });
        }
        let mut sample = Sample {
            bytes: 0,
            requests: 0,
            seconds: self.time.as_secs_f64(),
        };
        while let Some(done) = tasks.join_next().await {
            let (bytes, requests) = done??;
            sample.bytes += bytes;
            sample.requests += requests;
        }
        Ok(sample)
    }

    /// One-byte replies on a new and on a used connection, and 219,000 bytes (four windows).
    async fn latency(&self, model: &LinkModel) -> anyhow::Result<()> {
        let mut fresh = Vec::new();
        let mut used = Vec::new();
        let mut slow_start = Vec::new();
        for _ in 0..10 {
            let start = Instant::now();
            let mut sender = connect(self.addr).await?;
            get(&mut sender, &self.path, 0, 1).await?.collect().await?;
            fresh.push(start.elapsed());
            let start = Instant::now();
            get(&mut sender, &self.path, 0, 1).await?.collect().await?;
            used.push(start.elapsed());
            let start = Instant::now();
            get(&mut sender, &self.path, 0, 219_000)
                .await?
                .collect()
                .await?;
            slow_start.push(start.elapsed());
        }
        let trip = model.rtt.as_secs_f64() * 1e3;
        let wire = 219_000.0 * 8e3 / float(model.rate_bits_per_s);
        println!(
            "  first byte, new connection:  {:8.3} ms (2 RTT = {:.3})",
            median(fresh),
            trip * 2.0
        );
        println!(
            "  first byte, used connection: {:8.3} ms (1 RTT = {trip:.3})",
            median(used)
        );
        println!(
            "  219,000 bytes, window of 10: {:8.3} ms (between {:.3} and {:.3})",
            median(slow_start),
            (trip * 4.0).max(trip + wire),
            trip * 4.0 + wire,
        );
        Ok(())
    }

    /// What a short reply waits for while four connections fetch as fast as they can.
    async fn small_beside_large(&self, model: &LinkModel) -> anyhow::Result<()> {
        let measuring = async {
            let mut sender = connect(self.addr).await?;
            let mut waits = Vec::new();
            tokio::time::sleep(Duration::from_millis(700)).await;
            while waits.len() < 20 {
                let start = Instant::now();
                get(&mut sender, &self.path, 0, 4096)
                    .await?
                    .collect()
                    .await?;
                waits.push(start.elapsed());
            }
            anyhow::Ok(median(waits))
        };
        let (load, wait) = tokio::join!(self.load(4, BLOB), measuring);
        load?;
        println!(
            "  4 KiB beside 4 full streams: {:8.3} ms (1 RTT = {:.3})",
            wait?,
            model.rtt.as_secs_f64() * 1e3
        );
        Ok(())
    }
}

type Sender = SendRequest<Empty<Bytes>>;

async fn connect(addr: SocketAddr) -> anyhow::Result<Sender> {
    let stream = TcpStream::connect(addr).await.context("connect")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn get(
    sender: &mut Sender,
    path: &str,
    first: usize,
    size: usize,
) -> anyhow::Result<hyper::body::Incoming> {
    sender.ready().await?;
    let request = Request::get(path)
        .header(header::HOST, "lab")
        .header(header::RANGE, format!("bytes={first}-{}", first + size - 1))
        .body(Empty::new())?;
    let response = sender.send_request(request).await?;
    ensure!(
        response.status() == StatusCode::PARTIAL_CONTENT,
        "status {}",
        response.status()
    );
    Ok(response.into_body())
}

fn median(mut values: Vec<Duration>) -> f64 {
    values.sort();
    values[values.len() / 2].as_secs_f64() * 1e3
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 14 and 15, counted after the name, which may hold anything, in ticks of 10 ms.
    let ticks = stat.rsplit_once(')').map_or(0.0, |(_, rest)| {
        rest.split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<f64>().ok())
            .sum()
    });
    ticks / 100.0
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn float(value: u64) -> f64 {
    value as f64
}
