//! Asking a running daemon, from code that is not asynchronous.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The layers as the daemon's admin socket describes them.
pub fn layers(admin: &Path) -> Result<Vec<Value>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime.block_on(core_runtime::admin::get(admin, "/v1/layers"))?;
    Ok(answer
        .get("layers")
        .and_then(Value::as_array)
        .cloned()
        .context("no list of layers")?)
}
