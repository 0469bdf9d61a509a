//! The admin routes of the frame.

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Recovery;
use crate::{
    admin::{Answer, Routes},
    drivers::{Context, Drivers},
    logging,
    metrics::Metrics,
    store::{Snapshot, SnapshotKey, Store, StoreError},
};

/// Snapshots in one answer when the request names no limit.
const SNAPSHOTS_LIMIT: usize = 1000;

pub(super) fn register(
    routes: &Routes,
    context: &Context,
    drivers: &Drivers,
    recovered: watch::Receiver<Recovery>,
) {
    add_metrics(routes, &context.metrics);
    routes.add(Method::GET, "/healthz", |_| async {
        Answer::text("text/plain", "ok\n")
    });

    let (config, drivers, started) = (
        context.config.clone(),
        drivers.clone(),
        std::time::Instant::now(),
    );
    routes.add(Method::GET, "/v1/status", move |_| {
        let recovery = match &*recovered.borrow() {
            Recovery::Running => json!({ "done": false }),
            Recovery::Done(problems) => json!({ "done": true, "problems": problems }),
        };
        let snapshotters: serde_json::Map<String, Value> = config
            .snapshotters
            .iter()
            .map(|(name, entry)| (name.clone(), json!(entry.driver)))
            .collect();
        let status = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime_seconds": started.elapsed().as_secs(),
            "root": config.root,
            "state": config.state,
            "address": config.address,
            "drivers": drivers.iter().map(|driver| driver.name()).collect::<Vec<_>>(),
            "default_driver": config.default_driver,
            "snapshotters": snapshotters,
            "recovery": recovery,
            "probe": drivers.iter().find_map(|driver| driver.findings()),
        });
        async move { Answer::json(&status) }
    });

    let store = context.store.clone();
    routes.add(Method::GET, "/v1/snapshots", move |request| {
        let store = store.clone();
        async move {
            let limit = match request.query.value("limit").map(str::parse) {
                None => SNAPSHOTS_LIMIT,
                Some(Ok(limit)) => limit,
                Some(Err(_)) => {
                    return Answer::error(StatusCode::BAD_REQUEST, "limit is not a number");
                }
            };
            let snapshotter = request.query.value("snapshotter").map(str::to_owned);
            let listed = tokio::task::spawn_blocking(move || {
                snapshots(&store, snapshotter.as_deref(), limit)
            });
            match listed.await {
                Ok(Ok(value)) => Answer::json(&value),
                Ok(Err(error)) => {
                    Answer::error(StatusCode::INTERNAL_SERVER_ERROR, logging::chain(&error))
                }
                Err(error) => Answer::error(StatusCode::INTERNAL_SERVER_ERROR, error),
            }
        }
    });
}

/// The routes of a metrics address of its own.
pub(super) fn metrics_only(metrics: &Metrics) -> Routes {
    let routes = Routes::default();
    add_metrics(&routes, metrics);
    routes
}

fn add_metrics(routes: &Routes, metrics: &Metrics) {
    let metrics = metrics.clone();
    routes.add(Method::GET, "/metrics", move |_| {
        let metrics = metrics.clone();
        async move {
            match tokio::task::spawn_blocking(move || metrics.render()).await {
                Ok(text) => Answer::text("text/plain; version=0.0.4", text),
                Err(error) => Answer::error(StatusCode::INTERNAL_SERVER_ERROR, error),
            }
        }
    });
}

fn snapshots(store: &Store, snapshotter: Option<&str>, limit: usize) -> Result<Value, StoreError> {
    let mut shown = Vec::new();
    let mut total = 0_usize;
    store.read()?.for_each(|key, snapshot| {
        if snapshotter.is_none_or(|wanted| *key.snapshotter == *wanted) {
            total += 1;
            if shown.len() < limit {
                shown.push(describe(&key, &snapshot));
            }
        }
        Ok(())
    })?;
    Ok(json!({ "total": total, "snapshots": shown }))
}

fn describe(key: &SnapshotKey, snapshot: &Snapshot) -> Value {
    let parents: Vec<u64> = snapshot.parents.iter().map(|id| id.0).collect();
    json!({
        "snapshotter": &*key.snapshotter,
        "key": &*key.key,
        "id": snapshot.id.0,
        "kind": snapshot.info.kind.as_str(),
        "parent": snapshot.info.parent,
        "parents": parents,
        "created": snapshot.info.created.to_string(),
        "updated": snapshot.info.updated.to_string(),
        "labels": snapshot.info.labels,
        "usage": snapshot.usage.map(|usage| json!({
            "bytes": usage.bytes,
            "inodes": usage.inodes,
        })),
    })
}
