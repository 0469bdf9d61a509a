//! Streaming gzip (RFC 1952): members one after the other, each checked against its trailer.
//!
//! Members carry meaning here (an eStargz layer starts one at every chunk), so headers and trailers
//! are read by this module and only the deflate stream goes to the inflate library.

use flate2::{Crc, Decompress, FlushDecompress, Status};

const MAGIC: [u8; 2] = [0x1f, 0x8b];
const DEFLATE: u8 = 8;
const FLAG_HCRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;
const FLAGS_RESERVED: u8 = 0xe0;
/// Output that [`Inflater::push`] hands on at a time.
const PIECE: usize = 64 << 10;

/// Why bytes are not gzip. Offsets are offsets in the compressed stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GzipError {
    /// A member header is malformed.
    #[error("gzip member at {member}: {why}")]
    Header {
        /// Where the member starts.
        member: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// The deflate stream is malformed.
    #[error("gzip member at {member}: malformed deflate data near {offset}")]
    Deflate {
        /// Where the member starts.
        member: u64,
        /// About where the fault is.
        offset: u64,
    },
    /// The decoded bytes are not those that were compressed.
    #[error("gzip member at {member}: {field} is {actual:#x}, its trailer says {expected:#x}")]
    Trailer {
        /// Where the member starts.
        member: u64,
        /// Which field of the trailer.
        field: &'static str,
        /// What the trailer says.
        expected: u32,
        /// What was decoded.
        actual: u32,
    },
    /// The stream ended inside a member.
    #[error("gzip stream ends at {offset}, inside the member at {member}")]
    Truncated {
        /// Where the member starts.
        member: u64,
        /// Where the stream ended.
        offset: u64,
    },
    /// More decoded bytes than allowed.
    #[error("gzip stream decodes to more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// The stream decodes to fewer bytes than were asked for.
    #[error("gzip stream decodes to {actual} bytes, {expected} are needed")]
    TooShort {
        /// What it decodes to.
        actual: u64,
        /// What was asked for.
        expected: u64,
    },
}

/// What a step of [`Inflater::inflate`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes taken from the front of the input.
    pub consumed: usize,
    /// Bytes put at the front of the output.
    pub produced: usize,
    /// A member just ended: its trailer was right, and the next input byte starts another.
    pub member_end: bool,
}

/// Inflates a gzip stream of any number of members.
#[derive(Debug)]
pub struct Inflater {
    raw: Decompress,
    state: State,
    limit: u64,
    consumed: u64,
    produced: u64,
    /// Where the current (or, between members, the next) member starts.
    member: u64,
    crc: Crc,
    buffer: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Before a member's first byte.
    Between,
    Header(HeaderState),
    Body,
    Trailer {
        bytes: [u8; 8],
        filled: usize,
    },
}

/// Where in a header the next byte stands.
#[derive(Clone, Copy, Debug)]
struct HeaderState {
    part: Part,
    flags: u8,
    crc_low: u8,
    crc: u32,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// The 10 fixed bytes.
    Fixed(u8),
    ExtraLenLow,
    ExtraLenHigh(u8),
    Extra(u16),
    Name,
    Comment,
    CrcLow,
    CrcHigh,
}

impl Inflater {
    /// An inflater at stream offset 0 that gives at most `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            raw: Decompress::new(false),
            state: State::Between,
            limit,
            consumed: 0,
            produced: 0,
            member: 0,
            crc: Crc::new(),
            buffer: Vec::new(),
        }
    }

    /// Inflates until the input is taken, the output is full or a member ends. When all input was
    /// taken, more output may be waiting: call again with empty input until nothing is produced.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, GzipError> {
        let mut progress = Progress::default();
        loop {
            let rest = &input[progress.consumed..];
            match &mut self.state {
                State::Between | State::Header(_) => {
                    let Some(byte) = rest.first() else { break };
                    self.header_byte(*byte)?;
                    progress.consumed += 1;
                    self.consumed += 1;
                }
                State::Body => {
                    let room = &mut output[progress.produced..];
                    if room.is_empty() {
                        break;
                    }
                    let (consumed, produced, ended) = self.inflate_body(rest, room)?;
                    progress.consumed += consumed;
                    progress.produced += produced;
                    if ended {
                        self.state = State::Trailer {
                            bytes: [0; 8],
                            filled: 0,
                        };
                    } else if consumed == rest.len() || produced == 0 {
                        break;
                    }
                }
                State::Trailer { bytes, filled } => {
                    let count = rest.len().min(bytes.len() - *filled);
                    bytes[*filled..*filled + count].copy_from_slice(&rest[..count]);
                    *filled += count;
                    let complete = (*filled == bytes.len()).then_some(*bytes);
                    progress.consumed += count;
                    self.consumed += count as u64;
                    let Some(bytes) = complete else { break };
                    self.check_trailer(bytes)?;
                    self.state = State::Between;
                    self.member = self.consumed;
                    progress.member_end = true;
                    break;
                }
            }
        }
        Ok(progress)
    }

    /// Inflates all of `input` and hands the decoded bytes on in pieces.
    pub fn push(&mut self, mut input: &[u8], sink: &mut dyn FnMut(&[u8])) -> Result<(), GzipError> {
        let mut buffer = core::mem::take(&mut self.buffer);
        buffer.resize(PIECE, 0);
        let mut step = || loop {
            let progress = self.inflate(input, &mut buffer)?;
            input = &input[progress.consumed..];
            if progress.produced > 0 {
                sink(&buffer[..progress.produced]);
            } else if input.is_empty() {
                return Ok(());
            }
        };
        let result = step();
        self.buffer = buffer;
        result
    }

    /// Says that the stream is over: it must end between members, after at least one.
    pub fn finish(&self) -> Result<(), GzipError> {
        if matches!(self.state, State::Between) && self.consumed > 0 {
            return Ok(());
        }
        Err(GzipError::Truncated {
            member: self.member,
            offset: self.consumed,
        })
    }

    /// Compressed bytes taken so far.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Decoded bytes given so far.
    pub fn produced(&self) -> u64 {
        self.produced
    }

    /// Where the current member starts in the compressed stream; between members, where the next
    /// one would.
    pub fn member(&self) -> u64 {
        self.member
    }

    fn inflate_body(
        &mut self,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<(usize, usize, bool), GzipError> {
        let (before_in, before_out) = (self.raw.total_in(), self.raw.total_out());
        let status = self.raw.decompress(input, output, FlushDecompress::None);
        // Both differences are bounded by the lengths of the slices.
        let consumed = usize::try_from(self.raw.total_in() - before_in).unwrap_or(input.len());
        let produced = usize::try_from(self.raw.total_out() - before_out).unwrap_or(output.len());
        let fault = GzipError::Deflate {
            member: self.member,
            offset: self.consumed + consumed as u64,
        };
        let ended = match status {
            Ok(Status::StreamEnd) => true,
            // No progress with both input and room cannot happen; it would loop for ever.
            Ok(_) if consumed == 0 && produced == 0 && !input.is_empty() => return Err(fault),
            Ok(_) => false,
            Err(_) => return Err(fault),
        };
        self.consumed += consumed as u64;
        self.produced += produced as u64;
        if self.produced > self.limit {
            return Err(GzipError::TooLarge { limit: self.limit });
        }
        self.crc.update(&output[..produced]);
        Ok((consumed, produced, ended))
    }

    fn header_byte(&mut self, byte: u8) -> Result<(), GzipError> {
        let mut header = match self.state {
            State::Header(header) => header,
            _ => HeaderState {
                part: Part::Fixed(0),
                flags: 0,
                crc_low: 0,
                crc: 0,
            },
        };
        let fault = |why| {
            Err(GzipError::Header {
                member: self.member,
                why,
            })
        };
        if !matches!(header.part, Part::CrcLow | Part::CrcHigh) {
            // `crc` only grows over the header here; the body resets it.
            self.crc.update(&[byte]);
        }
        let mut done_with = None;
        match header.part {
            Part::Fixed(index) => {
                match index {
                    0 | 1 if byte != MAGIC[usize::from(index)] => {
                        return fault("it does not start with the gzip magic");
                    }
                    2 if byte != DEFLATE => return fault("unknown compression method"),
                    3 if byte & FLAGS_RESERVED != 0 => return fault("reserved flags are set"),
                    3 => header.flags = byte,
                    _ => {}
                }
                if index == 9 {
                    done_with = Some(0);
                } else {
                    header.part = Part::Fixed(index + 1);
                }
            }
            Part::ExtraLenLow => header.part = Part::ExtraLenHigh(byte),
            Part::ExtraLenHigh(low) => match u16::from_le_bytes([low, byte]) {
                0 => done_with = Some(FLAG_EXTRA),
                length => header.part = Part::Extra(length),
            },
            Part::Extra(1) => done_with = Some(FLAG_EXTRA),
            Part::Extra(left) => header.part = Part::Extra(left - 1),
            Part::Name if byte == 0 => done_with = Some(FLAG_NAME),
            Part::Comment if byte == 0 => done_with = Some(FLAG_COMMENT),
            Part::Name | Part::Comment => {}
            Part::CrcLow => {
                header.crc_low = byte;
                header.crc = self.crc.sum();
                header.part = Part::CrcHigh;
            }
            Part::CrcHigh => {
                if header.crc & 0xffff != u32::from(u16::from_le_bytes([header.crc_low, byte])) {
                    return fault("its header checksum is wrong");
                }
                done_with = Some(FLAG_HCRC);
            }
        }
        if let Some(part) = done_with {
            header.flags &= !part;
            header.part = if header.flags & FLAG_EXTRA != 0 {
                Part::ExtraLenLow
            } else if header.flags & FLAG_NAME != 0 {
                Part::Name
            } else if header.flags & FLAG_COMMENT != 0 {
                Part::Comment
            } else if header.flags & FLAG_HCRC != 0 {
                Part::CrcLow
            } else {
                self.raw.reset(false);
                self.crc.reset();
                self.state = State::Body;
                return Ok(());
            };
        }
        self.state = State::Header(header);
        Ok(())
    }

    fn check_trailer(&mut self, bytes: [u8; 8]) -> Result<(), GzipError> {
        let [crc @ .., _, _, _, _] = bytes;
        let [_, _, _, _, length @ ..] = bytes;
        let fields = [
            ("CRC-32", u32::from_le_bytes(crc), self.crc.sum()),
            ("length", u32::from_le_bytes(length), self.crc.amount()),
        ];
        self.crc.reset();
        for (field, expected, actual) in fields {
            if expected != actual {
                return Err(GzipError::Trailer {
                    member: self.member,
                    field,
                    expected,
                    actual,
                });
            }
        }
        Ok(())
    }
}

/// Decodes the stretch `[skip, skip + out.len())` of what the member at the front of `input` (and
/// any that follow it) decodes to, and stops there; `input` may be cut anywhere behind it.
pub fn decode_member(input: &[u8], skip: u64, out: &mut [u8]) -> Result<(), GzipError> {
    let wanted = skip.saturating_add(out.len() as u64);
    let mut inflater = Inflater::new(u64::MAX);
    let mut rest = input;
    let mut scratch = Vec::new();
    while inflater.produced() < wanted {
        let at = inflater.produced();
        let room = if at < skip {
            let left = usize::try_from(skip - at).unwrap_or(usize::MAX);
            scratch.resize(left.min(PIECE), 0);
            &mut scratch[..]
        } else {
            // `at` is less than `wanted`, so this is within `out`.
            let filled = usize::try_from(at - skip).unwrap_or(out.len());
            &mut out[filled..]
        };
        let progress = inflater.inflate(rest, room)?;
        rest = &rest[progress.consumed..];
        if progress.produced == 0 && rest.is_empty() {
            return Err(GzipError::TooShort {
                actual: inflater.produced(),
                expected: wanted,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, GzBuilder};

    use super::*;

    fn member(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzBuilder::new().write(Vec::new(), Compression::new(6));
        encoder.write_all(bytes).expect("writes to memory");
        encoder.finish().expect("writes to memory")
    }

    fn with_all_fields(bytes: &[u8]) -> Vec<u8> {
        let plain = member(bytes);
        let mut out = plain[..10].to_vec();
        out[3] = FLAG_HCRC | FLAG_EXTRA | FLAG_NAME | FLAG_COMMENT;
        out.extend(b"\x03\x00xyzname\0comment\0");
        let mut crc = Crc::new();
        crc.update(&out);
        out.extend(&crc.sum().to_le_bytes()[..2]);
        out.extend(&plain[10..]);
        out
    }

    fn inflate_in_steps(input: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u64>), GzipError> {
        let mut inflater = Inflater::new(1 << 20);
        let mut out = Vec::new();
        let mut members = Vec::new();
        let mut room = [0; 7];
        for mut piece in input.chunks(step) {
            loop {
                let progress = inflater.inflate(piece, &mut room)?;
                piece = &piece[progress.consumed..];
                out.extend_from_slice(&room[..progress.produced]);
                if progress.member_end {
                    members.push(inflater.member());
                }
                if progress.produced == 0 && piece.is_empty() {
                    break;
                }
            }
        }
        inflater.finish()?;
        assert_eq!(inflater.consumed(), input.len() as u64);
        Ok((out, members))
    }

    #[test]
    fn members_in_any_steps() {
        let first = with_all_fields(b"hello, hello, hello");
        let stream = [first.clone(), member(b""), member(&[b'x'; 1000])].concat();
        let expected = [&b"hello, hello, hello"[..], &[b'x'; 1000]].concat();
        for step in [1, 2, 13, usize::MAX] {
            let (out, members) = inflate_in_steps(&stream, step).expect("inflates");
            assert_eq!(out, expected);
            assert_eq!(members[0], first.len() as u64);
            assert_eq!(members[2], stream.len() as u64);
        }
        let mut pushed = Vec::new();
        let mut inflater = Inflater::new(1 << 20);
        inflater
            .push(&stream, &mut |bytes| pushed.extend_from_slice(bytes))
            .expect("inflates");
        assert_eq!(pushed, expected);
    }

    #[test]
    fn every_damaged_byte_is_noticed_or_harmless() {
        let stream = with_all_fields(b"some bytes that are compressed");
        for index in 0..stream.len() {
            let mut damaged = stream.clone();
            damaged[index] ^= 0x04;
            if let Ok((out, _)) = inflate_in_steps(&damaged, usize::MAX) {
                assert_eq!(out, b"some bytes that are compressed", "byte {index}");
            }
        }
        for cut in 0..stream.len() {
            assert!(
                inflate_in_steps(&stream[..cut], usize::MAX).is_err(),
                "{cut}"
            );
        }
        let garbage = [&stream[..], b"garbage"].concat();
        assert!(matches!(
            inflate_in_steps(&garbage, usize::MAX),
            Err(GzipError::Header { member, .. }) if member == stream.len() as u64
        ));
    }

    #[test]
    fn output_is_bounded() {
        let bomb = member(&vec![0; 1 << 20]);
        let mut inflater = Inflater::new(1000);
        assert_eq!(
            inflater.push(&bomb, &mut |_| {}),
            Err(GzipError::TooLarge { limit: 1000 })
        );
    }

    #[test]
    fn a_stretch_of_a_member() {
        let bytes: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let stream = [member(&bytes), b"not read".to_vec()].concat();
        for (skip, len) in [(0, 10), (4000, 1), (70_000, 600_000), (799_999, 1), (5, 0)] {
            let mut out = vec![0; len];
            decode_member(&stream, skip as u64, &mut out).expect("decodes");
            assert_eq!(out, &bytes[skip..skip + len]);
        }
        assert_eq!(
            decode_member(&member(b"abc"), 1, &mut [0; 3]),
            Err(GzipError::TooShort {
                actual: 3,
                expected: 4
            })
        );
        // Members that follow continue the stretch.
        let two = [member(b"abc"), member(b"def")].concat();
        let mut out = [0; 4];
        decode_member(&two, 1, &mut out).expect("decodes");
        assert_eq!(&out, b"bcde");
    }
}
