//! Metadata-only EROFS images: the form in which the kernel is given a layer's tree.
//!
//! [`write()`] makes an image that holds inodes, directories, symlinks and xattrs; the bytes of
//! regular files lie on one extra device, which is the layer's decoded address space.
//! [`Image`] reads such images, and uncompressed foreign ones, back into a
//! [`LayerTree`](crate::tree::LayerTree).
//!
//! The layouts and their source are described in `docs/formats/erofs.md`. All numbers on disk are
//! little-endian.

mod chunks;
mod dirents;
mod layout;
mod reader;
mod writer;
mod xattr;

pub use reader::{Image, ReadError};
pub use writer::{InodeProblem, WriteError, write};
pub use xattr::is_presented as is_xattr_presented;

#[cfg(test)]
mod tests;
