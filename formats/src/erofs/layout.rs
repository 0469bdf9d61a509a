//! On-disk structures: where each field lies. Nothing here decides anything.

/// log2 of the block size the writer uses.
pub(super) const BLOCK_BITS: u32 = 12;
/// The block size the writer uses.
pub(super) const BLOCK: u64 = 1 << BLOCK_BITS;
/// The same in bytes of memory.
pub(super) const BLOCK_LEN: usize = 1 << BLOCK_BITS;
/// Byte offset of the superblock.
pub(super) const SUPER_OFFSET: usize = 1024;
/// Length of the superblock without extension slots.
pub(super) const SUPER_LEN: usize = 128;
/// First four bytes of the superblock.
pub(super) const MAGIC: u32 = 0xe0f5_e1e2;
/// An inode number counts these from the start of the metadata area.
pub(super) const INODE_SLOT: u64 = 32;
/// Length of a device slot, and the unit of the superblock's pointer to them.
pub(super) const DEVICE_SLOT_LEN: usize = 128;
/// Length of an extended inode.
pub(super) const INODE_LEN: u64 = 64;
/// Length of a chunk index.
pub(super) const CHUNK_INDEX_LEN: u64 = 8;
/// Length of a directory entry without its name.
pub(super) const DIRENT_LEN: usize = 12;
/// A block address that stands for zeros.
pub(super) const NULL_BLOCK: u32 = u32::MAX;

/// Compatible features.
pub(super) mod compat {
    /// The superblock's block has a CRC-32C.
    pub(crate) const CHECKSUM: u32 = 0x1;
    /// Extended inodes hold modification times.
    pub(crate) const MTIME: u32 = 0x2;
    /// Shared xattrs lie in the metadata box instead of blocks of their own.
    pub(crate) const SHARED_XATTRS_IN_METABOX: u32 = 0x8;
}

/// Incompatible features.
pub(super) mod incompat {
    /// Compressed inodes are zero-padded; says nothing about uncompressed ones.
    pub(crate) const ZERO_PADDING: u32 = 0x1;
    /// Chunk-based inodes occur.
    pub(crate) const CHUNKED: u32 = 0x4;
    /// There is a device table.
    pub(crate) const DEVICES: u32 = 0x8;
}

/// How an inode's data is laid out.
pub(super) mod data {
    /// Consecutive blocks.
    pub(crate) const PLAIN: u16 = 0;
    /// Consecutive blocks, the last partial one behind the inode.
    pub(crate) const INLINE: u16 = 2;
    /// An array of chunk addresses behind the inode.
    pub(crate) const CHUNKS: u16 = 4;
}

/// Bits of a chunk-based inode's format: log2 of blocks per chunk.
pub(super) const CHUNK_BITS_MASK: u16 = 0x1f;
/// Bit of a chunk-based inode's format: 8-byte indexes with a device instead of 4-byte addresses.
pub(super) const CHUNK_INDEXES: u16 = 0x20;

/// Types in directory entries.
pub(super) mod file_type {
    /// Regular file.
    pub(crate) const REGULAR: u8 = 1;
    /// Directory.
    pub(crate) const DIRECTORY: u8 = 2;
    /// Character device.
    pub(crate) const CHAR: u8 = 3;
    /// Block device.
    pub(crate) const BLOCK: u8 = 4;
    /// Named pipe.
    pub(crate) const FIFO: u8 = 5;
    /// Socket.
    pub(crate) const SOCKET: u8 = 6;
    /// Symbolic link.
    pub(crate) const SYMLINK: u8 = 7;
}

/// Type bits of `mode`.
pub(super) mod mode {
    /// Mask of the type bits.
    pub(crate) const TYPE: u16 = 0o170_000;
    /// Regular file.
    pub(crate) const REGULAR: u16 = 0o100_000;
    /// Directory.
    pub(crate) const DIRECTORY: u16 = 0o040_000;
    /// Character device.
    pub(crate) const CHAR: u16 = 0o020_000;
    /// Block device.
    pub(crate) const BLOCK: u16 = 0o060_000;
    /// Named pipe.
    pub(crate) const FIFO: u16 = 0o010_000;
    /// Symbolic link.
    pub(crate) const SYMLINK: u16 = 0o120_000;
}

/// The superblock's fields that are read or written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Super {
    pub(super) checksum: u32,
    pub(super) compat: u32,
    pub(super) block_bits: u8,
    pub(super) extension_slots: u8,
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) epoch: u64,
    pub(super) fixed_nanos: u32,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) xattr_block: u32,
    pub(super) uuid: [u8; 16],
    pub(super) incompat: u32,
    pub(super) extra_devices: u16,
    pub(super) device_slot: u16,
    pub(super) dir_block_bits: u8,
}

/// Where the UUID lies in the superblock.
pub(super) const SUPER_UUID: core::ops::Range<usize> = 48..64;
/// Where the checksum lies in the superblock.
pub(super) const SUPER_CHECKSUM: core::ops::Range<usize> = 4..8;

impl Super {
    pub(super) fn encode(&self) -> [u8; SUPER_LEN] {
        let mut out = [0; SUPER_LEN];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(4, &self.checksum.to_le_bytes());
        put(8, &self.compat.to_le_bytes());
        put(12, &[self.block_bits, self.extension_slots]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.epoch.to_le_bytes());
        put(32, &self.fixed_nanos.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(44, &self.xattr_block.to_le_bytes());
        put(48, &self.uuid);
        // 64..80: volume name.
        put(80, &self.incompat.to_le_bytes());
        // 84..86: compression algorithms.
        put(86, &self.extra_devices.to_le_bytes());
        put(88, &self.device_slot.to_le_bytes());
        put(90, &[self.dir_block_bits]);
        out
    }

    /// `None`: the magic is wrong.
    pub(super) fn decode(bytes: &[u8; SUPER_LEN]) -> Option<Self> {
        if u32_at(bytes, 0)? != MAGIC {
            return None;
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[SUPER_UUID]);
        Some(Self {
            checksum: u32_at(bytes, 4)?,
            compat: u32_at(bytes, 8)?,
            block_bits: bytes[12],
            extension_slots: bytes[13],
            root_nid: u16_at(bytes, 14)?,
            inodes: u64_at(bytes, 16)?,
            epoch: u64_at(bytes, 24)?,
            fixed_nanos: u32_at(bytes, 32)?,
            blocks: u32_at(bytes, 36)?,
            meta_block: u32_at(bytes, 40)?,
            xattr_block: u32_at(bytes, 44)?,
            uuid,
            incompat: u32_at(bytes, 80)?,
            extra_devices: u16_at(bytes, 86)?,
            device_slot: u16_at(bytes, 88)?,
            dir_block_bits: bytes[90],
        })
    }
}

/// A device slot; the tag is left empty because mounts name the device themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DeviceSlot {
    /// Blocks of the device.
    pub(super) blocks: u32,
    /// Where the device begins in the unified address space; 0 is nowhere.
    pub(super) unified: u32,
}

impl DeviceSlot {
    pub(super) fn encode(self) -> [u8; DEVICE_SLOT_LEN] {
        let mut out = [0; DEVICE_SLOT_LEN];
        out[64..68].copy_from_slice(&self.blocks.to_le_bytes());
        out[68..72].copy_from_slice(&self.unified.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            blocks: u32_at(bytes, 64)?,
            unified: u32_at(bytes, 68)?,
        })
    }
}

/// An inode's fixed part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InodeHead {
    /// One of [`data`].
    pub(super) data: u16,
    /// Length of the xattrs as stored: 0, or 1 + (length - 12) / 4.
    pub(super) xattr_count: u16,
    /// Type and permissions.
    pub(super) mode: u16,
    /// Size in bytes.
    pub(super) size: u64,
    /// First block, device number or chunk format, by type and layout.
    pub(super) tail: u32,
    /// A 32-bit inode number that nothing uses.
    pub(super) ino: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) mtime_nanos: u32,
    pub(super) nlink: u32,
    /// Length of this part on disk: 32 or 64.
    pub(super) len: u8,
}

/// Format bit of an extended inode.
const EXTENDED: u16 = 1;
/// All format bits of a compact or extended inode that are understood.
const FORMAT_KNOWN: u16 = 0xf;

impl InodeHead {
    /// Encodes an extended inode.
    pub(super) fn encode(&self) -> [u8; 64] {
        let mut out = [0; 64];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.data << 1 | EXTENDED).to_le_bytes());
        put(2, &self.xattr_count.to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.tail.to_le_bytes());
        put(20, &self.ino.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.to_le_bytes());
        put(40, &self.mtime_nanos.to_le_bytes());
        put(44, &self.nlink.to_le_bytes());
        out
    }

    /// Decodes a compact or extended inode; times of compact ones come from the superblock.
    /// `None`: too short, or a format that is not known.
    pub(super) fn decode(bytes: &[u8], sb: &Super) -> Option<Self> {
        let format = u16_at(bytes, 0)?;
        if format & !FORMAT_KNOWN != 0 {
            return None;
        }
        let head = Self {
            data: format >> 1 & 7,
            xattr_count: u16_at(bytes, 2)?,
            mode: u16_at(bytes, 4)?,
            tail: u32_at(bytes, 16)?,
            ino: u32_at(bytes, 20)?,
            ..Self::default()
        };
        if format & EXTENDED == 0 {
            let since_epoch = u64::from(u32_at(bytes, 12)?);
            return Some(Self {
                size: u64::from(u32_at(bytes, 8)?),
                uid: u32::from(u16_at(bytes, 24)?),
                gid: u32::from(u16_at(bytes, 26)?),
                mtime: i64::from_le_bytes(sb.epoch.wrapping_add(since_epoch).to_le_bytes()),
                mtime_nanos: sb.fixed_nanos,
                nlink: u32::from(u16_at(bytes, 6)?),
                len: 32,
                ..head
            });
        }
        Some(Self {
            size: u64_at(bytes, 8)?,
            uid: u32_at(bytes, 24)?,
            gid: u32_at(bytes, 28)?,
            mtime: i64::from_le_bytes(u64_at(bytes, 32)?.to_le_bytes()),
            mtime_nanos: u32_at(bytes, 40)?,
            nlink: u32_at(bytes, 44)?,
            len: 64,
            ..head
        })
    }

    /// Length of the xattrs behind the fixed part.
    pub(super) fn xattr_len(&self) -> u64 {
        match self.xattr_count {
            0 => 0,
            count => 12 + 4 * (u64::from(count) - 1),
        }
    }
}

/// Packs a device number as `new_decode_dev` of the kernel takes it apart: 12 bits of major,
/// 20 bits of minor. `None`: it does not fit.
pub(super) fn encode_rdev(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

/// Takes a device number apart.
pub(super) fn decode_rdev(packed: u32) -> (u32, u32) {
    (
        packed >> 8 & 0xfff,
        (packed & 0xff) | (packed >> 12 & 0xf_ff00),
    )
}

/// CRC-32C as the superblock stores it: started with all ones, not inverted at the end.
pub(super) fn checksum(block: &[u8]) -> u32 {
    !crc32c::crc32c(block)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_le_bytes(*field))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*field))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (4095, 0xf_ffff)] {
            let packed = encode_rdev(major, minor).unwrap();
            assert_eq!(decode_rdev(packed), (major, minor));
        }
        assert_eq!(encode_rdev(1, 3), Some(0x103));
        assert_eq!(encode_rdev(4096, 0), None);
        assert_eq!(encode_rdev(0, 1 << 20), None);
    }

    #[test]
    fn structures_survive() {
        let sb = Super {
            checksum: 1,
            compat: 2,
            block_bits: 12,
            extension_slots: 0,
            root_nid: 40,
            inodes: 3,
            epoch: 4,
            fixed_nanos: 5,
            blocks: 6,
            meta_block: 7,
            xattr_block: 8,
            uuid: [9; 16],
            incompat: 12,
            extra_devices: 1,
            device_slot: 9,
            dir_block_bits: 0,
        };
        assert_eq!(Super::decode(&sb.encode()), Some(sb.clone()));
        let head = InodeHead {
            data: data::CHUNKS,
            xattr_count: 2,
            mode: mode::REGULAR | 0o4755,
            size: 1 << 40,
            tail: 0x20,
            ino: 9,
            uid: u32::MAX,
            gid: 1,
            mtime: -1,
            mtime_nanos: 999_999_999,
            nlink: 3,
            len: 64,
        };
        assert_eq!(InodeHead::decode(&head.encode(), &sb), Some(head));
        assert_eq!(head.xattr_len(), 16);
    }
}
