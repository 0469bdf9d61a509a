//! INIT: what is asked of the kernel, and why.

use crate::sys::abi::{self, MAJOR, MINOR, init, word};

/// Oldest minor spoken: 28 (Linux 4.20) has `max_pages`.
const OLDEST_MINOR: u32 = 28;
/// Every read counts against it once direct I/O is asynchronous, so it is the field's maximum:
/// with less, stalled reads of one blob would hold back local reads of another.
const MAX_BACKGROUND: u64 = 65_535;
/// Nothing is ever written; a larger value would only demand larger landings.
const MAX_WRITE: u32 = 4096;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Negotiated {
    /// fuse_init_out, 64 bytes.
    pub(crate) reply: [u64; 8],
    /// The kernel reads asynchronously: signals do no harm and kills free a stalled reader.
    pub(crate) async_dio: bool,
    /// The kernel knows FUSE_NOTIFY_RESEND.
    pub(crate) resend: bool,
}

/// Answers fuse_init_in. `Err` holds the minor of a kernel that is too old.
pub(crate) fn negotiate(offer: &[u64; 8], max_read_bytes: u32) -> Result<Negotiated, u32> {
    let (major, minor) = (abi::low(offer[0]), abi::high(offer[0]));
    if major < MAJOR || (major == MAJOR && minor < OLDEST_MINOR) {
        return Err(minor);
    }
    let (max_readahead, offered) = (abi::low(offer[1]), abi::high(offer[1]));
    let offered2 = if offered & init::INIT_EXT == 0 {
        0
    } else {
        abi::low(offer[2])
    };
    let wanted = init::ASYNC_READ
        | init::ASYNC_DIO
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::INIT_EXT;
    let flags = offered & wanted;
    let max_pages = max_read_bytes.div_ceil(4096);
    let mut reply = [0; 8];
    reply[0] = word(MAJOR, MINOR);
    reply[1] = word(max_readahead, flags);
    reply[2] = MAX_BACKGROUND | MAX_BACKGROUND << 16 | u64::from(MAX_WRITE) << 32;
    reply[3] = word(1, max_pages & 0xffff);
    // No second word of flags is asked for; what follows stays zero: no stacking, no timeout.
    Ok(Negotiated {
        reply,
        async_dio: flags & init::ASYNC_DIO != 0,
        resend: offered2 & init::HAS_RESEND_2 != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(major: u32, minor: u32, flags: u32, flags2: u32) -> [u64; 8] {
        let mut offer = [0; 8];
        offer[0] = word(major, minor);
        offer[1] = word(131_072, flags);
        offer[2] = word(flags2, 0);
        offer
    }

    #[test]
    fn takes_what_is_needed_and_nothing_else() {
        let got = negotiate(&offer(7, 45, u32::MAX, u32::MAX), 128 << 10).unwrap();
        assert!(got.async_dio && got.resend);
        assert_eq!(abi::high(got.reply[1]).count_ones(), 5);
        assert_eq!(abi::low(got.reply[2]), u32::MAX, "both background limits");
        assert_eq!(abi::high(got.reply[3]), 32);
        assert_eq!(got.reply[4..], [0; 4]);
    }

    #[test]
    fn an_old_kernel_is_told_apart() {
        let got = negotiate(&offer(7, 31, init::ASYNC_READ, u32::MAX), 4096).unwrap();
        assert!(
            !got.async_dio && !got.resend,
            "flags2 means nothing without INIT_EXT"
        );
        assert_eq!(negotiate(&offer(7, 27, u32::MAX, 0), 4096), Err(27));
        assert!(
            negotiate(&offer(8, 0, 0, 0), 4096).is_ok(),
            "the kernel steps down to 7"
        );
    }
}
