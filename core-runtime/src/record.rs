//! The list of files a start touches, in order.
//!
//! The file format is JSON lines `{"path":…,"manifestDigest":…,"layerIndex":…}`, the one that
//! stargz-snapshotter's tools write and read.

pub mod recorder;

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read, Write},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// Records longer than this are refused: no image has more files.
const MAX_ENTRIES: usize = 4_000_000;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Its path in the image, without a leading slash.
    pub path: String,
    /// The manifest the record was taken of.
    #[serde(default)]
    pub manifest_digest: String,
    /// The layer that holds it, bottom first.
    pub layer_index: usize,
}

/// A record in the order of first access.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its entries.
    pub entries: Vec<Entry>,
}

impl Record {
    /// Reads a record file.
    pub fn read(from: impl Read) -> Result<Self> {
        let mut entries = Vec::new();
        for (number, line) in BufReader::new(from).lines().enumerate() {
            let line = line.context("reading the record")?;
            if line.trim().is_empty() {
                continue;
            }
            anyhow::ensure!(
                entries.len() < MAX_ENTRIES,
                "the record has more than {MAX_ENTRIES} lines"
            );
            let entry = serde_json::from_str(&line).with_context(|| {
                format!(
                    "line {} of the record is not {{\"path\":…,\"layerIndex\":…}}",
                    number + 1
                )
            })?;
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// Writes it.
    pub fn write(&self, mut to: impl Write) -> Result<()> {
        for entry in &self.entries {
            serde_json::to_writer(&mut to, entry)?;
            to.write_all(b"\n")?;
        }
        to.flush()?;
        Ok(())
    }

    /// Paths of one layer in order, each once.
    pub fn of_layer(&self, index: usize) -> Vec<Vec<u8>> {
        let mut seen = BTreeSet::new();
        let of_layer = self
            .entries
            .iter()
            .filter(|entry| entry.layer_index == index);
        let paths = of_layer.map(|entry| entry.path.trim_start_matches('/').as_bytes().to_vec());
        paths.filter(|path| seen.insert(path.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_split_by_layer() {
        let text = "{\"path\":\"a/b\",\"manifestDigest\":\"sha256:0\",\"layerIndex\":1}\n\n\
                    {\"path\":\"/c\",\"layerIndex\":0}\n{\"path\":\"a/b\",\"layerIndex\":1}\n";
        let record = Record::read(text.as_bytes()).unwrap();
        assert_eq!(record.of_layer(1), [b"a/b".to_vec()]);
        assert_eq!(record.of_layer(0), [b"c".to_vec()]);
        let mut bytes = Vec::new();
        record.write(&mut bytes).unwrap();
        assert_eq!(Record::read(bytes.as_slice()).unwrap(), record);
        let error = Record::read("{}".as_bytes()).unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error:#}");
    }
}
