//! Lazy layers through the daemon's socket, as containerd's unpacker drives it: the daemon's
//! program, a lab registry, real BlobFs, EROFS and overlay mounts.

mod ahead;
mod chains;
mod fixture;
mod forged;
mod memory;
mod reasons;
mod restart;
mod simple;
mod status;
