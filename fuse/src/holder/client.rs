//! The daemon's side.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::protocol::{Kind, LONGEST, Packet};
use crate::{CommandLine, sys::socket};

/// How long a started holder may take until it answers.
const SPAWN: Duration = Duration::from_secs(10);
/// Bound for what is answered at once.
const CALL: Duration = Duration::from_secs(10);

/// Why the holder did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HolderError {
    /// It could not be started.
    #[error("start the holder {program:?}")]
    Start {
        /// Its program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not listen.
    #[error("connect to the holder at {socket:?}")]
    Connect {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("talk to the holder ({operation})")]
    Talk {
        /// What was asked.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It refused.
    #[error("the holder refused {operation}: {message}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// Its reason.
        message: String,
    },
    /// It said something unexpected.
    #[error("the holder answered {operation} with something else: {message}")]
    Garbled {
        /// What was asked.
        operation: &'static str,
        /// What came.
        message: String,
    },
    /// No answer came in time. For an adoption: a former daemon still reads the session.
    #[error("the holder did not answer {operation} within {after:?}")]
    TimedOut {
        /// What was asked.
        operation: &'static str,
        /// The bound.
        after: Duration,
    },
}

/// A session that is this daemon's from now on.
#[derive(Debug)]
pub(crate) struct Adopted {
    /// Its device; absent if the former daemon died before it deposited one.
    pub(crate) device: Option<OwnedFd>,
    /// Its table.
    pub(crate) table: OwnedFd,
    /// The generation to serve under.
    pub(crate) generation: u64,
}

/// A connection to the holder.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    command: CommandLine,
    connection: Mutex<OwnedFd>,
    child: Mutex<Option<Child>>,
}

impl Client {
    /// Connects to the holder of `state_dir`; starts one if there is none.
    pub(crate) fn connect_or_start(
        state_dir: &Path,
        command: &CommandLine,
    ) -> Result<Self, HolderError> {
        let socket = state_dir.join("holder.sock");
        let (connection, child) = connect_or_start(&socket, state_dir, command)?;
        let client = Self {
            socket,
            command: command.clone(),
            connection: Mutex::new(connection),
            child: Mutex::new(child),
        };
        let hello = client.call("hello", &Packet::new(Kind::Hello), &[], CALL)?;
        tracing::info!(pid = hello.0.number, "connected to the holder");
        Ok(client)
    }

    /// Waits until the holder is gone or `stop` is readable; true if it is gone.
    pub(crate) fn wait_gone(&self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        let connection = self.connection.lock().as_fd().try_clone_to_owned()?;
        loop {
            let mut fds = [
                PollFd::new(&connection, PollFlags::empty()),
                PollFd::new(&stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            }
            if !fds[1].revents().is_empty() {
                return Ok(false);
            }
            if !fds[0].revents().is_empty() {
                return Ok(true);
            }
        }
    }

    /// Starts a new holder after [`Client::wait_gone`]. It holds nothing yet.
    pub(crate) fn restart(&self) -> Result<(), HolderError> {
        self.reap();
        let state_dir = self.socket.parent().unwrap_or(Path::new("/"));
        let (connection, child) = connect_or_start(&self.socket, state_dir, &self.command)?;
        *self.connection.lock() = connection;
        *self.child.lock() = child;
        self.call("hello", &Packet::new(Kind::Hello), &[], CALL)?;
        Ok(())
    }

    /// Takes the exit status of a holder that this daemon started, so that no zombie stays.
    pub(crate) fn reap(&self) {
        if let Some(mut child) = self.child.lock().take() {
            let _ = child.wait();
        }
    }

    /// A table for a new session, kept by the holder.
    pub(crate) fn create(&self, name: &str) -> Result<(OwnedFd, u64), HolderError> {
        let answer = self.call("create", &Packet::named(Kind::Create, name), &[], CALL)?;
        let adopted = session("create", answer)?;
        Ok((adopted.table, adopted.generation))
    }

    /// Gives the holder a session's device.
    pub(crate) fn deposit(&self, name: &str, device: BorrowedFd<'_>) -> Result<(), HolderError> {
        let packet = Packet::named(Kind::Deposit, name);
        done("deposit", self.call("deposit", &packet, &[device], CALL)?)
    }

    /// Takes a session over once its former readers are gone.
    pub(crate) fn adopt(
        &self,
        name: &str,
        fence: Duration,
    ) -> Result<Option<Adopted>, HolderError> {
        let answer = self.call("adopt", &Packet::named(Kind::Adopt, name), &[], fence)?;
        if answer.0.kind == Kind::Absent {
            return Ok(None);
        }
        session("adopt", answer).map(Some)
    }

    /// Gives a new holder what the old one had.
    pub(crate) fn restore(
        &self,
        name: &str,
        device: BorrowedFd<'_>,
        table: BorrowedFd<'_>,
    ) -> Result<(), HolderError> {
        let packet = Packet::named(Kind::Restore, name);
        done(
            "restore",
            self.call("restore", &packet, &[device, table], CALL)?,
        )
    }

    /// An empty table for a session whose old one is invalid.
    pub(crate) fn retable(&self, name: &str, generation: u64) -> Result<OwnedFd, HolderError> {
        let packet = Packet {
            number: generation,
            ..Packet::named(Kind::Retable, name)
        };
        let answer = self.call("retable", &packet, &[], CALL)?;
        session("retable", answer).map(|adopted| adopted.table)
    }

    /// Makes the holder let a session go.
    pub(crate) fn drop_session(&self, name: &str) -> Result<(), HolderError> {
        let packet = Packet::named(Kind::Drop, name);
        done("drop", self.call("drop", &packet, &[], CALL)?)
    }

    /// The sessions held.
    pub(crate) fn sessions(&self) -> Result<Vec<String>, HolderError> {
        let (packet, _) = self.call("list", &Packet::new(Kind::List), &[], CALL)?;
        if packet.kind != Kind::Names {
            return Err(garbled("list", &packet));
        }
        Ok(packet.text.lines().map(str::to_owned).collect())
    }

    /// Keeps a descriptor under a name.
    pub(crate) fn put(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), HolderError> {
        let packet = Packet::named(Kind::Put, name);
        done("put", self.call("put", &packet, &[fd], CALL)?)
    }

    /// A kept descriptor.
    pub(crate) fn take(&self, name: &str) -> Result<Option<OwnedFd>, HolderError> {
        let (packet, fds) = self.call("take", &Packet::named(Kind::Take, name), &[], CALL)?;
        match packet.kind {
            Kind::Absent => Ok(None),
            Kind::Session => Ok(fds.into_iter().next()),
            _ => Err(garbled("take", &packet)),
        }
    }

    /// Lets a kept descriptor go.
    pub(crate) fn forget(&self, name: &str) -> Result<(), HolderError> {
        let packet = Packet::named(Kind::Forget, name);
        done("forget", self.call("forget", &packet, &[], CALL)?)
    }

    /// Ends the holder if it holds nothing.
    pub(crate) fn quit(&self) -> Result<(), HolderError> {
        done(
            "quit",
            self.call("quit", &Packet::new(Kind::Quit), &[], CALL)?,
        )
    }

    fn call(
        &self,
        operation: &'static str,
        packet: &Packet,
        fds: &[BorrowedFd<'_>],
        bound: Duration,
    ) -> Result<(Packet, Vec<OwnedFd>), HolderError> {
        let talk = |source| HolderError::Talk { operation, source };
        let connection = self.connection.lock();
        socket::send(connection.as_fd(), &packet.encode(), fds).map_err(talk)?;
        let until = Instant::now() + bound;
        while !socket::wait_readable(connection.as_fd(), &left(until)).map_err(talk)? {
            if Instant::now() >= until {
                return Err(HolderError::TimedOut {
                    operation,
                    after: bound,
                });
            }
        }
        let message = socket::receive(connection.as_fd(), LONGEST)
            .map_err(talk)?
            .ok_or_else(|| talk(io::ErrorKind::UnexpectedEof.into()))?;
        let packet = Packet::decode(&message.bytes)
            .map_err(|message| HolderError::Garbled { operation, message })?;
        if packet.kind == Kind::Failed {
            return Err(HolderError::Refused {
                operation,
                message: packet.text,
            });
        }
        Ok((packet, message.fds))
    }
}

fn connect_or_start(
    socket: &Path,
    state_dir: &Path,
    command: &CommandLine,
) -> Result<(OwnedFd, Option<Child>), HolderError> {
    if let Ok(connection) = socket::connect_to(socket) {
        return Ok((connection, None));
    }
    let start_error = |source| HolderError::Start {
        program: command.program.clone(),
        source,
    };
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(state_dir.join("holder.log"))
        .map_err(start_error)?;
    // It makes a session of its own as its first act.
    let child = Command::new(&command.program)
        .args(&command.args)
        .arg("--socket")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/")
        .spawn()
        .map_err(start_error)?;
    let until = Instant::now() + SPAWN;
    loop {
        match socket::connect_to(socket) {
            Ok(connection) => return Ok((connection, Some(child))),
            // Not there yet, or another daemon's holder was quicker: either way it will listen.
            Err(source) if Instant::now() >= until => {
                return Err(HolderError::Connect {
                    socket: socket.to_owned(),
                    source,
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn left(until: Instant) -> Timespec {
    let left = until.saturating_duration_since(Instant::now());
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}

fn session(
    operation: &'static str,
    (packet, mut fds): (Packet, Vec<OwnedFd>),
) -> Result<Adopted, HolderError> {
    let table = fds.pop().filter(|_| packet.kind == Kind::Session);
    match table {
        Some(table) => Ok(Adopted {
            device: fds.pop(),
            table,
            generation: packet.number,
        }),
        None => Err(garbled(operation, &packet)),
    }
}

fn done(operation: &'static str, (packet, _): (Packet, Vec<OwnedFd>)) -> Result<(), HolderError> {
    if packet.kind == Kind::Done {
        Ok(())
    } else {
        Err(garbled(operation, &packet))
    }
}

fn garbled(operation: &'static str, packet: &Packet) -> HolderError {
    HolderError::Garbled {
        operation,
        message: format!("{:?}", packet.kind),
    }
}
