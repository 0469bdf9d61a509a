//! What is claimed and what is proven about a layer.
//!
//! containerd derives chain IDs from the DiffIDs of an image's config, and a lazy answer commits
//! content under a chain ID that nobody has checked. [`TocProver`] checks it while the layer
//! hydrates: its tar must make the served tree, and the DiffID that the tar has is recorded. What
//! an image claims is compared with that (`Layers::trusted`), so that a false claim costs the image
//! that makes it, not the others that name the same layer. The comparison of trees is
//! [`StargzProof`]'s; this module gives it the index.

use std::{io, sync::Arc};

use formats::digest::Digest;
use storage::{
    hydrate::{ChunkSink, Judged, Prove, StargzProof, Verdict},
    ranges::report,
};

use crate::{
    layers::{
        blobs::Opener,
        record::{LayerNumber, LayerRecord, Origin},
    },
    resolve::plan::{Documents, Unknown},
};

/// Proves one eStargz layer.
#[derive(Debug)]
pub struct TocProver {
    opener: Opener,
    number: LayerNumber,
    documents: Documents,
    runtime: tokio::runtime::Handle,
}

impl TocProver {
    /// A prover for layer `number`. Its index is read when the pass begins and dropped when it
    /// ends.
    pub fn new(
        opener: Opener,
        number: LayerNumber,
        documents: Documents,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self {
            opener,
            number,
            documents,
            runtime,
        }
    }

    /// A DiffID that is claimed. Pulls that name no manifest leave it open at first.
    fn claim(&self, record: &LayerRecord) -> io::Result<Result<Digest, String>> {
        if let Some(claim) = record.diff_id {
            return Ok(Ok(claim));
        }
        let mut reasons = Vec::new();
        for origin in &record.origins {
            let found = self
                .runtime
                .block_on(self.documents.find_diff_id(origin, &record.identity));
            match found {
                Ok(found) => {
                    self.keep_claim(origin, found)?;
                    return Ok(Ok(found));
                }
                Err(Unknown::Never(reason)) => reasons.push(reason),
                Err(Unknown::Now(reason)) => return Err(io::Error::other(reason)),
            }
        }
        Ok(Err(format!(
            "no image config names its DiffID: {}",
            reasons.join("; ")
        )))
    }
}

impl Prove for TocProver {
    fn prove(&self, compressed: &mut dyn io::Read, sink: &mut ChunkSink<'_>) -> io::Result<Judged> {
        let record = self
            .opener
            .table
            .layer(self.number)
            .ok_or_else(|| io::Error::other("the layer was removed"))?;
        let claim = match self.claim(&record)? {
            Ok(claim) => claim,
            Err(reason) => return Ok(Verdict::Unprovable { reason }.into()),
        };
        let limits = self.opener.limits;
        let layer = self
            .opener
            .load(&record)
            .map_err(|error| io::Error::other(report(&error)))?;
        let proof = StargzProof {
            layer: Arc::new(layer),
            diff_id: claim,
            limits,
        };
        proof.judge(compressed, sink)
    }
}

impl TocProver {
    fn keep_claim(&self, origin: &Origin, claim: Digest) -> io::Result<()> {
        let claimed = Origin {
            diff_id: Some(claim),
            ..origin.clone()
        };
        self.update(move |record| {
            record.diff_id = record.diff_id.or(Some(claim));
            record.claim(&claimed);
            true
        })
    }

    fn update(
        &self,
        change: impl FnMut(&mut LayerRecord) -> bool + Send + 'static,
    ) -> io::Result<()> {
        let update = self
            .opener
            .table
            .update(self.number, crate::store::Durability::Soon, change);
        self.runtime
            .block_on(update)
            .map(drop)
            .map_err(|error| io::Error::other(report(&error)))
    }
}
