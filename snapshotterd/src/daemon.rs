//! The whole daemon in one value.

mod routes;
mod unmount;

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::{JoinError, JoinHandle},
};
use tokio_stream::wrappers::UnixListenerStream;

use crate::{
    admin::{self, Routes},
    config::Config,
    drivers::{Context, DriverError, Drivers},
    lock::{Lock, LockError},
    logging,
    metrics::{Address, Metrics, defs},
    service::{Snapshots, socket},
    store::{Store, StoreError},
};

/// How long requests in progress may go on after the end was asked for.
const DRAIN: Duration = Duration::from_secs(5);

/// Requests at once on one connection.
const STREAMS: u32 = 4096;

/// A running daemon. Dropping it without [`Daemon::stop`] ends serving and leaves mounts alone, as
/// a kill would.
#[derive(Debug)]
pub struct Daemon {
    config: Arc<Config>,
    drivers: Drivers,
    store: Store,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
    stop_serving: Option<oneshot::Sender<()>>,
    recovered: watch::Receiver<Recovery>,
    // Held, not read: they end with the daemon.
    _admin: admin::Server,
    _metrics: Option<admin::Server>,
    _locks: Vec<Lock>,
}

/// How far the work behind a start is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Still at it.
    Running,
    /// Done, with what went wrong.
    Done(Vec<String>),
}

/// Why the daemon cannot start or has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// A directory cannot be made.
    #[error("cannot create {path}", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon is there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store cannot be opened.
    #[error("cannot open the metadata store")]
    Store(#[from] StoreError),
    /// A driver cannot be built.
    #[error("cannot start the drivers")]
    Driver(#[from] DriverError),
    /// The gRPC socket cannot be bound.
    #[error("cannot listen on {path}", path = path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An HTTP server cannot start.
    #[error(transparent)]
    Http(#[from] admin::ServerError),
    /// The gRPC server failed.
    #[error("the gRPC server failed")]
    Serve(#[from] tonic::transport::Error),
    /// A task of the daemon panicked.
    #[error("a task of the daemon failed")]
    Task(#[from] JoinError),
}

impl Daemon {
    /// Starts serving. Nothing in here waits for a mount, a registry or containerd: what takes
    /// time goes on behind the first requests, see [`Daemon::recovered`].
    pub async fn start(config: Config) -> Result<Self, DaemonError> {
        Self::start_with(config, Vec::new()).await
    }

    /// As [`Daemon::start`], with the proxy variables of the environment.
    pub async fn start_with(
        config: Config,
        environment: Vec<(String, String)>,
    ) -> Result<Self, DaemonError> {
        let config = Arc::new(config);
        let metrics = Metrics::default();
        let (store, locks) = {
            let config = Arc::clone(&config);
            tokio::task::spawn_blocking(move || open(&config)).await??
        };
        let routes = Routes::default();
        let context = Context {
            config: Arc::clone(&config),
            store: store.clone(),
            metrics: metrics.clone(),
            routes: routes.clone(),
            environment: environment.into(),
        };
        let drivers = Drivers::start(&context)?;
        let (progress, recovered) = watch::channel(Recovery::Running);
        collect(&metrics, &store);
        routes::register(&routes, &context, &drivers, recovered.clone());
        let admin = admin::Server::unix(&config.admin_socket(), routes.clone())?;
        let address = Address::parse(&config.metrics.address).unwrap_or(Address::Off);
        let scrape = admin::Server::at(&address, routes::metrics_only(&metrics)).await?;

        let listener = socket::bind(&config.address).map_err(|source| DaemonError::Listen {
            path: config.address.clone(),
            source,
        })?;
        let service = Snapshots::new(
            store.clone(),
            drivers.clone(),
            metrics,
            config.rpc_timeout.0,
        );
        let (stop_serving, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(
            tonic::transport::Server::builder()
                // containerd sends everything over one connection.
                .max_concurrent_streams(STREAMS)
                .add_service(service.into_server())
                .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                    // A dropped sender means the same.
                    let _ = stopped.await;
                }),
        );
        tokio::spawn(recover(drivers.clone(), progress));
        tracing::info!(
            address = %config.address.display(),
            root = %config.root.display(),
            version = env!("CARGO_PKG_VERSION"),
            "serving"
        );
        Ok(Self {
            config,
            drivers,
            store,
            serving,
            stop_serving: Some(stop_serving),
            recovered,
            _admin: admin,
            _metrics: scrape,
            _locks: locks,
        })
    }

    /// The effective configuration.
    pub fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// The metadata store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The drivers.
    pub fn drivers(&self) -> &Drivers {
        &self.drivers
    }

    /// Waits for the work behind the start and returns what went wrong in it.
    pub async fn recovered(&self) -> Vec<String> {
        let mut progress = self.recovered.clone();
        let done = progress
            .wait_for(|progress| matches!(progress, Recovery::Done(_)))
            .await;
        match done.as_deref() {
            Ok(Recovery::Done(problems)) => problems.clone(),
            _ => vec!["recovery was interrupted".to_owned()],
        }
    }

    /// Ends: requests in progress get a few seconds, then the drivers stop. With `keep_mounts`
    /// containers go on and a successor takes over.
    pub async fn stop(mut self, keep_mounts: bool) -> Result<(), DaemonError> {
        drop(self.stop_serving.take());
        if let Ok(ended) = tokio::time::timeout(DRAIN, &mut self.serving).await {
            ended??;
        } else {
            tracing::warn!("requests were still running at the end");
            self.serving.abort();
        }
        for driver in self.drivers.iter() {
            driver.stop(keep_mounts).await?;
        }
        self.store.flush().await?;
        Ok(())
    }
}

/// Everything that only takes local file operations and must come first.
fn open(config: &Config) -> Result<(Store, Vec<Lock>), DaemonError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut locks = Vec::new();
    let mut directories = vec![&config.root, &config.state, &config.lowers];
    directories.sort();
    directories.dedup();
    for path in directories {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        made.map_err(|source| DaemonError::Directory {
            path: path.clone(),
            source,
        })?;
        locks.push(Lock::acquire(path)?);
    }
    let store = Store::open(&config.store_path())?;
    for lock in &mut locks {
        lock.set_writer(store.writer_thread())
            .map_err(|source| DaemonError::Directory {
                path: config.root.clone(),
                source,
            })?;
    }
    Ok((store, locks))
}

async fn recover(drivers: Drivers, progress: watch::Sender<Recovery>) {
    let mut problems = Vec::new();
    for driver in drivers.iter() {
        if let Err(error) = driver.recover().await {
            let error = logging::chain(&error);
            tracing::error!(driver = driver.name(), error, "recovery");
            problems.push(format!("{}: {error}", driver.name()));
        }
    }
    tracing::info!(problems = problems.len(), "recovered");
    // Nobody may be interested.
    let _ = progress.send(Recovery::Done(problems));
}

/// What the store knows anyway, at scrape time.
fn collect(metrics: &Metrics, store: &Store) {
    let store = store.clone();
    metrics.collect(move |scrape| {
        let counts = store.read().and_then(|reader| reader.counts());
        for (snapshotter, kind, count) in counts.unwrap_or_default() {
            #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
            scrape.sample(
                &defs::SNAPSHOTS,
                &[&snapshotter, kind.as_str()],
                count as f64,
            );
        }
        if let Ok(metadata) = fs::metadata(store.path()) {
            #[expect(clippy::cast_precision_loss, reason = "sizes stay far below 2^52")]
            scrape.sample(&defs::STORE_SIZE_BYTES, &[], metadata.len() as f64);
        }
    });
}
