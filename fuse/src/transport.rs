//! Reads requests from the device and carries answers back: steps 4 to 7 and 10 of the protocol.
//!
//! Knows nothing of what a request means; [`crate::blobfs`] does.

mod channel;
pub(crate) mod init;
mod reader;
mod session;

#[cfg(test)]
pub(crate) use channel::Channel;
pub(crate) use reader::{Handler, Readers};
#[cfg(test)]
pub(crate) use session::Received;
pub(crate) use session::{Session, Ticket};
