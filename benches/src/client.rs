//! Asking a running daemon, from code that is not asynchronous.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// What the daemon's admin socket says at `path`.
pub fn get(admin: &Path, path: &str) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(core_runtime::admin::get(admin, path))
}

/// The layers the daemon serves lazily.
pub fn layers(admin: &Path) -> Result<Vec<Value>> {
    let answer = get(admin, "/v1/layers")?;
    answer
        .get("layers")
        .and_then(Value::as_array)
        .cloned()
        .context("no list of layers")
}

/// The same; fails, with the reason, when a layer is not lazy.
pub fn lazy_layers(admin: &Path) -> Result<Vec<Value>> {
    let answer = get(admin, "/v1/layers")?;
    let ordinary = answer
        .get("not_lazy")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    if let Some(snapshot) = ordinary.into_iter().next() {
        bail!("a layer is not lazy: {snapshot}");
    }
    answer
        .get("layers")
        .and_then(Value::as_array)
        .cloned()
        .context("no list of layers")
}
