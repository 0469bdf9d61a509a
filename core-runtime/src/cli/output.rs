//! What people see: errors with their causes, progress, tables.

use std::{
    fmt::Write as FmtWrite,
    io::{IsTerminal as _, Write as _},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Log lines of libraries go to standard error; `SNAPCTL_LOG` selects them.
pub(super) fn init_logging(quiet: bool) {
    let default = if quiet { "error" } else { "warn" };
    let filter = std::env::var("SNAPCTL_LOG").unwrap_or_else(|_| default.to_owned());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
}

/// An error and what caused it, one cause a line.
pub(super) fn error(error: &anyhow::Error) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "snapctl: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Some errors repeat their source.
        if !last.contains(&cause) {
            let _ = writeln!(out, "  because: {cause}");
        }
        last = cause;
    }
}

/// One line of text on standard output.
pub(super) fn line(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// A value as pretty JSON on standard output.
pub(super) fn json(value: &impl serde::Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// A bar over bytes on a terminal; nothing elsewhere.
pub(super) fn bytes_bar(quiet: bool, what: &str, total: u64) -> ProgressBar {
    let bar = if quiet || !std::io::stderr().is_terminal() {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(total)
    };
    let template = "{msg:24} {bar:30} {bytes:>11} of {total_bytes:11} {bytes_per_sec:>12} {eta:>5}";
    bar.set_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// The bar's counting closure.
pub(super) fn counting(bar: &ProgressBar) -> Arc<dyn Fn(u64) + Send + Sync> {
    let bar = bar.clone();
    Arc::new(move |bytes| bar.inc(bytes))
}

/// Bytes for people.
pub(super) fn human(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// A digest short enough for a table.
pub(super) fn short(digest: &str) -> &str {
    digest
        .strip_prefix("sha256:")
        .and_then(|hex| hex.get(..12))
        .unwrap_or(digest)
}

/// Rows with aligned columns; the first row is the heading.
pub(super) fn table(rows: &[Vec<String>]) -> Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns)
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = std::io::stdout().lock();
    for row in rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = FmtWrite::write_fmt(&mut text, format_args!("{cell:width$}  "));
        }
        writeln!(out, "{}", text.trim_end())?;
    }
    Ok(())
}
