//! Resolving all layers of an image at once.
