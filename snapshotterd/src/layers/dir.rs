//! The directory of one layer: `<root>/layers/<number>`.
//!
//! | path | what it is |
//! |---|---|
//! | `identity.json` | the layer's identity, for people and for repair |
//! | `toc.json` | the index as fetched; verified by its digest whenever it is read |
//! | `meta/<variant>.erofs` | metadata images |
//! | `meta/<variant>.json` | the inherited attributes that a variant was made with |
//! | `blob/` | the cache (`storage::cache`): `wire`, `data`, maps, `proof.json` |

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::record::{Identity, LayerNumber};

/// Paths of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDir {
    path: PathBuf,
}

impl LayerDir {
    /// The directory of layer `number` below `layers`.
    pub fn new(layers: &Path, number: LayerNumber) -> Self {
        Self {
            path: layers.join(number.to_string()),
        }
    }

    /// Makes it anew. What is there belongs to a number that a crash has taken back.
    pub fn create(&self, identity: &Identity) -> io::Result<()> {
        self.remove()?;
        fs::create_dir_all(self.path.join("meta"))?;
        fs::create_dir_all(self.blob())?;
        let text = serde_json::to_vec_pretty(identity).map_err(io::Error::other)?;
        fs::write(self.path.join("identity.json"), text)
    }

    /// Deletes it with all it holds.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cache's folder.
    pub fn blob(&self) -> PathBuf {
        self.path.join("blob")
    }

    /// The decoded bytes: the device of the EROFS image.
    pub fn data(&self) -> PathBuf {
        self.path.join("blob/data")
    }

    /// The index.
    pub fn toc(&self) -> PathBuf {
        self.path.join("toc.json")
    }

    /// A metadata image.
    pub fn metadata(&self, variant: &str) -> PathBuf {
        self.path.join("meta").join(format!("{variant}.erofs"))
    }

    /// What a variant was made with.
    pub fn inherited(&self, variant: &str) -> PathBuf {
        self.path.join("meta").join(format!("{variant}.json"))
    }
}

/// Writes a whole file so that after a crash it is either there, complete, or not. Blocks.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_added_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    drop(file);
    fs::rename(&temporary, path)
}
