//! Looking into a running daemon.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::Value;

use super::{Global, output};
use crate::admin;

pub(super) async fn status(global: &Global, image: Option<&str>) -> Result<ExitCode> {
    let answer = admin::get(&global.admin, "/v1/layers").await?;
    let layers = answer
        .get("layers")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let of_image = |layer: &Value| {
        image.is_none_or(|image| {
            layer
                .get("images")
                .and_then(Value::as_array)
                .is_some_and(|images| {
                    images
                        .iter()
                        .any(|name| name.as_str().is_some_and(|name| name == image))
                })
        })
    };
    let layers: Vec<_> = layers.into_iter().filter(of_image).collect();
    if global.json {
        output::json(&layers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let heading = [
        "LAYER",
        "SIZE",
        "LOCAL",
        "DEMAND",
        "PREFETCH",
        "HYDRATION",
        "VERDICT",
        "LAZY",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for layer in &layers {
        let text = |key: &str| {
            layer
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or("-")
                .to_owned()
        };
        let bytes = |value: Option<&Value>| {
            value
                .and_then(Value::as_u64)
                .map_or_else(|| "-".to_owned(), output::human)
        };
        let traffic = |cause: &str| bytes(layer.pointer(&format!("/cache/traffic/{cause}/bytes")));
        let percent = layer.get("percent_local").and_then(Value::as_f64);
        rows.push(vec![
            output::short(&text("digest")).to_owned(),
            bytes(layer.get("blob_bytes")),
            percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.0} %")),
            traffic("demand"),
            traffic("prefetch"),
            traffic("hydration"),
            text("verdict"),
            "yes".to_owned(),
        ]);
    }
    output::table(&rows)?;
    let ordinary = answer
        .get("not_lazy")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    if image.is_none() && !ordinary.is_empty() {
        output::line("\nLayers that are not served lazily:")?;
        for snapshot in &ordinary {
            let text = |key: &str| snapshot.get(key).and_then(Value::as_str).unwrap_or("-");
            output::line(&format!("  {}: {}", text("snapshot"), text("why_not")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn why(global: &Global) -> Result<ExitCode> {
    let answer = admin::get(&global.admin, "/v1/why").await?;
    if global.json {
        output::json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let waiting = answer
        .get("waiting")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    if waiting.is_empty() {
        output::line("no reader is waiting")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        ["LAYER", "BYTES OF THE BLOB", "READERS", "WAITING", "TRYING"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for item in &waiting {
        let text = |key: &str| {
            item.get(key)
                .and_then(Value::as_str)
                .unwrap_or("-")
                .to_owned()
        };
        let number = |key: &str| item.get(key).and_then(Value::as_u64).unwrap_or(0);
        rows.push(vec![
            output::short(&text("layer")).to_owned(),
            format!("{}..{}", number("remote_start"), number("remote_end")),
            number("readers").to_string(),
            format!("{:.1} s", number("waiting_ms") as f64 / 1000.0),
            text("source"),
        ]);
    }
    output::table(&rows)?;
    Ok(ExitCode::SUCCESS)
}
