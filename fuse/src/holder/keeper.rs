//! What the holder holds.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{fs::MemfdFlags, io::Errno};

use super::protocol::{Kind, Packet};
use crate::table::{self, Fence};

/// One session.
#[derive(Debug)]
struct Held {
    device: Option<OwnedFd>,
    table: OwnedFd,
    fence: Fence,
}

/// Sessions and other descriptors, by name.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    sessions: BTreeMap<String, Held>,
    kept: BTreeMap<String, OwnedFd>,
}

/// An answer: a packet and the descriptors that go with it.
pub(super) struct Answer<'a> {
    pub(super) packet: Packet,
    pub(super) fds: Vec<BorrowedFd<'a>>,
}

impl Answer<'_> {
    pub(super) fn plain(kind: Kind) -> Self {
        Self {
            packet: Packet::new(kind),
            fds: Vec::new(),
        }
    }

    pub(super) fn failed(error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        Self {
            packet: Packet {
                number: u64::try_from(errno).unwrap_or(0),
                text: error.to_string(),
                ..Packet::new(Kind::Failed)
            },
            fds: Vec::new(),
        }
    }
}

impl Keeper {
    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.kept.is_empty()
    }

    /// Handles a request. `None`: it is an Adopt whose fence still holds; ask again.
    pub(super) fn handle(
        &mut self,
        packet: &Packet,
        fds: Vec<OwnedFd>,
    ) -> io::Result<Option<Answer<'_>>> {
        let mut fds = fds.into_iter();
        let name = packet.name.as_str();
        let answer = match packet.kind {
            Kind::Hello => Answer {
                packet: Packet {
                    number: u64::from(std::process::id()),
                    ..Packet::new(Kind::Hello)
                },
                fds: Vec::new(),
            },
            Kind::Create => {
                if self.sessions.contains_key(name) {
                    return Err(Errno::EXIST.into());
                }
                let held = Held::new(None, new_table()?)?;
                // The daemon that asked for it is generation 1.
                let generation = held.fence.advance();
                self.sessions.insert(name.to_owned(), held);
                self.session(name, generation)?
            }
            Kind::Deposit => {
                let held = self.sessions.get_mut(name).ok_or(Errno::NOENT)?;
                held.device = Some(fds.next().ok_or(Errno::BADF)?);
                Answer::plain(Kind::Done)
            }
            Kind::Adopt => match self.adopt(name)? {
                Adoption::Absent => Answer::plain(Kind::Absent),
                Adoption::Fenced => return Ok(None),
                Adoption::Generation(generation) => self.session(name, generation)?,
            },
            Kind::Restore => {
                let (device, table) = (fds.next(), fds.next());
                let held = Held::new(device, table.ok_or(Errno::BADF)?)?;
                self.sessions.insert(name.to_owned(), held);
                Answer::plain(Kind::Done)
            }
            Kind::Retable => {
                let held = self.sessions.get_mut(name).ok_or(Errno::NOENT)?;
                let mut fresh = Held::new(None, new_table()?)?;
                let mut generation = fresh.fence.advance();
                while generation < packet.number {
                    generation = fresh.fence.advance();
                }
                fresh.device = held.device.take();
                *held = fresh;
                self.session(name, generation)?
            }
            Kind::Drop => {
                self.sessions.remove(name);
                Answer::plain(Kind::Done)
            }
            Kind::List => Answer {
                packet: Packet {
                    text: self
                        .sessions
                        .keys()
                        .map(String::as_str)
                        .collect::<Vec<_>>()
                        .join("\n"),
                    ..Packet::new(Kind::Names)
                },
                fds: Vec::new(),
            },
            Kind::Put => {
                let fd = fds.next().ok_or(Errno::BADF)?;
                self.kept.insert(name.to_owned(), fd);
                Answer::plain(Kind::Done)
            }
            Kind::Take => match self.kept.get(name) {
                Some(fd) => Answer {
                    packet: Packet::named(Kind::Session, name),
                    fds: vec![fd.as_fd()],
                },
                None => Answer::plain(Kind::Absent),
            },
            Kind::Forget => {
                self.kept.remove(name);
                Answer::plain(Kind::Done)
            }
            Kind::Quit if self.is_empty() => Answer::plain(Kind::Done),
            Kind::Quit => return Err(Errno::BUSY.into()),
            Kind::Goodbye
            | Kind::Done
            | Kind::Session
            | Kind::Absent
            | Kind::Failed
            | Kind::Names => return Err(Errno::OPNOTSUPP.into()),
        };
        Ok(Some(answer))
    }

    fn adopt(&self, name: &str) -> io::Result<Adoption> {
        let Some(held) = self.sessions.get(name) else {
            return Ok(Adoption::Absent);
        };
        if !held.fence.readers()?.is_empty() {
            return Ok(Adoption::Fenced);
        }
        let generation = held.fence.advance();
        // A reader that entered between the look and the advance is of an old generation and
        // leaves at once; wait for that too.
        if !held.fence.readers()?.is_empty() {
            return Ok(Adoption::Fenced);
        }
        Ok(Adoption::Generation(generation))
    }

    fn session(&self, name: &str, generation: u64) -> io::Result<Answer<'_>> {
        let held = self.sessions.get(name).ok_or(Errno::NOENT)?;
        let device = held.device.iter().map(AsFd::as_fd);
        Ok(Answer {
            packet: Packet {
                number: generation,
                ..Packet::named(Kind::Session, name)
            },
            fds: device.chain([held.table.as_fd()]).collect(),
        })
    }
}

enum Adoption {
    Absent,
    Fenced,
    Generation(u64),
}

impl Held {
    fn new(device: Option<OwnedFd>, table: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            device,
            fence: Fence::new(&table)?,
            table,
        })
    }
}

fn new_table() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("snapshotterd-requests", flags)?;
    table::format(fd.as_fd())?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    fn ask(keeper: &mut Keeper, packet: &Packet, fds: Vec<OwnedFd>) -> (Kind, u64, Vec<OwnedFd>) {
        let answer = keeper.handle(packet, fds).unwrap().unwrap();
        let fds = answer.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap());
        (answer.packet.kind, answer.packet.number, fds.collect())
    }

    #[test]
    fn a_session_changes_hands_with_rising_generations() {
        let mut keeper = Keeper::default();
        let (kind, generation, mut fds) =
            ask(&mut keeper, &Packet::named(Kind::Create, "s"), Vec::new());
        assert_eq!((kind, generation, fds.len()), (Kind::Session, 1, 1));
        let first = Table::open(fds.remove(0), 1).unwrap();
        assert!(first.enter_reader(0).unwrap());
        let adopt = Packet::named(Kind::Adopt, "s");
        assert!(
            keeper.handle(&adopt, Vec::new()).unwrap().is_none(),
            "its reader lives"
        );
        first.leave_reader(0);
        let (_, generation, _) = ask(&mut keeper, &adopt, Vec::new());
        assert_eq!(generation, 2);
        assert!(!first.enter_reader(0).unwrap());
        let retable = Packet {
            number: 2,
            ..Packet::named(Kind::Retable, "s")
        };
        let (_, generation, fds) = ask(&mut keeper, &retable, Vec::new());
        assert_eq!((generation, fds.len()), (2, 1));
        assert!(keeper.handle(&Packet::new(Kind::Quit), Vec::new()).is_err());
        ask(&mut keeper, &Packet::named(Kind::Drop, "s"), Vec::new());
        assert_eq!(ask(&mut keeper, &adopt, Vec::new()).0, Kind::Absent);
        assert_eq!(
            ask(&mut keeper, &Packet::new(Kind::Quit), Vec::new()).0,
            Kind::Done
        );
    }

    #[test]
    fn other_descriptors_are_kept_by_name() {
        let mut keeper = Keeper::default();
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        ask(&mut keeper, &Packet::named(Kind::Put, "lock"), vec![null]);
        assert!(!keeper.is_empty());
        let take = Packet::named(Kind::Take, "lock");
        assert_eq!(ask(&mut keeper, &take, Vec::new()).2.len(), 1);
        assert_eq!(ask(&mut keeper, &take, Vec::new()).2.len(), 1, "it stays");
        ask(
            &mut keeper,
            &Packet::named(Kind::Forget, "lock"),
            Vec::new(),
        );
        assert_eq!(ask(&mut keeper, &take, Vec::new()).0, Kind::Absent);
        let nothing = Packet::named(Kind::Put, "none");
        assert!(keeper.handle(&nothing, Vec::new()).is_err());
    }

    #[test]
    fn a_new_holder_goes_on_where_the_old_one_was() {
        let mut old = Keeper::default();
        let (_, _, fds) = ask(&mut old, &Packet::named(Kind::Create, "s"), Vec::new());
        let device = std::fs::File::open("/dev/null").unwrap();
        let mut both = vec![OwnedFd::from(device)];
        both.extend(fds);
        drop(old);
        let mut new = Keeper::default();
        ask(&mut new, &Packet::named(Kind::Restore, "s"), both);
        let (_, generation, fds) = ask(&mut new, &Packet::named(Kind::Adopt, "s"), Vec::new());
        assert_eq!((generation, fds.len()), (2, 2));
    }
}
