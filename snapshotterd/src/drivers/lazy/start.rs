//! Puts the lazy driver together.

use std::{path::PathBuf, sync::Arc};

use formats::limits::Limits;
use fuse::{BlobFsOptions, CommandLine, mounts::Helper};
use storage::cache::{Scheduler, SchedulerOptions};
use tokio::runtime::Handle;

use super::{
    super::{Context, Driver, DriverError, overlayfs::Overlayfs},
    Lazy,
    answers::Answers,
    committed::Ahead,
    routes,
};
use crate::{
    config::TrustPolicy,
    containerd::Containerd,
    layers::{Layers, LayersOptions, blobs::Opener, table::LayerTable},
    resolve::{Resolver, plan::Documents, registry::Registries, remote::Remote},
    store::{Store, StoreError},
};

/// Builds the driver on top of `overlayfs`, which keeps the ordinary layers of mixed chains.
/// Loads what is known of layers; waits for nothing else.
pub fn start(context: &Context, overlayfs: Arc<Overlayfs>) -> Result<Arc<dyn Driver>, DriverError> {
    let config = &context.config;
    let runtime = Handle::current();
    let table = Arc::new(open_table(&context.store)?);
    let remote: Arc<dyn Remote> = Arc::new(
        Registries::new(&config.registry, &context.environment)
            .map_err(DriverError::InvalidArgument)?,
    );
    let documents = Documents {
        containerd: (!config.containerd.address.as_os_str().is_empty())
            .then(|| Containerd::new(&config.containerd.address)),
        remote: Arc::clone(&remote),
    };
    let exe = executable()?;
    let helper = Helper::new(CommandLine::new(&exe, ["mount-helper"]))
        .with_claims(config.state.join("helpers"));
    let blobfs = BlobFsOptions::new(
        config.state.join("blobs"),
        config.state.join("holder"),
        CommandLine::new(&exe, ["holder"]),
        helper.clone(),
        runtime.clone(),
    );
    let opener = Opener {
        layers: config.root.join("layers"),
        table,
        remote,
        scheduler: Scheduler::new(runtime, SchedulerOptions::default()),
        limits: Limits::default(),
        parsed: Arc::default(),
    };
    let layers = Layers::open(LayersOptions {
        config: Arc::clone(config),
        store: context.store.clone(),
        opener,
        documents: documents.clone(),
        helper,
        blobfs,
        metrics: context.metrics.clone(),
    })
    .map_err(DriverError::io("prepare", config.root.join("layers")))?;
    let layers = Arc::new(layers);
    routes::register(&context.routes, &layers);
    let scraped = Arc::downgrade(&layers);
    context.metrics.collect(move |scrape| {
        if let Some(layers) = scraped.upgrade() {
            layers.scrape(scrape);
        }
    });
    let resolver = Resolver::new(
        documents,
        Arc::clone(&layers),
        config.lazy.resolve_timeout.0,
    );
    Ok(Arc::new(Lazy {
        store: context.store.clone(),
        overlayfs,
        layers,
        resolver,
        answers: Answers::default(),
        ahead: Ahead::default(),
        rpc_timeout: config.rpc_timeout.0,
        only_proven: config.lazy.trust == TrustPolicy::Proven,
    }))
}

/// The store's writes block; a thread of its own may, a runtime's may not.
fn open_table(store: &Store) -> Result<LayerTable, StoreError> {
    std::thread::scope(|scope| {
        scope
            .spawn(move || LayerTable::open(store))
            .join()
            .unwrap_or(Err(StoreError::Closed))
    })
}

/// This program: holder and mount helper are its subcommands.
fn executable() -> Result<PathBuf, DriverError> {
    std::env::current_exe().map_err(DriverError::io("find", "/proc/self/exe"))
}
