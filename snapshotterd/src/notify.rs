//! Telling systemd how far the daemon is (`sd_notify(3)`).

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// The supervisor's socket, when there is one.
#[derive(Clone, Debug, Default)]
pub struct Notify {
    socket: Option<OsString>,
}

impl Notify {
    /// Speaks to the socket named by `NOTIFY_SOCKET`, which the caller has read.
    pub fn new(socket: Option<OsString>) -> Self {
        Self {
            socket: socket.filter(|name| !name.is_empty()),
        }
    }

    /// Requests are answered from now on.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=serving");
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// A line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.send(&format!("STATUS={line}"));
    }

    fn send(&self, message: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = send(socket, message.as_bytes())
        {
            tracing::warn!(%error, socket = %socket.display(), "cannot notify the supervisor");
        }
    }
}

fn send(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let datagram = UnixDatagram::unbound()?;
    datagram.set_nonblocking(true)?;
    datagram.send_to_addr(message, &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_a_socket_by_path() -> io::Result<()> {
        let temp = tempfile::tempdir()?;
        let path = temp.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        Notify::new(Some(path.into())).ready();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer)?;
        assert!(buffer[..length].starts_with(b"READY=1\n"));
        // Nobody to tell: nothing happens.
        Notify::new(None).stopping();
        Ok(())
    }
}
