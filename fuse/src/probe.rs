//! What this kernel can do, tried with real mounts.

use std::{ops::Range, path::PathBuf};

/// An EROFS image with one device, and what is in it.
#[derive(Clone, Debug)]
pub struct ProbeImage {
    /// The metadata image.
    pub metadata: Vec<u8>,
    /// The bytes of its data device.
    pub device: Vec<u8>,
    /// A file of the image whose data is served, relative to its root.
    pub ready: PathBuf,
    /// A file of the image whose data is stalled.
    pub stalled: PathBuf,
    /// Where `stalled` lies in the device.
    pub stalled_range: Range<u64>,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It works.
    Works,
    /// It does not, and why.
    Fails(String),
    /// It could not be tried, and why.
    Untried(String),
}

/// What a probe found.
#[derive(Clone, Debug)]
pub struct ProbeReport {
    /// A FUSE session can be mounted and read.
    pub fuse: Finding,
    /// EROFS mounts with its device on FUSE.
    pub erofs_on_fuse: Finding,
    /// Two overlays stack on top of it.
    pub two_overlays: Finding,
    /// A reader of a stalled range that gets signals sees no error.
    pub signalled_reader: Finding,
    /// A reader of a stalled range dies when killed.
    pub killed_reader: Finding,
}
