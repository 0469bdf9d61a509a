//! The FUSE kernel ABI as far as it is used here: protocol 7.45, written from the uapi's
//! documented layouts. All fields little-endian (host order on the hosts supported).

/// Protocol version spoken.
pub(crate) const MAJOR: u32 = 7;
/// Newest minor known; the lower of both sides' is used.
pub(crate) const MINOR: u32 = 45;
/// Node id of the root directory.
pub(crate) const ROOT: u64 = 1;
/// Length of fuse_in_header.
pub(crate) const IN_HEADER: usize = 40;
/// Length of fuse_out_header.
pub(crate) const OUT_HEADER: usize = 16;
/// Smallest buffer the kernel reads requests into (FUSE_MIN_READ_BUFFER).
pub(crate) const MIN_READ_BUFFER: usize = 8192;
/// Notification code of FUSE_NOTIFY_RESEND (6.9).
pub(crate) const NOTIFY_RESEND: i32 = 7;
/// Reply flag of OPEN: no page cache, reads come with the reader's own ranges.
pub(crate) const FOPEN_DIRECT_IO: u32 = 1;

/// Operation codes.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const NOTIFY_REPLY: u32 = 41;
    pub(crate) const BATCH_FORGET: u32 = 42;
}

/// INIT flags, the first word.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    pub(crate) const ASYNC_DIO: u32 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
    pub(crate) const INIT_EXT: u32 = 1 << 30;
    /// In the second word: the kernel can resend what was read and not answered.
    pub(crate) const HAS_RESEND_2: u32 = 1 << (39 - 32);
}

/// The low half of a word.
#[expect(clippy::cast_possible_truncation, reason = "that is what it is for")]
pub(crate) const fn low(word: u64) -> u32 {
    word as u32
}

/// The high half of a word.
pub(crate) const fn high(word: u64) -> u32 {
    low(word >> 32)
}

/// A word of two halves, `low` first in memory.
pub(crate) const fn word(low: u32, high: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

/// Builds a reply body field by field.
#[derive(Debug, Default)]
pub(crate) struct Body(Vec<u8>);

impl Body {
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }

    /// Zeros up to a multiple of eight, as directory entries are laid out.
    pub(crate) fn align(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// What an inode looks like (fuse_attr, 88 bytes).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attr {
    pub(crate) ino: u64,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) nlink: u32,
}

impl Attr {
    fn append(self, body: Body) -> Body {
        body.u64(self.ino)
            .u64(self.size)
            .u64(self.size.div_ceil(512))
            .u64(0) // atime
            .u64(0) // mtime
            .u64(0) // ctime
            .u32(0)
            .u32(0)
            .u32(0)
            .u32(self.mode)
            .u32(self.nlink)
            .u32(0) // uid
            .u32(0) // gid
            .u32(0) // rdev
            .u32(4096) // blksize
            .u32(0) // flags
    }
}

/// fuse_entry_out, 128 bytes.
pub(crate) fn entry_out(attr: Attr, valid_secs: u64) -> Vec<u8> {
    let body = Body::default()
        .u64(attr.ino)
        .u64(0) // generation: a node id is never another file's
        .u64(valid_secs)
        .u64(valid_secs)
        .u32(0)
        .u32(0);
    attr.append(body).done()
}

/// fuse_attr_out, 104 bytes.
pub(crate) fn attr_out(attr: Attr, valid_secs: u64) -> Vec<u8> {
    let body = Body::default().u64(valid_secs).u32(0).u32(0);
    attr.append(body).done()
}

/// fuse_open_out, 16 bytes.
pub(crate) fn open_out(fh: u64, flags: u32) -> Vec<u8> {
    Body::default().u64(fh).u32(flags).u32(0).done()
}

/// fuse_statfs_out, 80 bytes.
pub(crate) fn statfs_out(files: u64) -> Vec<u8> {
    Body::default()
        .u64(0)
        .u64(0)
        .u64(0)
        .u64(files)
        .u64(0)
        .u32(4096)
        .u32(255)
        .u32(4096)
        .bytes(&[0; 28])
        .done()
}

/// One fuse_dirent with its name, padded.
pub(crate) fn dirent(ino: u64, next: u64, is_dir: bool, name: &str) -> Vec<u8> {
    const DT_DIR: u32 = 4;
    const DT_REG: u32 = 8;
    Body::default()
        .u64(ino)
        .u64(next)
        .u32(u32::try_from(name.len()).unwrap_or(u32::MAX))
        .u32(if is_dir { DT_DIR } else { DT_REG })
        .bytes(name.as_bytes())
        .align()
        .done()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_the_lengths_of_the_abi() {
        let attr = Attr {
            ino: 2,
            size: 4097,
            mode: 0o100_444,
            nlink: 1,
        };
        assert_eq!(entry_out(attr, 1).len(), 128);
        assert_eq!(attr_out(attr, 1).len(), 104);
        assert_eq!(open_out(1, FOPEN_DIRECT_IO).len(), 16);
        assert_eq!(statfs_out(0).len(), 80);
        assert_eq!(dirent(1, 1, false, "12").len(), 32);
        assert_eq!(dirent(1, 1, false, "12345678").len(), 32);
    }

    #[test]
    fn words_split_and_join() {
        let joined = word(0x1122_3344, 0x5566_7788);
        assert_eq!((low(joined), high(joined)), (0x1122_3344, 0x5566_7788));
    }
}
