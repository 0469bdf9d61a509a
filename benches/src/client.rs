//! Asking a running daemon, from code that is not asynchronous.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// What the daemon's admin socket says at `path`.
pub fn get(admin: &Path, path: &str) -> Result<Value> {
    runtime()?.block_on(core_runtime::admin::get(admin, path))
}

/// Waits until the daemon knows what the kernel can do, as one that was not started this second
/// does.
pub fn wait_until_settled(admin: &Path) -> Result<()> {
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        let answer = get(admin, "/v1/layers")?;
        match answer.pointer("/node/lazy") {
            Some(Value::Bool(true)) => return Ok(()),
            Some(Value::Bool(false)) => bail!("layers cannot be lazy here: {}", answer["node"]),
            _ if Instant::now() > limit => bail!("the daemon does not settle"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Number and summed seconds of the requests that containerd has sent, by method.
pub fn requests(admin: &Path) -> Result<BTreeMap<String, Answered>> {
    const NAME: &str = "snapshotterd_rpc_duration_seconds";
    let text = runtime()?.block_on(core_runtime::admin::get_text(admin, "/metrics"))?;
    let mut methods: BTreeMap<String, Answered> = BTreeMap::new();
    for line in text.lines() {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let Some((name, labels)) = series.split_once('{') else {
            continue;
        };
        let Some(method) = labels
            .split_once("method=\"")
            .and_then(|(_, rest)| rest.split('"').next())
        else {
            continue;
        };
        let value: f64 = value.parse().with_context(|| line.to_owned())?;
        match name.strip_prefix(NAME) {
            Some("_sum") => methods.entry(method.to_owned()).or_default().seconds = value,
            Some("_count") => methods.entry(method.to_owned()).or_default().count = value,
            _ => {}
        }
    }
    Ok(methods)
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Answered {
    /// How many.
    pub count: f64,
    /// How long all of them took together.
    pub seconds: f64,
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
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
