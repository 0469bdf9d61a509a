//! Binding a unix socket over what a predecessor left.

use std::{
    fs, io,
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
        net,
    },
    path::Path,
};

use rustix::net::sockopt::socket_peercred;
use tokio::net::UnixListener;

use crate::lock;

/// Listens on `path` with mode 0600, in a directory that is made when missing. A socket that
/// belongs to a living process is an error; one left by a dead daemon is replaced atomically, so
/// that nobody ever finds none.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
    }
    if let Some(pid) = owner(path)? {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("process {pid} is listening on {}", path.display()),
        ));
    }
    // Short, because a socket's path has at most 107 bytes and `path` may use most of them.
    let temporary = path.with_file_name(format!(".{}", std::process::id()));
    remove(&temporary)?;
    let listener = net::UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    fs::rename(&temporary, path)?;
    UnixListener::from_std(listener)
}

/// The living process that listens on `path`. A killed daemon whose last thread still waits in the
/// kernel keeps its sockets open; it does not count.
fn owner(path: &Path) -> io::Result<Option<u32>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} exists and is not a socket", path.display()),
            ));
        }
        Ok(_) => {}
    }
    let stream = match connect(path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let pid = socket_peercred(&stream)?
        .pid
        .as_raw_nonzero()
        .get()
        .unsigned_abs();
    Ok(lock::process_is_alive(pid).then_some(pid))
}

/// Connects without waiting: the backlog of a hung listener may be full.
pub(crate) fn connect(path: &Path) -> io::Result<rustix::fd::OwnedFd> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn replaces_the_dead_and_respects_the_living() -> io::Result<()> {
        let temp = tempfile::tempdir()?;
        let path = temp.path().join("deep/er/s.sock");
        let first = bind(&path)?;
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        let error = bind(&path).expect_err("in use");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(first);
        let second = bind(&path)?;
        tokio::net::UnixStream::connect(&path).await?;
        drop(second);
        fs::remove_file(&path)?;
        fs::write(&path, b"not a socket")?;
        assert!(bind(&path).is_err());
        Ok(())
    }
}
