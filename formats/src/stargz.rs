//! eStargz layers: a tar whose every file starts a gzip member of its own, followed by an index
//! (the TOC) and a footer that says where the index is.
//!
//! Reading goes [`parse_footer`] over the last bytes of the blob, [`inflate_toc`] over the bytes
//! that the footer names, [`parse_toc`] over the JSON, and later [`decode_chunk`] for each chunk of
//! the resulting [`BlobMap`](crate::blobmap::BlobMap). The byte layouts are described in
//! `docs/formats/estargz.md`.
//!
//! Trust: the digest that a manifest binds is that of the JSON bytes ([`StargzLayer::toc_digest`]);
//! the TOC binds every chunk by its digest. What the TOC *claims* about the tar (and so about the
//! DiffID) is checked by [`proof`](crate::proof).

mod chunk;
mod entry;
mod footer;
mod landmark;
mod layout;
mod time;
mod toc;
mod writer;

pub use chunk::{ChunkError, decode_chunk};
pub use footer::{Footer, FooterError, FooterKind, MAX_FOOTER_LEN, parse_footer};
pub(crate) use landmark::is_landmark_name;
pub use landmark::{LANDMARK_CONTENT, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK};
pub use time::toc_mtime;
pub use toc::{StargzLayer, StartList, TocError, inflate_toc, parse_toc};

pub use writer::{Built, WriteError, WriterOptions, build};

pub use crate::tree::NotLazyReason;

/// Name of the tar entry that holds the TOC.
pub const TOC_TAR_NAME: &str = "stargz.index.json";
