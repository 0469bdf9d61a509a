//! The ordered pass over an eStargz layer.

use std::{io, sync::Arc};

use formats::{
    digest::Digest,
    gzip::Inflater,
    limits::Limits,
    proof::{self, Prover},
    stargz::StargzLayer,
};

use super::{ChunkSink, Judged, Prove, Verdict};
use crate::ranges::report;

const STEP: usize = 256 << 10;

/// Judges an eStargz layer: its tar must hash to the DiffID and make the tree that is served.
#[derive(Clone, Debug)]
pub struct StargzProof {
    /// The layer as its TOC describes it, and as it is served.
    pub layer: Arc<StargzLayer>,
    /// What the image claims the layer to be.
    pub diff_id: Digest,
    /// Bounds for the tar.
    pub limits: Limits,
}

impl Prove for StargzProof {
    fn prove(&self, compressed: &mut dyn io::Read, sink: &mut ChunkSink<'_>) -> io::Result<Judged> {
        let Judged { diff_id, verdict } = self.judge(compressed, sink)?;
        let verdict = match (diff_id, verdict) {
            (Some(actual), verdict) if actual != self.diff_id => {
                let mut reasons = vec![format!(
                    "the image claims DiffID {}, the tar has {actual}",
                    self.diff_id
                )];
                if let Verdict::Refuted { reasons: more } = verdict {
                    reasons.extend(more);
                }
                Verdict::Refuted { reasons }
            }
            (_, verdict) => verdict,
        };
        Ok(Judged { diff_id, verdict })
    }
}

impl StargzProof {
    /// As [`Prove::prove`], without regard to the DiffID claimed.
    pub fn judge(
        &self,
        compressed: &mut dyn io::Read,
        sink: &mut ChunkSink<'_>,
    ) -> io::Result<Judged> {
        let mut prover = Prover::new(&self.layer, self.diff_id, self.limits);
        let mut inflater = Inflater::new(self.limits.max_decoded_bytes);
        let mut buf = vec![0; STEP];
        loop {
            let n = match compressed.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut tar = |bytes: &[u8]| prover.push(bytes, &mut *sink);
            if let Err(error) = inflater.push(&buf[..n], &mut tar) {
                return Ok(undecodable(&error));
            }
        }
        if let Err(error) = inflater.finish() {
            return Ok(undecodable(&error));
        }
        let (diff_id, verdict) = prover.judge();
        let verdict = match verdict {
            proof::Verdict::Proven => Verdict::Proven,
            proof::Verdict::Refuted(mismatches) => Verdict::Refuted {
                reasons: mismatches.iter().map(ToString::to_string).collect(),
            },
            proof::Verdict::Unprovable(reason) => Verdict::Unprovable {
                reason: report(&reason),
            },
        };
        Ok(Judged {
            diff_id: Some(diff_id),
            verdict,
        })
    }
}

/// What does not inflate is no tar, whatever its DiffID.
fn undecodable(error: &dyn std::error::Error) -> Judged {
    let reasons = vec![format!("the blob does not decode: {}", report(error))];
    Verdict::Refuted { reasons }.into()
}
