//! Log lines on standard error.
//!
//! Levels: `error` the daemon cannot do its work; `warn` something was degraded or refused that
//! an operator should know of; `info` what changes (starts, stops, layers that became lazy or not);
//! `debug` every request; `trace` the inside of one.

use std::io;

use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{Log, LogFormat};

/// Starts logging as configured. Fails when logging was started before in this process.
pub fn start(log: &Log) -> Result<(), String> {
    let filter = EnvFilter::try_new(&log.level).map_err(|error| error.to_string())?;
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
    EnvFilter::try_new(level)
        .map(drop)
        .map_err(|error| format!("{level:?}: {error}"))
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
