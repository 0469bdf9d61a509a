//! The durable outcome of hydration, `proof.json`.

use std::{io, path::Path};

use formats::digest::Digest;
use serde::{Deserialize, Serialize};

use super::{Judged, Verdict};
use crate::cache::files;

const VERSION: u32 = 1;
const NAME: &str = "proof.json";

/// What is known about a layer once the ordered pass is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The layer's identity: a record of another one does not count.
    pub identity: Digest,
    /// Digest that the compressed stream has.
    pub layer_digest: Digest,
    /// DiffID of the tar in that stream, if it was taken and the stream is the layer's.
    #[serde(default)]
    pub diff_id: Option<Digest>,
    /// The outcome.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// All chunks are in `data`, verified, and were durable before this was written.
    pub complete: bool,
}

impl Record {
    pub(super) fn new(
        identity: Digest,
        layer_digest: Digest,
        judged: Judged,
        complete: bool,
    ) -> Self {
        Self {
            version: VERSION,
            identity,
            layer_digest,
            diff_id: judged.diff_id,
            verdict: judged.verdict,
            complete,
        }
    }

    /// The record in `dir`; none if there is none, or one of another identity or version, or one
    /// that cannot be read: the pass is then simply made again.
    pub(super) fn load(dir: &Path, identity: Digest) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(dir.join(NAME)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Option<Self> = serde_json::from_slice(&bytes).ok();
        Ok(record.filter(|r| r.version == VERSION && r.identity == identity))
    }

    /// Writes the record durably. Blocks.
    pub(super) fn store(&self, dir: &Path) -> io::Result<()> {
        let path = dir.join(NAME);
        let new = dir.join("proof.json.new");
        let mut text = serde_json::to_vec_pretty(self).map_err(io::Error::from)?;
        text.push(b'\n');
        let file = files::create(&new)?;
        file.write_all_at(&text, 0)?;
        file.sync()?;
        files::rename(&new, &path)?;
        files::sync_parent(&path)
    }
}
