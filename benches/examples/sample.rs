//! Writes the sample image as an OCI layout: `cargo run -p benches --example sample -- DIR`.

fn main() -> anyhow::Result<()> {
    let dir = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "sample-image".into());
    let started = std::time::Instant::now();
    let layout = benches::sample::build(
        dir.as_ref(),
        benches::sample::SampleOptions::default(),
        &mut |line| eprintln!("{line}"),
    )?;
    println!(
        "{}: {} entries, {:.1} MB compressed, manifest {} ({:.1} s)",
        layout.dir.display(),
        layout.entries,
        layout.compressed_bytes as f64 / 1e6,
        layout.manifest,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
