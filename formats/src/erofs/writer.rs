//! Writes the metadata image of one layer.
//!
//! Two passes: the first walks the tree breadth first, decides how each inode is laid out and
//! where it lies (children of a directory lie together); the second writes. Walking order is by
//! name, so equal trees give equal images with equal inode numbers.

use sha2::{Digest as _, Sha256};

use super::{
    chunks::Shape,
    dirents::{self, Blocks, Entry},
    layout::{
        BLOCK, BLOCK_BITS, BLOCK_LEN, CHUNK_INDEXES, DEVICE_SLOT_LEN, DeviceSlot, INODE_LEN,
        INODE_SLOT, InodeHead, NULL_BLOCK, SUPER_CHECKSUM, SUPER_LEN, SUPER_OFFSET, SUPER_UUID,
        Super, checksum, compat, data, encode_rdev, file_type, incompat, mode,
    },
    xattr::{self, Misfit},
};
use crate::tree::{Directory, InodeId, Kind, LayerTree, Regular, is_name};

/// Largest metadata image that is written, in bytes.
const MAX_IMAGE: u64 = 1 << 31;
/// Longest symlink target the kernel resolves.
const MAX_TARGET: usize = 4095;
/// Where the device table lies.
const DEVICES_AT: usize = SUPER_OFFSET + SUPER_LEN;
/// The same, as the superblock counts it.
const DEVICE_SLOT: u16 = 9;
const _: () = assert!(DEVICE_SLOT as usize * DEVICE_SLOT_LEN == DEVICES_AT);
/// Where the first inode lies; small enough for the root's number to fit 16 bits.
const INODES_AT: u64 = (DEVICES_AT + DEVICE_SLOT_LEN) as u64;

/// Why a tree does not become an image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteError {
    /// One inode cannot be represented.
    #[error("{path:?}: {problem}")]
    Inode {
        /// A path of the inode, relative to the layer's root.
        path: String,
        /// What is wrong.
        problem: InodeProblem,
    },
    /// The image would be too large.
    #[error("metadata image would pass {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// The device has more blocks than an address can name.
    #[error("device of {0} bytes is too large: an address has 32 bits of 4096-byte blocks")]
    DeviceTooLarge(u64),
}

/// What is wrong with an inode.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InodeProblem {
    /// A directory entry's name.
    #[error("name is empty, `.`, `..`, longer than 255 bytes, or holds a slash or NUL")]
    Name,
    /// A directory with more than one name.
    #[error("directory has more than one name")]
    LinkedDirectory,
    /// A symlink's target.
    #[error("symlink target is empty, longer than 4095 bytes, or holds a NUL")]
    Target,
    /// A device number.
    #[error("device number {major}:{minor} does not fit 12 and 20 bits")]
    DeviceNumber {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// An xattr's name.
    #[error("xattr name is longer than 255 bytes or holds a NUL")]
    XattrName,
    /// An xattr's value.
    #[error("xattr value is longer than 65,535 bytes")]
    XattrValue,
    /// All xattrs of the inode together.
    #[error("xattrs take more than 262,144 bytes")]
    XattrTotal,
    /// Extents that are empty, overlap, are not sorted or pass the end of the file.
    #[error("extents are empty, overlap, are not sorted or pass the end of the file")]
    Extents,
    /// An extent that does not begin and end at a block border.
    #[error("extent at {offset} is not aligned to 4096 bytes")]
    Unaligned {
        /// Its offset in the file.
        offset: u64,
    },
    /// An extent that passes the end of the device.
    #[error("extent ends at {end} on a device of {device_len} bytes")]
    BeyondDevice {
        /// Its end on the device.
        end: u64,
        /// Length of the device.
        device_len: u64,
    },
}

impl From<Misfit> for InodeProblem {
    fn from(misfit: Misfit) -> Self {
        match misfit {
            Misfit::Name => Self::XattrName,
            Misfit::Value => Self::XattrValue,
            Misfit::Total => Self::XattrTotal,
        }
    }
}

/// Writes the metadata-only image of `tree`. File bytes lie on one extra device of `device_len`
/// bytes, the decoded address space; the device file must have at least that length, rounded up
/// to 4096 bytes, before the image is mounted.
///
/// Equal arguments give equal images. The UUID is taken from the SHA-256 of the image itself.
/// Whiteouts become character devices 0:0 without permissions; attributes they may carry are not
/// stored. Xattrs are stored as [`is_xattr_presented`](super::is_xattr_presented) says.
pub fn write(tree: &LayerTree, device_len: u64) -> Result<Vec<u8>, WriteError> {
    let device_blocks = u32::try_from(device_len.div_ceil(BLOCK))
        .ok()
        .filter(|blocks| *blocks < NULL_BLOCK)
        .ok_or(WriteError::DeviceTooLarge(device_len))?;
    let layout = Layout::plan(tree, device_len)?;
    let mut image = vec![0; layout.len];
    for planned in &layout.planned {
        layout.emit(tree, planned, &mut image);
    }

    let blocks = layout.blocks;
    let devices = DeviceSlot {
        blocks: device_blocks,
        // Lets a reader that knows no device numbers find the device behind this image.
        unified: blocks.checked_add(device_blocks).map_or(0, |_| blocks),
    };
    image[DEVICES_AT..DEVICES_AT + DEVICE_SLOT_LEN].copy_from_slice(&devices.encode());
    let sb = Super {
        compat: compat::CHECKSUM | compat::MTIME,
        block_bits: 12,
        root_nid: layout.root_nid,
        inodes: layout.planned.len() as u64,
        blocks,
        incompat: incompat::CHUNKED | incompat::DEVICES,
        extra_devices: 1,
        device_slot: DEVICE_SLOT,
        ..Super::default()
    };
    image[SUPER_OFFSET..SUPER_OFFSET + SUPER_LEN].copy_from_slice(&sb.encode());
    seal(&mut image);
    Ok(image)
}

/// Fills UUID and checksum in.
fn seal(image: &mut [u8]) {
    let id = Sha256::digest(&image);
    let (first, _) = image.split_at_mut(BLOCK_LEN);
    let sb = &mut first[SUPER_OFFSET..];
    let uuid_len = SUPER_UUID.len();
    sb[SUPER_UUID].copy_from_slice(&id[..uuid_len]);
    let sum = checksum(sb);
    sb[SUPER_CHECKSUM].copy_from_slice(&sum.to_le_bytes());
}

/// One inode, planned.
struct Planned<'a> {
    id: InodeId,
    /// Position in `planned` of a directory that names it, and the name.
    named: (usize, &'a [u8]),
    /// Where it lies.
    at: u64,
    xattrs: Vec<u8>,
    content: Content<'a>,
}

/// What an inode holds, laid out.
enum Content<'a> {
    Directory {
        directory: &'a Directory,
        entries: Vec<Entry<'a, Target>>,
        blocks: Blocks,
        /// The last block lies behind the inode.
        inline: bool,
        /// First of the other blocks.
        first_block: u32,
    },
    Chunks(&'a Regular, Shape),
    Empty,
    Symlink {
        target: &'a [u8],
        /// The block that holds the target where it does not lie behind the inode.
        block: Option<u32>,
    },
    Special {
        rdev: u32,
    },
}

/// What a directory entry points at.
#[derive(Clone, Copy)]
enum Target {
    Own,
    Parent,
    Child(InodeId),
}

struct Layout<'a> {
    planned: Vec<Planned<'a>>,
    /// Position in `planned` by [`InodeId`].
    position: Vec<Option<usize>>,
    root_nid: u16,
    blocks: u32,
    len: usize,
}

impl<'a> Layout<'a> {
    fn plan(tree: &'a LayerTree, device_len: u64) -> Result<Self, WriteError> {
        let mut layout = Self {
            planned: Vec::with_capacity(tree.inodes().len()),
            position: vec![None; tree.inodes().len()],
            root_nid: 0,
            blocks: 0,
            len: 0,
        };
        let mut places = Places::default();
        layout.add(tree, InodeId::ROOT, (0, b""), device_len, &mut places)?;
        let mut next = 0;
        while next < layout.planned.len() {
            if let Content::Directory { directory, .. } = layout.planned[next].content {
                for (name, child) in &directory.entries {
                    if !is_name(name) {
                        return Err(layout.error(next, InodeProblem::Name));
                    }
                    if layout.position[child.index()].is_none() {
                        layout.add(tree, *child, (next, name), device_len, &mut places)?;
                    } else if tree.directory(*child).is_some() {
                        return Err(layout.error(next, InodeProblem::LinkedDirectory));
                    }
                }
            }
            next += 1;
        }
        layout.place_blocks(places.end)?;
        let root = layout.planned[0].at / INODE_SLOT;
        // The root lies in the first or second block, or behind 262,144 bytes at most.
        layout.root_nid = u16::try_from(root).map_err(|_| too_large())?;
        Ok(layout)
    }

    /// Plans the inode `id`.
    fn add(
        &mut self,
        tree: &'a LayerTree,
        id: InodeId,
        named: (usize, &'a [u8]),
        device_len: u64,
        places: &mut Places,
    ) -> Result<(), WriteError> {
        let inode = tree.inode(id);
        let mut planned = Planned {
            id,
            named,
            at: 0,
            xattrs: Vec::new(),
            content: Content::Special { rdev: 0 },
        };
        let place = planned.lay_out(inode, device_len);
        let index = self.planned.len();
        self.position[id.index()] = Some(index);
        self.planned.push(planned);
        let (len, in_one_block) = place.map_err(|problem| self.error(index, problem))?;
        self.planned[index].at = places.take(len, in_one_block).ok_or_else(too_large)?;
        Ok(())
    }

    /// Gives blocks to what does not lie behind its inode.
    fn place_blocks(&mut self, inodes_end: u64) -> Result<(), WriteError> {
        let mut next = u32::try_from(inodes_end.div_ceil(BLOCK)).map_err(|_| too_large())?;
        for planned in &mut self.planned {
            let (first, count) = match &mut planned.content {
                Content::Directory {
                    blocks,
                    inline,
                    first_block,
                    ..
                } => (first_block, blocks.starts.len() - usize::from(*inline)),
                Content::Symlink {
                    block: Some(block), ..
                } => (block, 1),
                _ => continue,
            };
            *first = if count == 0 { NULL_BLOCK } else { next };
            next = u32::try_from(count)
                .ok()
                .and_then(|count| next.checked_add(count))
                .ok_or_else(too_large)?;
        }
        let len = u64::from(next) << BLOCK_BITS;
        if len > MAX_IMAGE {
            return Err(too_large());
        }
        self.blocks = next;
        self.len = usize::try_from(len).map_err(|_| too_large())?;
        Ok(())
    }

    fn error(&self, mut index: usize, problem: InodeProblem) -> WriteError {
        let mut names = Vec::new();
        while index != 0 {
            let (parent, name) = self.planned[index].named;
            names.push(String::from_utf8_lossy(name));
            index = parent;
        }
        names.reverse();
        WriteError::Inode {
            path: names.join("/"),
            problem,
        }
    }

    fn planned_at(&self, id: InodeId) -> &Planned<'a> {
        // Every inode that an entry names was planned.
        &self.planned[self.position[id.index()].unwrap_or(0)]
    }

    /// Writes one inode and what belongs to it.
    fn emit(&self, tree: &LayerTree, planned: &Planned<'_>, image: &mut [u8]) {
        let inode = tree.inode(planned.id);
        let index = self.position[planned.id.index()].unwrap_or(0);
        let whiteout = matches!(inode.kind, Kind::Whiteout);
        let mut head = InodeHead {
            xattr_count: xattr::stored_count(planned.xattrs.len()),
            mode: type_bits(&inode.kind),
            ino: u32::try_from(index + 1).unwrap_or(u32::MAX),
            nlink: inode.nlink,
            ..InodeHead::default()
        };
        if !whiteout {
            head.mode |= inode.attrs.mode & 0o7777;
            head.uid = inode.attrs.uid;
            head.gid = inode.attrs.gid;
            head.mtime = inode.attrs.mtime.seconds;
            head.mtime_nanos = inode.attrs.mtime.nanos;
        }
        let at = to_usize(planned.at);
        let behind = at + to_usize(INODE_LEN) + planned.xattrs.len();
        match &planned.content {
            Content::Directory {
                entries,
                blocks,
                inline,
                first_block,
                ..
            } => {
                head.data = if *inline { data::INLINE } else { data::PLAIN };
                head.size = blocks.size();
                head.tail = *first_block;
                for block in 0..blocks.starts.len() {
                    let last = block + 1 == blocks.starts.len();
                    let start = if last && *inline {
                        behind
                    } else {
                        block_at(*first_block) + block * BLOCK_LEN
                    };
                    let entries = &entries[blocks.entries(block, entries.len())];
                    dirents::encode(entries, &mut image[start..], |target| {
                        let target = match target {
                            Target::Own => planned,
                            Target::Parent => &self.planned[planned.named.0],
                            Target::Child(id) => self.planned_at(id),
                        };
                        let kind = &tree.inode(target.id).kind;
                        (target.at / INODE_SLOT, entry_type(kind))
                    });
                }
            }
            Content::Chunks(file, shape) => {
                head.data = data::CHUNKS;
                head.size = file.size;
                head.tail = u32::from(CHUNK_INDEXES) | shape.bits;
                let mut to = behind.next_multiple_of(8);
                for block in shape.addresses(file) {
                    let device = u16::from(block != NULL_BLOCK);
                    image[to + 2..to + 4].copy_from_slice(&device.to_le_bytes());
                    image[to + 4..to + 8].copy_from_slice(&block.to_le_bytes());
                    to += 8;
                }
            }
            Content::Empty => head.tail = NULL_BLOCK,
            Content::Symlink { target, block } => {
                head.size = target.len() as u64;
                let start = match block {
                    None => {
                        head.data = data::INLINE;
                        head.tail = NULL_BLOCK;
                        behind
                    }
                    Some(block) => {
                        head.tail = *block;
                        block_at(*block)
                    }
                };
                image[start..start + target.len()].copy_from_slice(target);
            }
            Content::Special { rdev } => head.tail = *rdev,
        }
        image[at..at + to_usize(INODE_LEN)].copy_from_slice(&head.encode());
        image[at + to_usize(INODE_LEN)..behind].copy_from_slice(&planned.xattrs);
    }
}

impl<'a> Planned<'a> {
    /// Decides the layout. Returns the length of the inode with all that lies behind it, and
    /// whether it must not cross a block border (the kernel wants inline data in one block).
    fn lay_out(
        &mut self,
        inode: &'a crate::tree::Inode,
        device_len: u64,
    ) -> Result<(u64, bool), InodeProblem> {
        let attrs = &inode.attrs;
        self.xattrs = match &inode.kind {
            Kind::Whiteout => Vec::new(),
            Kind::Directory(directory) => xattr::encode(&attrs.xattrs, directory.opaque)?,
            _ => xattr::encode(&attrs.xattrs, false)?,
        };
        let head_len = INODE_LEN + self.xattrs.len() as u64;
        let fits = |tail: usize| head_len + tail as u64 <= BLOCK;
        let (content, behind, in_one_block) = match &inode.kind {
            Kind::Directory(directory) => {
                let entries = sorted(directory);
                let blocks = Blocks::fill(&entries);
                let tail = blocks.last_len;
                let inline = fits(tail);
                let content = Content::Directory {
                    directory,
                    entries,
                    blocks,
                    inline,
                    first_block: NULL_BLOCK,
                };
                (content, if inline { tail as u64 } else { 0 }, inline)
            }
            Kind::Regular(file) if file.size == 0 => {
                Shape::of(file, device_len)?;
                (Content::Empty, 0, false)
            }
            Kind::Regular(file) => {
                let shape = Shape::of(file, device_len)?;
                let padding = head_len.next_multiple_of(8) - head_len;
                let behind = shape.array_len().saturating_add(padding);
                (Content::Chunks(file, shape), behind, false)
            }
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
                    return Err(InodeProblem::Target);
                }
                let inline = fits(target.len());
                let block = (!inline).then_some(NULL_BLOCK);
                let behind = if inline { target.len() as u64 } else { 0 };
                (Content::Symlink { target, block }, behind, inline)
            }
            Kind::CharDevice(device) | Kind::BlockDevice(device) => {
                let (major, minor) = (device.major, device.minor);
                let rdev =
                    encode_rdev(major, minor).ok_or(InodeProblem::DeviceNumber { major, minor })?;
                (Content::Special { rdev }, 0, false)
            }
            Kind::Fifo | Kind::Whiteout => (Content::Special { rdev: 0 }, 0, false),
        };
        self.content = content;
        Ok((head_len.saturating_add(behind), in_one_block))
    }
}

/// The entries of a directory with `.` and `..`, sorted as the kernel searches them.
fn sorted(directory: &Directory) -> Vec<Entry<'_, Target>> {
    let mut entries = Vec::with_capacity(directory.entries.len() + 2);
    let own = [(&b"."[..], Target::Own), (b"..", Target::Parent)];
    let mut own = own.into_iter().peekable();
    for (name, child) in &directory.entries {
        while let Some((name, target)) = own.next_if(|(own, _)| *own < name.as_slice()) {
            entries.push(Entry { name, target });
        }
        entries.push(Entry {
            name,
            target: Target::Child(*child),
        });
    }
    entries.extend(own.map(|(name, target)| Entry { name, target }));
    entries
}

/// Gives out places for inodes, in order, and fills gaps that inline data leaves at the ends of
/// blocks with later inodes that fit.
struct Places {
    end: u64,
    gaps: Vec<(u64, u64)>,
}

/// Gaps that are remembered: enough to lose almost nothing, few enough to search.
const MAX_GAPS: usize = 8;
/// The shortest inode.
const MIN_GAP: u64 = INODE_LEN;

impl Default for Places {
    fn default() -> Self {
        Self {
            end: INODES_AT,
            gaps: Vec::new(),
        }
    }
}

impl Places {
    fn take(&mut self, len: u64, in_one_block: bool) -> Option<u64> {
        // A gap never crosses a block border.
        if let Some(index) = self.gaps.iter().position(|(start, end)| end - start >= len) {
            let (start, end) = self.gaps[index];
            let rest = start + len.next_multiple_of(INODE_SLOT);
            if rest + MIN_GAP <= end {
                self.gaps[index].0 = rest;
            } else {
                self.gaps.remove(index);
            }
            return Some(start);
        }
        let mut start = self.end;
        if in_one_block && start % BLOCK + len > BLOCK {
            let border = start.next_multiple_of(BLOCK);
            if border - start >= MIN_GAP {
                if self.gaps.len() == MAX_GAPS {
                    self.gaps.remove(0);
                }
                self.gaps.push((start, border));
            }
            start = border;
        }
        let end = start.checked_add(len)?;
        if end > MAX_IMAGE {
            return None;
        }
        self.end = end.next_multiple_of(INODE_SLOT);
        Some(start)
    }
}

fn type_bits(kind: &Kind) -> u16 {
    match kind {
        Kind::Directory(_) => mode::DIRECTORY,
        Kind::Regular(_) => mode::REGULAR,
        Kind::Symlink(_) => mode::SYMLINK,
        Kind::CharDevice(_) | Kind::Whiteout => mode::CHAR,
        Kind::BlockDevice(_) => mode::BLOCK,
        Kind::Fifo => mode::FIFO,
    }
}

fn entry_type(kind: &Kind) -> u8 {
    match kind {
        Kind::Directory(_) => file_type::DIRECTORY,
        Kind::Regular(_) => file_type::REGULAR,
        Kind::Symlink(_) => file_type::SYMLINK,
        Kind::CharDevice(_) | Kind::Whiteout => file_type::CHAR,
        Kind::BlockDevice(_) => file_type::BLOCK,
        Kind::Fifo => file_type::FIFO,
    }
}

fn too_large() -> WriteError {
    WriteError::TooLarge { limit: MAX_IMAGE }
}

fn block_at(block: u32) -> usize {
    to_usize(u64::from(block) << BLOCK_BITS)
}

/// Positions in the image, which is a `Vec` and at most [`MAX_IMAGE`] long.
fn to_usize(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}
