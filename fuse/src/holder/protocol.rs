//! What daemon and holder say to each other, one packet each, descriptors beside it.
//!
//! Packet, little-endian: magic u32, version u16, kind u16, number u64, name length u16, text
//! length u16, reserved u32, name, text. A side that gets a version it does not know answers with
//! an error of its own version; kinds are only ever added.

/// "SDHO", little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"SDHO");
/// Version of the packets.
pub(super) const VERSION: u16 = 1;
const HEADER: usize = 24;
/// Longest packet.
pub(super) const LONGEST: usize = 64 << 10;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    /// Daemon: who are you? Answered by Hello with the holder's pid.
    Hello = 1,
    /// Make a table for a new session and keep it. Answered by Session with the table.
    Create = 2,
    /// Keep this device for a session that has a table. One descriptor.
    Deposit = 3,
    /// Give me a session once its readers are gone. Answered by Session or Absent.
    Adopt = 4,
    /// Keep a session that another holder had: device and table. Two descriptors.
    Restore = 5,
    /// Let a session go.
    Drop = 6,
    /// Answered by Names: the sessions, one a line.
    List = 7,
    /// Keep a descriptor under a name.
    Put = 8,
    /// Answered by Session with a kept descriptor, or Absent.
    Take = 9,
    /// Let a kept descriptor go.
    Forget = 10,
    /// Replace a session's table by an empty one of the same generation. Answered by Session.
    Retable = 11,
    /// End, if nothing is held. Answered by Done or Failed.
    Quit = 12,
    /// Reserved for hand-over between builds: the daemon has stopped reading.
    Goodbye = 13,
    /// It is done.
    Done = 100,
    /// Descriptors: device (if there is one), then table. The number is the generation.
    Session = 101,
    /// There is no such thing.
    Absent = 102,
    /// It failed: errno and text.
    Failed = 103,
    /// A list, one a line.
    Names = 104,
}

impl Kind {
    fn of(code: u16) -> Option<Self> {
        use Kind::{
            Absent, Adopt, Create, Deposit, Done, Drop, Failed, Forget, Goodbye, Hello, List,
            Names, Put, Quit, Restore, Retable, Session, Take,
        };
        [
            Hello, Create, Deposit, Adopt, Restore, Drop, List, Put, Take, Forget, Retable, Quit,
            Goodbye, Done, Session, Absent, Failed, Names,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == code)
    }
}

/// A packet without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) kind: Kind,
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) text: String,
}

impl Packet {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            number: 0,
            name: String::new(),
            text: String::new(),
        }
    }

    pub(super) fn named(kind: Kind, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::new(kind)
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let clip = |text: &str| u16::try_from(text.len().min(LONGEST / 3)).unwrap_or(0);
        let (name, text) = (clip(&self.name), clip(&self.text));
        let mut bytes = Vec::with_capacity(HEADER + self.name.len() + self.text.len());
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(self.kind as u16).to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&name.to_le_bytes());
        bytes.extend_from_slice(&text.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.name.as_bytes()[..name.into()]);
        bytes.extend_from_slice(&self.text.as_bytes()[..text.into()]);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let short = || format!("a packet of {} bytes", bytes.len());
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or_else(short)?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        if header[..4] != MAGIC.to_le_bytes() {
            return Err("a packet without the magic".to_owned());
        }
        if u16_at(4) != VERSION {
            return Err(format!("protocol version {}, this is {VERSION}", u16_at(4)));
        }
        let kind = Kind::of(u16_at(6)).ok_or_else(|| format!("unknown kind {}", u16_at(6)))?;
        let number = header[8..16]
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | u64::from(*byte));
        let (name, text) = (usize::from(u16_at(16)), usize::from(u16_at(18)));
        let rest = &bytes[HEADER..];
        if rest.len() != name + text {
            return Err(short());
        }
        let string = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| "text that is not UTF-8".to_owned())
        };
        Ok(Self {
            kind,
            number,
            name: string(&rest[..name])?,
            text: string(&rest[name..])?,
        })
    }
}

/// A packet, or an error; what was read is written and read again. For fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok(packet) = Packet::decode(data) else {
        return;
    };
    assert!(data.len() <= HEADER + 2 * usize::from(u16::MAX));
    let written = packet.encode();
    if packet.name.len().max(packet.text.len()) <= LONGEST / 3 {
        assert_eq!(Packet::decode(&written), Ok(packet));
    } else {
        // Longer ones are cut.
        assert!(written.len() <= LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packets_come_back(number: u64, name in ".{0,20}", text in ".{0,20}") {
            let packet = Packet { kind: Kind::Adopt, number, name, text };
            prop_assert_eq!(Packet::decode(&packet.encode()).unwrap(), packet);
        }

        #[test]
        fn any_bytes_are_a_packet_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Packet::decode(&bytes);
            let head = Packet::named(Kind::Put, "x").encode();
            let n = bytes.len().min(8);
            bytes[..n].copy_from_slice(&head[..n]);
            let _ = Packet::decode(&bytes);
        }
    }
}
