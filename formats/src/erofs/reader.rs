//! Reads uncompressed images back into a tree.

use std::collections::{HashMap, VecDeque};

use super::{
    chunks, dirents,
    layout::{
        CHUNK_BITS_MASK, CHUNK_INDEXES, DEVICE_SLOT_LEN, DeviceSlot, INODE_SLOT, InodeHead,
        NULL_BLOCK, SUPER_LEN, SUPER_OFFSET, Super, checksum, compat, data, decode_rdev, file_type,
        incompat, mode, u16_at, u32_at,
    },
    xattr,
};
use crate::{
    limits::Limits,
    tree::{
        Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Mtime, Rdev, Regular, is_name,
    },
    units::DecodedOffset,
};

/// Why an image was not read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadError {
    /// The superblock's magic is not that of EROFS.
    #[error("not an EROFS image")]
    Magic,
    /// The superblock's checksum.
    #[error("EROFS superblock checksum is {actual:#010x}, {expected:#010x} was stored")]
    Checksum {
        /// What was stored.
        expected: u32,
        /// What the block has.
        actual: u32,
    },
    /// A feature this reader does not know.
    #[error("EROFS image uses {what} ({value:#x}), which is not supported")]
    Unsupported {
        /// The feature.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Something points outside the image or contradicts itself.
    #[error("corrupt EROFS image: {what} at byte {offset}")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where, in the image.
        offset: u64,
    },
    /// A limit was passed.
    #[error("EROFS image passes the limit of {limit} {what}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

/// An EROFS image in memory, its superblock checked.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    bytes: &'a [u8],
    sb: Super,
    device: Option<DeviceSlot>,
}

impl<'a> Image<'a> {
    /// Opens an uncompressed image with at most one extra device.
    pub fn open(bytes: &'a [u8]) -> Result<Self, ReadError> {
        let raw = bytes
            .get(SUPER_OFFSET..)
            .and_then(|rest| rest.first_chunk::<SUPER_LEN>())
            .ok_or(corrupt("no superblock", SUPER_OFFSET as u64))?;
        let sb = Super::decode(raw).ok_or(ReadError::Magic)?;
        if !(9..=16).contains(&sb.block_bits) {
            return Err(unsupported("block size bits", sb.block_bits));
        }
        let known = incompat::CHUNKED | incompat::DEVICES | incompat::ZERO_PADDING;
        if sb.incompat & !known != 0 {
            return Err(unsupported("incompatible features", sb.incompat));
        }
        if sb.compat & compat::SHARED_XATTRS_IN_METABOX != 0 {
            return Err(unsupported("compatible features", sb.compat));
        }
        if sb.dir_block_bits != 0 || sb.extension_slots != 0 {
            return Err(unsupported("directory block bits", sb.dir_block_bits));
        }
        if sb.compat & compat::CHECKSUM != 0 {
            verify_checksum(bytes, &sb)?;
        }
        let device = match (sb.incompat & incompat::DEVICES, sb.extra_devices) {
            (0, _) | (_, 0) => None,
            (_, 1) => Some(device_slot(bytes, &sb)?),
            (_, count) => return Err(unsupported("several devices", count)),
        };
        Ok(Self { bytes, sb, device })
    }

    /// The volume's UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.sb.uuid
    }

    /// How many inodes the image says it has.
    pub fn inode_count(&self) -> u64 {
        self.sb.inodes
    }

    /// Size of the extra device in bytes, if there is one; 0 where a foreign writer did not state
    /// it. Extents of [`Image::tree`] lie on it;
    /// without one they lie in the image itself.
    pub fn device_len(&self) -> Option<u64> {
        let device = self.device?;
        Some(u64::from(device.blocks) << self.sb.block_bits)
    }

    /// The whole tree. Character devices 0:0 are whiteouts, overlayfs's own xattrs become
    /// [`Directory::opaque`] or nothing. No directory is marked as implied. Extents are joined
    /// where they continue each other, inodes numbered as [`LayerTree::in_order`] does.
    pub fn tree(&self, limits: &Limits) -> Result<LayerTree, ReadError> {
        let mut walk = Walk {
            image: self,
            limits,
            inodes: Vec::new(),
            by_nid: HashMap::new(),
            queue: VecDeque::new(),
            entries: 0,
            array_budget: self.bytes.len() as u64,
            directory_budget: self.bytes.len() as u64,
            xattr_budget: MAX_XATTRS_TOTAL,
        };
        let root = u64::from(self.sb.root_nid);
        let (id, kind) = walk.inode(root, root)?;
        if kind != file_type::DIRECTORY {
            return Err(corrupt("root is not a directory", self.position(root)?));
        }
        debug_assert_eq!(id, InodeId::ROOT);
        while let Some((id, nid)) = walk.queue.pop_front() {
            walk.directory(id, nid)?;
        }
        Ok(LayerTree {
            inodes: walk.inodes,
        })
    }

    /// Where the inode `nid` lies.
    fn position(&self, nid: u64) -> Result<u64, ReadError> {
        let area = u64::from(self.sb.meta_block) << self.sb.block_bits;
        nid.checked_mul(INODE_SLOT)
            .and_then(|at| at.checked_add(area))
            .filter(|at| *at < self.bytes.len() as u64)
            .ok_or(corrupt("inode number outside the image", nid))
    }

    fn slice(&self, at: u64, len: u64, what: &'static str) -> Result<&'a [u8], ReadError> {
        if len == 0 {
            // What has no bytes need not have a place either.
            return Ok(&[]);
        }
        let end = at.checked_add(len).ok_or(corrupt(what, at))?;
        usize::try_from(at)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(start, end)| self.bytes.get(start..end))
            .ok_or(corrupt(what, at))
    }

    fn head(&self, nid: u64) -> Result<(InodeHead, u64), ReadError> {
        let at = self.position(nid)?;
        let rest = self.slice(at, self.bytes.len() as u64 - at, "inode")?;
        let head = InodeHead::decode(rest, &self.sb).ok_or(corrupt("inode format", at))?;
        Ok((head, at))
    }

    /// The data of a flat inode: whole blocks, then what lies behind the inode.
    fn flat(&self, head: &InodeHead, at: u64) -> Result<Flat, ReadError> {
        let block = 1_u64 << self.sb.block_bits;
        let inline = match head.data {
            data::PLAIN => 0,
            data::INLINE if head.size == 0 => 0,
            // A last block that is full lies behind the inode, too, if it fits.
            data::INLINE => (head.size - 1) % block + 1,
            other => return Err(unsupported("data layout", other)),
        };
        let flat = Flat {
            blocks_at: u64::from(head.tail) << self.sb.block_bits,
            blocks_len: head.size - inline,
            inline_at: at + u64::from(head.len) + head.xattr_len(),
            inline_len: inline,
        };
        if inline != 0 && flat.inline_at % block + inline > block {
            return Err(corrupt("inline data crosses a block border", at));
        }
        Ok(flat)
    }

    /// Where bytes that an inode addresses lie in the data space.
    fn data_address(
        &self,
        device: u16,
        address: u64,
        len: u64,
        at: u64,
    ) -> Result<DecodedOffset, ReadError> {
        let bits = self.sb.block_bits;
        let block = 1_u64 << bits;
        let outside = corrupt("data outside its device", at);
        let device_len = |slot: DeviceSlot| match slot.blocks {
            0 => 1 << (32 + bits),
            blocks => u64::from(blocks) << bits,
        };
        let (start, limit) = match (self.device, device) {
            (None, 0) => (address, self.bytes.len() as u64),
            (Some(slot), 1) => (address, device_len(slot)),
            (Some(slot), 0) => {
                let base = u64::from(slot.unified) << bits;
                if base == 0 || address < base {
                    return Err(unsupported("data in the image and on a device", address));
                }
                (address - base, device_len(slot))
            }
            (_, other) => return Err(unsupported("device number", other)),
        };
        // The last block of a device may be partial, but then it is counted as whole.
        let limit = limit.next_multiple_of(block);
        match start.checked_add(len) {
            Some(end) if end <= limit => Ok(DecodedOffset(start)),
            _ => Err(outside),
        }
    }
}

/// All xattrs of an image that are kept in memory. Shared ones make a small image large.
const MAX_XATTRS_TOTAL: u64 = 256 << 20;

/// Where the data of a flat inode lies in the image.
struct Flat {
    blocks_at: u64,
    blocks_len: u64,
    inline_at: u64,
    inline_len: u64,
}

/// The state of reading a tree. Work is bounded by the image's length: every array and directory
/// block is charged against it, whoever points there.
struct Walk<'i, 'a> {
    image: &'i Image<'a>,
    limits: &'i Limits,
    inodes: Vec<Inode>,
    /// Inode and entry type by number.
    by_nid: HashMap<u64, (InodeId, u8)>,
    /// Directories whose entries are not read yet.
    queue: VecDeque<(InodeId, u64)>,
    entries: u32,
    array_budget: u64,
    directory_budget: u64,
    xattr_budget: u64,
}

impl Walk<'_, '_> {
    /// Reads an inode without a directory's entries. `from` is the directory that names it.
    fn inode(&mut self, nid: u64, from: u64) -> Result<(InodeId, u8), ReadError> {
        if let Some((id, kind)) = self.by_nid.get(&nid) {
            if *kind == file_type::DIRECTORY {
                return Err(corrupt("directory with two names", from));
            }
            return Ok((*id, *kind));
        }
        let max = self.limits.max_entries;
        let id = u32::try_from(self.inodes.len())
            .ok()
            .filter(|id| *id < max)
            .map(InodeId)
            .ok_or(ReadError::Limit {
                what: "inodes",
                limit: u64::from(max),
            })?;
        let (head, at) = self.image.head(nid)?;
        let xattrs = self.xattrs(&head, at)?;
        let (kind, entry_type) = self.kind(&head, at, xattrs.opaque)?;
        if head.mtime_nanos >= 1_000_000_000 {
            return Err(corrupt("nanoseconds", at));
        }
        if entry_type == file_type::DIRECTORY {
            self.queue.push_back((id, nid));
        }
        self.by_nid.insert(nid, (id, entry_type));
        self.inodes.push(Inode {
            attrs: Attrs {
                mode: head.mode & 0o7777,
                uid: head.uid,
                gid: head.gid,
                mtime: Mtime {
                    seconds: head.mtime,
                    nanos: head.mtime_nanos,
                },
                xattrs: xattrs.xattrs,
            },
            kind,
            nlink: head.nlink,
        });
        Ok((id, entry_type))
    }

    fn kind(&mut self, head: &InodeHead, at: u64, opaque: bool) -> Result<(Kind, u8), ReadError> {
        let (major, minor) = decode_rdev(head.tail);
        let device = Rdev { major, minor };
        Ok(match head.mode & mode::TYPE {
            mode::DIRECTORY => {
                let directory = Directory {
                    opaque,
                    ..Directory::default()
                };
                (Kind::Directory(directory), file_type::DIRECTORY)
            }
            mode::REGULAR => {
                let file = Regular {
                    size: head.size,
                    extents: self.extents(head, at)?,
                };
                (Kind::Regular(file), file_type::REGULAR)
            }
            mode::SYMLINK => (Kind::Symlink(self.symlink(head, at)?), file_type::SYMLINK),
            mode::CHAR if (major, minor) == (0, 0) => (Kind::Whiteout, file_type::CHAR),
            mode::CHAR => (Kind::CharDevice(device), file_type::CHAR),
            mode::BLOCK => (Kind::BlockDevice(device), file_type::BLOCK),
            mode::FIFO => (Kind::Fifo, file_type::FIFO),
            other => return Err(unsupported("inode type", other)),
        })
    }

    fn xattrs(&mut self, head: &InodeHead, at: u64) -> Result<xattr::Decoded, ReadError> {
        let start = at + u64::from(head.len);
        let body = self.image.slice(start, head.xattr_len(), "xattrs")?;
        let shared_at = u64::from(self.image.sb.xattr_block) << self.image.sb.block_bits;
        let shared = usize::try_from(shared_at)
            .ok()
            .and_then(|start| self.image.bytes.get(start..))
            .unwrap_or_default();
        let max = usize::try_from(self.limits.max_xattr_bytes).unwrap_or(usize::MAX);
        let decoded = xattr::decode(body, shared, max).ok_or(corrupt("xattrs", start))?;
        self.xattr_budget =
            self.xattr_budget
                .checked_sub(decoded.bytes as u64)
                .ok_or(ReadError::Limit {
                    what: "bytes of xattrs",
                    limit: MAX_XATTRS_TOTAL,
                })?;
        Ok(decoded)
    }

    fn symlink(&mut self, head: &InodeHead, at: u64) -> Result<Vec<u8>, ReadError> {
        if head.size > u64::from(self.limits.max_path_bytes) {
            return Err(ReadError::Limit {
                what: "bytes of a symlink target",
                limit: u64::from(self.limits.max_path_bytes),
            });
        }
        let flat = self.image.flat(head, at)?;
        let what = "symlink target";
        let mut target = self.image.slice(flat.blocks_at, flat.blocks_len, what)?;
        if flat.blocks_len == 0 {
            target = self.image.slice(flat.inline_at, flat.inline_len, what)?;
        } else if flat.inline_len != 0 {
            // Longer than a block and inline: nobody writes that.
            return Err(corrupt(what, at));
        }
        Ok(target.to_vec())
    }

    fn extents(&mut self, head: &InodeHead, at: u64) -> Result<Vec<Extent>, ReadError> {
        if head.size == 0 {
            return Ok(Vec::new());
        }
        if head.size > self.limits.max_decoded_bytes {
            return Err(ReadError::Limit {
                what: "bytes of a file",
                limit: self.limits.max_decoded_bytes,
            });
        }
        if head.data == data::CHUNKS {
            return self.chunk_extents(head, at);
        }
        let flat = self.image.flat(head, at)?;
        let mut extents = Vec::new();
        if flat.blocks_len != 0 {
            let len = flat.blocks_len;
            push(
                &mut extents,
                Extent {
                    file_offset: 0,
                    len,
                    decoded: self.image.data_address(0, flat.blocks_at, len, at)?,
                },
            );
        }
        if flat.inline_len != 0 {
            if self.image.device.is_some() {
                return Err(unsupported("data in the image and on a device", at));
            }
            self.image
                .slice(flat.inline_at, flat.inline_len, "inline data")?;
            push(
                &mut extents,
                Extent {
                    file_offset: flat.blocks_len,
                    len: flat.inline_len,
                    decoded: DecodedOffset(flat.inline_at),
                },
            );
        }
        Ok(extents)
    }

    fn chunk_extents(&mut self, head: &InodeHead, at: u64) -> Result<Vec<Extent>, ReadError> {
        // The upper half of the field is reserved.
        let format = u16::try_from(head.tail & 0xffff).unwrap_or(0);
        if format & !(CHUNK_BITS_MASK | CHUNK_INDEXES) != 0 {
            return Err(unsupported("chunk format", format));
        }
        let block_bits = u32::from(self.image.sb.block_bits);
        let chunk = 1_u64 << (block_bits + u32::from(format & CHUNK_BITS_MASK));
        let unit: u64 = if format & CHUNK_INDEXES == 0 { 4 } else { 8 };
        let start = (at + u64::from(head.len) + head.xattr_len()).next_multiple_of(unit);
        let len = head.size.div_ceil(chunk).saturating_mul(unit);
        self.array_budget = self
            .array_budget
            .checked_sub(len)
            .ok_or(corrupt("chunk arrays larger than the image", at))?;
        let array = self.image.slice(start, len, "chunk array")?;
        let mut extents: Vec<Extent> = Vec::new();
        let units = array.chunks_exact(usize::try_from(unit).unwrap_or(8));
        for (entry, index) in units.zip(0_u64..) {
            let (device, block) = if unit == 8 {
                (u16_at(entry, 2).unwrap_or(0), u32_at(entry, 4))
            } else {
                (0, u32_at(entry, 0))
            };
            let block = block.unwrap_or(NULL_BLOCK);
            if block == NULL_BLOCK {
                continue;
            }
            // A device number is masked to as many bits as there are devices.
            let device = device & u16::from(self.image.device.is_some());
            let file_offset = index * chunk;
            let len = chunk.min(head.size - file_offset);
            let address = u64::from(block) << block_bits;
            push(
                &mut extents,
                Extent {
                    file_offset,
                    len,
                    decoded: self.image.data_address(device, address, len, at)?,
                },
            );
        }
        Ok(extents)
    }

    /// Reads the entries of the directory `id`.
    fn directory(&mut self, id: InodeId, nid: u64) -> Result<(), ReadError> {
        let (head, at) = self.image.head(nid)?;
        self.directory_budget = self
            .directory_budget
            .checked_sub(head.size)
            .ok_or(corrupt("directories larger than the image", at))?;
        let flat = self.image.flat(&head, at)?;
        let what = "directory data";
        let blocks = self.image.slice(flat.blocks_at, flat.blocks_len, what)?;
        let tail = self.image.slice(flat.inline_at, flat.inline_len, what)?;
        let block_len = 1_usize << self.image.sb.block_bits;
        let mut previous: Option<&[u8]> = None;
        for block in blocks.chunks(block_len).chain(tail.chunks(block_len)) {
            for entry in dirents::decode(block) {
                let entry = entry.ok_or(corrupt("directory block", at))?;
                if previous.is_some_and(|before| before >= entry.name) {
                    return Err(corrupt("directory entries out of order", at));
                }
                previous = Some(entry.name);
                if matches!(entry.name, b"." | b"..") {
                    continue;
                }
                self.entry(id, entry, at)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, id: InodeId, entry: dirents::Read<'_>, at: u64) -> Result<(), ReadError> {
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return Err(ReadError::Limit {
                what: "directory entries",
                limit: u64::from(self.limits.max_entries),
            });
        }
        if !is_name(entry.name) {
            return Err(corrupt("name of a directory entry", at));
        }
        if entry.file_type == file_type::SOCKET {
            return Err(unsupported("entry type", entry.file_type));
        }
        let (child, kind) = self.inode(entry.nid, at)?;
        if kind != entry.file_type {
            return Err(corrupt("entry type differs from the inode's", at));
        }
        if let Kind::Directory(directory) = &mut self.inodes[id.index()].kind {
            directory.entries.insert(entry.name.to_vec(), child);
        }
        Ok(())
    }
}

/// Adds an extent, joined to the last where it continues it.
fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last) if chunks::follows(last, &next) => last.len += next.len,
        _ => extents.push(next),
    }
}

fn verify_checksum(bytes: &[u8], sb: &Super) -> Result<(), ReadError> {
    let block = 1_usize << sb.block_bits;
    let len = if block > SUPER_OFFSET {
        block - SUPER_OFFSET
    } else {
        block
    };
    let covered = bytes
        .get(SUPER_OFFSET..SUPER_OFFSET + len)
        .ok_or(corrupt("superblock is cut off", SUPER_OFFSET as u64))?;
    let mut copy = covered.to_vec();
    copy[super::layout::SUPER_CHECKSUM].fill(0);
    let actual = checksum(&copy);
    if actual != sb.checksum {
        return Err(ReadError::Checksum {
            expected: sb.checksum,
            actual,
        });
    }
    Ok(())
}

fn device_slot(bytes: &[u8], sb: &Super) -> Result<DeviceSlot, ReadError> {
    let at = usize::from(sb.device_slot) * DEVICE_SLOT_LEN;
    bytes
        .get(at..at + DEVICE_SLOT_LEN)
        .and_then(DeviceSlot::decode)
        .ok_or(corrupt("device table outside the image", at as u64))
}

fn corrupt(what: &'static str, offset: u64) -> ReadError {
    ReadError::Corrupt { what, offset }
}

fn unsupported(what: &'static str, value: impl Into<u64>) -> ReadError {
    ReadError::Unsupported {
        what,
        value: value.into(),
    }
}
