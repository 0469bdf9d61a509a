//! Mounting from a process that may be killed.
//!
//! Anything that can reach BlobFs from within (mount, umount, statfs, a path walk) can wait for
//! the daemon; done by a thread of the daemon itself it would pin a killed daemon's locks for as
//! long as nobody serves. So it happens in a short-lived process with a file table of its own:
//! [`Helper`] is the parent's side, [`run_child`] the child's. [`mountinfo`] reads what is mounted
//! without touching any of it.

mod child;
mod helper;
mod mountinfo;
pub(crate) mod request;

pub use child::run_child;
pub use helper::{ErofsMount, Helper, HelperError, Leftover, OverlayMount, ReadReport, StatFs};
pub use mountinfo::{MountInfo, mountinfo, parse_mountinfo};
