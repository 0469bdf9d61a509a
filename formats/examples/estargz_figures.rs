//! Prints the throughput of the eStargz writer:
//! `cargo run --release -p formats --example estargz_figures -- ARCHIVE.tar [LEVEL...]`.

use std::{fs::File, time::Instant};

use formats::{
    limits::Limits,
    stargz::{WriterOptions, build},
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("which archive?")?;
    let levels: Vec<u8> = args.map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let levels = if levels.is_empty() {
        vec![1, 6, 9, 12]
    } else {
        levels
    };
    println!("level      seconds      MB/s of tar     blob bytes    TOC offset    tar bytes");
    for level in levels {
        let options = WriterOptions {
            level,
            ..WriterOptions::default()
        };
        let start = Instant::now();
        let built = build(
            File::open(&path)?,
            std::io::sink(),
            &options,
            &Limits::default(),
        )?;
        let seconds = start.elapsed().as_secs_f64();
        let rate = f64::from(u32::try_from(built.uncompressed_len >> 10)?) / 976.5625 / seconds;
        println!(
            "{level:>5} {seconds:>12.2} {rate:>16.1} {:>14} {:>13} {:>12}",
            built.blob_len, built.toc_offset.0, built.uncompressed_len
        );
    }
    Ok(())
}
