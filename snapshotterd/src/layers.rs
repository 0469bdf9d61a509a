//! Layers of the node: identity to index, blob, EROFS image and mount.
