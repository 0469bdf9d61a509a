//! The unsafe island: memory shared with the kernel and other processes, and the few system calls
//! that have no safe wrapper. Everything above it is safe code.
#![deny(unsafe_op_in_unsafe_fn)]

pub(crate) mod abi;
pub(crate) mod arena;
pub(crate) mod device;
pub(crate) mod map;
pub(crate) mod signals;
pub(crate) mod socket;

// FUSE messages are in host order and the table is little-endian; read as one, both hold here.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "only little-endian hosts are supported"
);
