//! Log lines on standard error.
//!
//! Levels: `error` the daemon cannot do its work; `warn` something was degraded or refused that
//! an operator should know of; `info` what changes (starts, stops, layers that became lazy or not);
//! `debug` every request; `trace` the inside of one. Libraries only warn, unless directives say more.

use std::io;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{Log, LogFormat};

/// The crates whose log lines are ours.
const OURS: [&str; 4] = ["snapshotterd", "storage", "fuse", "formats"];

/// Starts logging as configured. Fails when logging was started before in this process.
pub fn start(log: &Log) -> Result<(), String> {
    let filter = filter(&log.level)?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match log.format {
        LogFormat::Text => {
            use std::io::IsTerminal as _;
            registry
                .with(layer.with_ansi(io::stderr().is_terminal()))
                .try_init()
        }
        LogFormat::Json => registry
            .with(layer.json().flatten_event(true).with_current_span(true))
            .try_init(),
    }
    .map_err(|error| error.to_string())
}

/// Whether `level` is a level or a list of directives.
pub fn check(level: &str) -> Result<(), String> {
    if level.trim().is_empty() {
        return Err("must not be empty".to_owned());
    }
    filter(level).map(drop)
}

/// A plain level is that of our own crates; libraries then only warn. Anything longer is taken as
/// the directives that it is.
fn filter(level: &str) -> Result<EnvFilter, String> {
    let directives = match level.parse::<LevelFilter>() {
        Ok(level) if level > LevelFilter::WARN => {
            let ours = OURS.map(|name| format!("{name}={level}"));
            format!("warn,{}", ours.join(","))
        }
        _ => level.to_owned(),
    };
    EnvFilter::try_new(directives).map_err(|error| format!("{level:?}: {error}"))
}

/// An error with its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_level_does_not_make_libraries_talk() -> Result<(), String> {
        let filter = filter("debug")?.to_string();
        assert!(filter.contains("snapshotterd=debug"), "{filter}");
        assert!(
            filter.split(',').any(|directive| directive == "warn"),
            "{filter}"
        );
        assert_eq!(super::filter("h2=trace")?.to_string(), "h2=trace");
        assert!(check("info,=").is_err() && check(" ").is_err());
        Ok(())
    }
}
