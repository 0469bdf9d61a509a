//! Starts hydration and records how it ended.

use std::{sync::Arc, time::Duration};

use formats::digest::Digest;
use storage::{
    cache::LayerBlob,
    hydrate::{self, HydrateOptions, Mode, Record},
};
use tracing::{Instrument as _, error, info, info_span, warn};

use super::{
    Layers,
    record::{LayerNumber, LayerRecord, Verdict},
};
use crate::{
    config::Hydration,
    metrics::defs,
    store::{Durability, StoreError},
    trust::TocProver,
};

/// A verdict that could not be recorded is recorded after this time.
const RECORD_AGAIN: Duration = Duration::from_secs(30);

impl From<Hydration> for Mode {
    fn from(mode: Hydration) -> Self {
        match mode {
            Hydration::Full => Self::Full,
            Hydration::Idle => Self::Idle,
            Hydration::Off => Self::Off,
        }
    }
}

fn describe_digest(digest: Option<Digest>) -> String {
    digest.map_or_else(String::new, |digest| digest.to_string())
}

impl Layers {
    /// Hydrates a layer as configured, once its start list has been asked for.
    pub(super) fn hydrate_later(self: &Arc<Self>, record: &LayerRecord, blob: &Arc<LayerBlob>) {
        self.hydrate(record, blob, self.config.lazy.hydration.into());
    }

    /// Hydrates a layer whatever is configured.
    pub(super) fn hydrate_now(self: &Arc<Self>, record: &LayerRecord, blob: &Arc<LayerBlob>) {
        self.hydrate(record, blob, Mode::Full);
    }

    fn hydrate(self: &Arc<Self>, record: &LayerRecord, blob: &Arc<LayerBlob>, mode: Mode) {
        let number = record.number;
        let prover = TocProver::new(
            self.opener().clone(),
            number,
            self.documents.clone(),
            tokio::runtime::Handle::current(),
        );
        blob.hydrate(HydrateOptions {
            layer_digest: record.identity.layer,
            mode,
            prover: Arc::new(prover),
        });
        if !self.watched.lock().insert(number) {
            return;
        }
        // Weak by nature: it ends when the blob goes.
        let over = blob.hydrated();
        let this = Arc::clone(self);
        let watch = async move {
            let record = over.await;
            if let Some(record) = record {
                // The disk may be full; a refuted layer is refused only once that is recorded.
                while let Err(error) = this.conclude(number, &record).await {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot record a verdict; it is tried again"
                    );
                    tokio::time::sleep(RECORD_AGAIN).await;
                }
            }
            // Only now: whoever waits for the verdict reads it from the table.
            this.watched.lock().remove(&number);
        };
        tokio::spawn(watch.instrument(info_span!("hydration", layer = %record.identity.layer)));
    }

    /// Records the outcome of the ordered pass.
    async fn conclude(&self, number: LayerNumber, outcome: &Record) -> Result<(), StoreError> {
        let verdict = match &outcome.verdict {
            hydrate::Verdict::Proven => Verdict::Proven,
            hydrate::Verdict::Refuted { reasons } => Verdict::Refuted(reasons.join("; ")),
            hydrate::Verdict::Unprovable { reason } => Verdict::Unprovable(reason.clone()),
        };
        let (complete, actual) = (outcome.complete, outcome.diff_id);
        // The proof is on disk beside the blob; what is lost here is read from there again.
        let durability = match verdict {
            Verdict::Refuted(_) => Durability::Now,
            _ => Durability::Soon,
        };
        let record = self
            .table
            .update(number, durability, move |record| {
                record.verdict = verdict.clone();
                record.complete = complete;
                // What claims are compared with from now on.
                record.content_diff_id = actual;
                true
            })
            .await?;
        let Some(record) = record else {
            return Ok(());
        };
        let verdict = record.verdict.name();
        self.metrics
            .counter(&defs::LAZY_VERDICTS_TOTAL, &[verdict])
            .increment();
        let image = record.origins.first().map_or("", |o| o.image.as_str());
        let layer = record.identity.layer;
        if let Verdict::Refuted(why) = &record.verdict {
            error!(
                image,
                %layer,
                why,
                "layer REFUTED: its content is not what the image claims; new containers are refused"
            );
        } else {
            info!(image, %layer, verdict, complete, "hydrated");
        }
        for liar in record.false_claims() {
            error!(
                image = liar.image,
                %layer,
                claim = %describe_digest(liar.diff_id),
                content = %describe_digest(record.content_diff_id),
                "DiffID REFUTED: the image claims one that its layer does not have; new containers \
                 of it are refused, other images with the layer are not concerned"
            );
        }
        Ok(())
    }

    /// The layers that hold `digest` (a layer digest), or all.
    pub(super) fn matching(&self, digest: Option<Digest>) -> Vec<Arc<LayerRecord>> {
        let mut layers = self.table.layers();
        layers.retain(|record| {
            record.ready && digest.is_none_or(|digest| record.identity.layer == digest)
        });
        layers
    }
}
