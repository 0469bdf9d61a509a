//! How fast a TOC is parsed: `cargo run --release -p formats --example toc_speed [ENTRIES]`.
//!
//! The TOC is made up: directories of 40 files, four levels deep, digests and times on every file,
//! every tenth file in two chunks. Prints the best of five passes in CPU time.

use std::fmt::Write as _;

use formats::{digest::Digest, limits::Limits, stargz::parse_toc, units::RemoteOffset};
use rustix::time::{ClockId, clock_gettime};

fn main() {
    let wanted: u64 = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(200_000);
    let (json, entries, toc_offset) = toc(wanted);
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = cpu_seconds();
        let layer = parse_toc(&json, toc_offset, &Limits::default());
        best = best.min(cpu_seconds() - start);
        match layer {
            Ok(layer) => assert!(layer.map.decoded_len() > 0),
            Err(error) => {
                eprintln!("{error}");
                return;
            }
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let (entries, megabytes) = (entries as f64, json.len() as f64 / 1e6);
    println!(
        "{entries} entries, {megabytes:.1} MB of JSON: {:.1} ms, {:.2} million entries/s, {:.0} MB/s",
        best * 1e3,
        entries / best / 1e6,
        megabytes / best
    );
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let (seconds, nanos) = (time.tv_sec as f64, time.tv_nsec as f64);
    seconds + nanos / 1e9
}

fn toc(wanted: u64) -> (Vec<u8>, u64, RemoteOffset) {
    let mut json = String::from("{\n\t\"version\": 1,\n\t\"entries\": [");
    let (mut entries, mut file, mut offset) = (0, 0_u64, 0_u64);
    let mut push = |text: &str| {
        let comma = if entries == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(json, "{comma}\n\t\t{text}");
        entries += 1;
        entries
    };
    loop {
        let directory = format!("usr/lib/d{}/p{}", file / 4000, file / 40);
        if file.is_multiple_of(40) {
            push(&format!(
                r#"{{"name": "{directory}/", "type": "dir", "modtime": "2023-11-14T22:13:20Z", "mode": 493}}"#
            ));
        }
        let digest = Digest::of(&file.to_le_bytes());
        let chunked = file.is_multiple_of(10);
        let (size, chunk) = if chunked {
            (20_000, r#""chunkSize": 10000, "#)
        } else {
            (5000, "")
        };
        let mut count = push(&format!(
            r#"{{"name": "{directory}/file{file}.py", "type": "reg", "size": {size}, "modtime": "2023-11-14T22:13:20Z", "mode": 420, "offset": {offset}, {chunk}"digest": "{digest}", "chunkDigest": "{digest}"}}"#
        ));
        offset += 2000;
        if chunked {
            count = push(&format!(
                r#"{{"name": "{directory}/file{file}.py", "type": "chunk", "offset": {offset}, "chunkOffset": 10000, "chunkDigest": "{digest}"}}"#
            ));
            offset += 2000;
        }
        file += 1;
        if count >= wanted {
            break;
        }
    }
    json.push_str("\n\t]\n}");
    (json.into_bytes(), entries, RemoteOffset(offset))
}
