//! The index of a layer on disk, and what it parses to.

use std::{fs, io, path::PathBuf};

use formats::{
    digest::Digest,
    limits::Limits,
    stargz::{StargzLayer, TocError, parse_toc},
    units::RemoteOffset,
};
use serde::{Deserialize, Serialize};

use super::{dir::LayerDir, dir::write_whole, record::LayerRecord};

/// Why a layer's index cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not the index that the identity names.
    #[error("{} has digest {actual}, expected {expected}", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// What the identity says.
        expected: Digest,
        /// What is there.
        actual: Digest,
    },
    /// It does not parse.
    #[error("{}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: TocError,
    },
}

/// Where in the blob the index was.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Place {
    toc_offset: u64,
}

/// Keeps the index. Blocks.
pub fn save(dir: &LayerDir, json: &[u8], toc_offset: RemoteOffset) -> io::Result<()> {
    let place = Place {
        toc_offset: toc_offset.0,
    };
    let place = serde_json::to_vec(&place).map_err(io::Error::other)?;
    write_whole(&dir.toc().with_extension("place"), &place)?;
    write_whole(&dir.toc(), json)
}

/// Reads and parses the index. Blocks, and takes a while for large layers.
pub fn load(
    dir: &LayerDir,
    record: &LayerRecord,
    limits: &Limits,
) -> Result<StargzLayer, IndexError> {
    let path = dir.toc();
    let read = |path: PathBuf| match fs::read(&path) {
        Ok(bytes) => Ok(bytes),
        Err(source) => Err(IndexError::Read { path, source }),
    };
    let json = read(path.clone())?;
    let actual = Digest::of(&json);
    if actual != record.identity.index {
        return Err(IndexError::Digest {
            path,
            expected: record.identity.index,
            actual,
        });
    }
    let place = dir.toc().with_extension("place");
    let place: Place =
        serde_json::from_slice(&read(place.clone())?).map_err(|error| IndexError::Read {
            path: place,
            source: error.into(),
        })?;
    parse_toc(&json, RemoteOffset(place.toc_offset), limits)
        .map_err(|source| IndexError::Parse { path, source })
}
