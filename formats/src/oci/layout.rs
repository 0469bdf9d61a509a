//! The OCI image layout: `oci-layout`, `index.json` and `blobs/`.

use serde::{Deserialize, Serialize};

use super::{OciError, json};
use crate::digest::Digest;

/// The layout version that is written.
pub const LAYOUT_VERSION: &str = "1.0.0";

/// The file `oci-layout`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OciLayout {
    /// Version of the layout.
    #[serde(rename = "imageLayoutVersion")]
    pub image_layout_version: String,
}

impl OciLayout {
    /// Reads the file and checks its version.
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        let layout: Self = json("oci-layout", bytes)?;
        if !layout.image_layout_version.starts_with("1.") {
            return Err(OciError::LayoutVersion(layout.image_layout_version));
        }
        Ok(layout)
    }

    /// The file's content.
    pub fn to_json(&self) -> Vec<u8> {
        super::to_json(self)
    }
}

impl Default for OciLayout {
    fn default() -> Self {
        Self {
            image_layout_version: LAYOUT_VERSION.to_owned(),
        }
    }
}

/// Path of a blob relative to the layout's directory.
pub fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
