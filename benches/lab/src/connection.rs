//! One accepted connection: its number, its window, and a stream that tells when it was flushed.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use rustix::net::sockopt::set_socket_linger;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::link::{Link, Window};

/// Which listener a connection came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// The registry.
    Main,
    /// Where blob redirects lead.
    Storage,
    /// Control: not shaped, not logged, there while the registry is gone.
    Admin,
}

/// What the requests of a connection share.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: u64,
    pub(crate) port: Port,
    pub(crate) link: Option<(Arc<Link>, Arc<Mutex<Window>>)>,
    /// The socket, to change what closing it means.
    socket: Option<OwnedFd>,
    flushes: AtomicU64,
    flush_waiter: AtomicWaker,
}

impl Connection {
    pub(crate) fn new(id: u64, port: Port, link: Option<Arc<Link>>, stream: &TcpStream) -> Self {
        Self {
            id,
            port,
            link: link.map(|link| {
                let window = Arc::new(Mutex::new(link.window()));
                (link, window)
            }),
            socket: stream.as_fd().try_clone_to_owned().ok(),
            flushes: AtomicU64::new(0),
            flush_waiter: AtomicWaker::new(),
        }
    }

    /// The connection will end in a reset instead of an orderly end.
    pub(crate) fn reset_on_close(&self) {
        let Some(socket) = &self.socket else {
            return;
        };
        if let Err(error) = set_socket_linger(socket, Some(Duration::ZERO)) {
            tracing::warn!(%error, id = self.id, "cannot make the connection end in a reset");
        }
    }

    /// Waits until everything handed to hyper so far has been written to the socket. hyper
    /// flushes whenever a body is pending.
    pub(crate) async fn flushed(&self) {
        let before = self.flushes.load(Ordering::Acquire);
        poll_fn(|context| {
            self.flush_waiter.register(context.waker());
            if self.flushes.load(Ordering::Acquire) == before {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        })
        .await;
    }
}

/// A byte stream that reports its flushes.
#[derive(Debug)]
pub(crate) struct Reporting<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S> Reporting<S> {
    pub(crate) fn new(stream: S, connection: Arc<Connection>) -> Self {
        Self { stream, connection }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Reporting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Reporting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if let Poll::Ready(Ok(())) = flushed {
            self.connection.flushes.fetch_add(1, Ordering::Release);
            self.connection.flush_waiter.wake();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
