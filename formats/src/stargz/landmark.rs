//! Landmarks: files of one byte that say where the start list of a layer ends.

/// Everything in front of this file is worth fetching before the first start.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Nothing is worth fetching ahead.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// What a landmark holds.
pub const LANDMARK_CONTENT: [u8; 1] = [0x0f];

/// Whether a cleaned path is the name of a landmark. A file of this name is one if it is a regular
/// file that holds exactly [`LANDMARK_CONTENT`]; anything else is an ordinary file.
pub(crate) fn is_landmark_name(cleaned: &[u8]) -> bool {
    cleaned == PREFETCH_LANDMARK.as_bytes() || cleaned == NO_PREFETCH_LANDMARK.as_bytes()
}
