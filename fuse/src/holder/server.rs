//! The holder's loop: one thread, no timers but the fence's.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    HolderOptions,
    keeper::{Answer, Keeper},
    protocol::{Kind, LONGEST, Packet},
};
use crate::sys::{signals, socket};

/// While a daemon waits for the fence, /proc is looked at this often.
const FENCE_POLL: Duration = Duration::from_millis(2);
/// A holder that holds nothing and talks to nobody for this long is not needed.
const IDLE: Duration = Duration::from_secs(10);

/// Runs the holder until nothing is held and nobody needs it: the body of the `holder` subcommand.
///
/// Exit status 0: nothing was held any more. 3: another holder has the lock. SIGTERM and SIGINT
/// are heeded only while nothing is held, since ending would turn every reader's wait into an
/// error; SIGHUP is ignored.
pub fn run(options: &HolderOptions) -> ExitCode {
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => ExitCode::from(3),
        Err(e) => {
            tracing::error!(error = %e, socket = %options.socket.display(), "the holder failed");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &HolderOptions) -> io::Result<()> {
    // Descriptors that systemd's FDSTORE passes (LISTEN_FDS) would be taken here, before the rest
    // is closed; not yet.
    signals::close_from(3)?;
    // Fails where the daemon made this a session leader already.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    let _ = rustix::thread::set_name(c"sd-holder");
    // Lowering it needs CAP_SYS_RESOURCE; without it the holder is as killable as any process.
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    let term = signals::termination()?;
    let _lock = lock(&options.socket)?;
    // The lock says that no holder lives, so what lies there is stale.
    match fs::remove_file(&options.socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = socket::listen_at(&options.socket)?;
    let mut holder = Holder {
        keeper: Keeper::default(),
        connections: Vec::new(),
        idle_since: Instant::now(),
    };
    let result = holder.run(&listener, &term);
    let _ = fs::remove_file(&options.socket);
    result
}

fn lock(socket: &Path) -> io::Result<File> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(PathBuf::from(path))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

struct Holder {
    keeper: Keeper,
    connections: Vec<Connection>,
    idle_since: Instant,
}

struct Connection {
    socket: OwnedFd,
    /// An Adopt whose fence still holds.
    waiting: Option<Packet>,
    open: bool,
}

impl Holder {
    fn run(&mut self, listener: &OwnedFd, term: &OwnedFd) -> io::Result<()> {
        loop {
            let ready = self.wait(listener, term)?;
            if ready.term {
                signals::take(term);
                if self.keeper.is_empty() {
                    return Ok(());
                }
                tracing::warn!("SIGTERM ignored: sessions are held");
            }
            for index in ready.connections {
                if self.serve_connection(index) {
                    return Ok(());
                }
            }
            self.retry_adoptions();
            self.connections.retain(|connection| connection.open);
            if ready.listener
                && let Ok(socket) = socket::accept(listener)
                && socket::peer_uid(&socket).ok() == Some(rustix::process::getuid().as_raw())
            {
                self.connections.push(Connection {
                    socket,
                    waiting: None,
                    open: true,
                });
            }
            if !self.connections.is_empty() || !self.keeper.is_empty() {
                self.idle_since = Instant::now();
            } else if self.idle_since.elapsed() >= IDLE {
                return Ok(());
            }
        }
    }

    fn wait(&self, listener: &OwnedFd, term: &OwnedFd) -> io::Result<Ready> {
        let mut fds = vec![
            PollFd::new(term, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        fds.extend(
            self.connections
                .iter()
                .map(|connection| PollFd::new(&connection.socket, PollFlags::IN)),
        );
        let limit = if self.connections.iter().any(|c| c.waiting.is_some()) {
            Some(FENCE_POLL)
        } else if self.connections.is_empty() && self.keeper.is_empty() {
            Some(IDLE)
        } else {
            None
        };
        let limit = limit.map(|d| Timespec {
            tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: d.subsec_nanos().into(),
        });
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            term: ready(&fds[0]),
            listener: ready(&fds[1]),
            connections: (0..self.connections.len())
                .filter(|index| ready(&fds[2 + index]))
                .collect(),
        })
    }

    /// Serves one packet of a connection; true if it is time to end.
    fn serve_connection(&mut self, index: usize) -> bool {
        let connection = &mut self.connections[index];
        let message = match socket::receive(connection.socket.as_fd(), LONGEST) {
            Ok(Some(message)) => message,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
            Ok(None) | Err(_) => {
                connection.open = false;
                return false;
            }
        };
        let (packet, answer) = match Packet::decode(&message.bytes) {
            Ok(packet) => {
                let answer = self.keeper.handle(&packet, message.fds);
                (Some(packet), answer)
            }
            Err(e) => (None, Err(io::Error::other(e))),
        };
        match answer {
            Ok(Some(answer)) => {
                connection.send(&answer);
                packet.is_some_and(|p| p.kind == Kind::Quit)
            }
            Ok(None) => {
                connection.waiting = packet;
                false
            }
            Err(e) => {
                connection.send(&Answer::failed(&e));
                false
            }
        }
    }

    fn retry_adoptions(&mut self) {
        for connection in &mut self.connections {
            let Some(packet) = connection.waiting.take() else {
                continue;
            };
            match self.keeper.handle(&packet, Vec::new()) {
                Ok(Some(answer)) => connection.send(&answer),
                Ok(None) => connection.waiting = Some(packet),
                Err(e) => connection.send(&Answer::failed(&e)),
            }
        }
    }
}

struct Ready {
    term: bool,
    listener: bool,
    connections: Vec<usize>,
}

impl Connection {
    fn send(&mut self, answer: &Answer<'_>) {
        let bytes = answer.packet.encode();
        if socket::send(self.socket.as_fd(), &bytes, &answer.fds).is_err() {
            self.open = false;
        }
    }
}
