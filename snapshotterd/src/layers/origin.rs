//! Fetches a layer's bytes from any of the images that name it.

use std::{collections::HashMap, ops::Range, sync::Arc};

use parking_lot::Mutex;
use storage::{
    ranges::{FetchError, FetchFailure, RangeBody, RangeSource},
    source::{BoxFuture, Cause},
};

use super::{record::LayerNumber, table::LayerTable};
use crate::resolve::remote::{Remote, RemoteError};

/// The bytes of a layer, from the images in its record, latest first.
pub struct OriginSource {
    shared: Arc<Shared>,
}

struct Shared {
    layer: LayerNumber,
    name: String,
    len: u64,
    table: Arc<LayerTable>,
    remote: Arc<dyn Remote>,
    open: Mutex<HashMap<String, Arc<dyn RangeSource>>>,
}

impl OriginSource {
    /// The blob of `layer`, which has `len` bytes; `name` names it in errors.
    pub fn new(
        layer: LayerNumber,
        name: String,
        len: u64,
        table: Arc<LayerTable>,
        remote: Arc<dyn Remote>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                layer,
                name,
                len,
                table,
                remote,
                open: Mutex::default(),
            }),
        }
    }
}

impl Shared {
    fn source(
        &self,
        image: &str,
        digest: formats::digest::Digest,
    ) -> Result<Arc<dyn RangeSource>, RemoteError> {
        if let Some(source) = self.open.lock().get(image) {
            return Ok(Arc::clone(source));
        }
        let source = self.remote.blob(image, digest, self.len)?;
        self.open
            .lock()
            .insert(image.to_owned(), Arc::clone(&source));
        Ok(source)
    }

    async fn fetch(&self, range: Range<u64>, cause: Cause) -> Result<RangeBody, FetchError> {
        let failed = |failure, error: RemoteError| FetchError::Source {
            origin: self.name.clone(),
            range: range.clone(),
            failure,
            source: Arc::new(error),
        };
        let Some(record) = self.table.layer(self.layer) else {
            return Err(failed(
                FetchFailure::Local,
                RemoteError {
                    detail: "the layer was removed".to_owned(),
                    transient: false,
                },
            ));
        };
        let mut last = None;
        let mut tried: Vec<&str> = Vec::new();
        for origin in &record.origins {
            if tried.contains(&origin.image.as_str()) {
                continue;
            }
            tried.push(&origin.image);
            let result = match self.source(&origin.image, record.identity.layer) {
                Ok(source) => source.fetch(range.clone(), cause).await,
                Err(error) => {
                    let failure = if error.transient {
                        FetchFailure::Unreachable
                    } else {
                        FetchFailure::Invalid
                    };
                    Err(failed(failure, error))
                }
            };
            match result {
                Ok(body) => return Ok(body),
                // Worth waiting for counts more than gone for good.
                Err(error) => {
                    if last
                        .as_ref()
                        .is_none_or(|last: &FetchError| !last.is_transient())
                    {
                        last = Some(error);
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            failed(
                FetchFailure::Missing,
                RemoteError {
                    detail: "no image is known that names the layer".to_owned(),
                    transient: false,
                },
            )
        }))
    }
}

impl RangeSource for OriginSource {
    fn len(&self) -> u64 {
        self.shared.len
    }

    fn origin(&self) -> String {
        self.shared.name.clone()
    }

    fn fetch(
        &self,
        range: Range<u64>,
        cause: Cause,
    ) -> BoxFuture<'static, Result<RangeBody, FetchError>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.fetch(range, cause).await })
    }
}

impl std::fmt::Debug for OriginSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OriginSource")
            .field("name", &self.shared.name)
            .field("len", &self.shared.len)
            .finish_non_exhaustive()
    }
}
