//! Image layer formats: bytes in, structures out, and back.
//!
//! This crate performs no I/O, spawns no thread, reads no environment and knows no async runtime.
//! Every parser takes explicit [`limits::Limits`], uses checked arithmetic and answers hostile
//! input with a typed error that carries the offset.
//!
//! Entry points: [`tree::LayerTree`] (the one in-memory tree) and [`tree::Builder`] (what the
//! entries of a layer make of it), [`blobmap::BlobMap`] (where decoded bytes come from),
//! [`tar::Parser`] and [`gzip::Inflater`] (streaming parsers), [`stargz`] (eStargz layers),
//! [`proof::Prover`] (is a served layer the one it claims to be), [`erofs`] (metadata images), [`oci`] (image documents).
#![forbid(unsafe_code)]

pub mod blobmap;
pub mod digest;
pub mod erofs;
pub mod gzip;
pub mod limits;
pub mod oci;
pub mod proof;
pub mod stargz;
pub mod tar;
pub mod tree;
pub mod units;
