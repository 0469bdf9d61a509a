//! One sparse file and its presence map, with the order of writes that makes the map true.

use std::{
    io,
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use super::{
    bits::Bits,
    files::{self, Tracked},
    mapfile::{MapFile, MapSpec},
};

/// A sparse file of fixed length and the bits that say what of it is there.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    len: u64,
    file: OnceLock<Tracked>,
    pub(crate) bits: Bits,
    map: Mutex<MapFile>,
    dirty: AtomicBool,
    /// How often written bytes were lost. Held shared while bits are set, so that none is set for
    /// bytes that were lost meanwhile.
    losses: RwLock<u64>,
}

/// Says that nothing was lost since a write began; see [`Store::write`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written(u64);

impl Store {
    /// Opens `dir/name` and `dir/name.map`. Bits are taken from disk only if map and file are
    /// exactly what `spec` says; otherwise the store is empty.
    pub(crate) fn open(path: PathBuf, spec: MapSpec) -> io::Result<Self> {
        let map_path = path.with_added_extension("map");
        let len = spec.subject_len;
        let (mut map, mut bits) = MapFile::open(map_path, spec)?;
        let file = OnceLock::new();
        match files::open(&path) {
            Ok(found) if bits.count() > 0 && found.metadata()?.len() == len => {
                // Cannot be set already: the cell is new.
                let _ = file.set(found);
            }
            Ok(_) => {
                map.remove()?;
                bits = Bits::new(bits.len());
                // A new file, never the old one emptied: it may be the device of something.
                files::remove(&path)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                map.remove()?;
                bits = Bits::new(bits.len());
            }
            Err(error) => return Err(error),
        }
        Ok(Self {
            path,
            len,
            file,
            bits,
            map: Mutex::new(map),
            dirty: AtomicBool::new(false),
            losses: RwLock::default(),
        })
    }

    /// The file, created when first needed.
    pub(crate) fn file(&self) -> io::Result<&Tracked> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = files::open_or_create(&self.path)?;
        file.set_len(self.len)?;
        // Two threads may both have opened the same path: either descriptor will do.
        Ok(self.file.get_or_init(|| file))
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Fills `buf` from `offset`. A file that is shorter than its presence bits claim is an error,
    /// never zeros.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file()?.read_exact_at(buf, offset)
    }

    /// Writes `parts` one behind the other, without marking anything. Bits for them may be set
    /// under the guard of [`Self::marking`].
    pub(crate) fn write<'a>(
        &self,
        parts: impl IntoIterator<Item = &'a [u8]>,
        mut offset: u64,
    ) -> io::Result<Written> {
        let written = Written(*self.losses.read());
        let file = self.file()?;
        for part in parts {
            file.write_all_at(part, offset)?;
            offset += part.len() as u64;
        }
        Ok(written)
    }

    /// The right to set bits for what was written. An error if it may be lost.
    pub(crate) fn marking(&self, written: Written) -> io::Result<RwLockReadGuard<'_, u64>> {
        let guard = self.losses.read();
        if *guard == written.0 {
            Ok(guard)
        } else {
            Err(io::Error::other(
                "the disk lost bytes that were written lately",
            ))
        }
    }

    /// Notes that bits were set since the last flush; whether this is the first since then.
    pub(crate) fn touch(&self) -> bool {
        !self.dirty.swap(true, Ordering::AcqRel)
    }

    /// Makes all bits that are set now durable: data first, then map. Blocks. Without `force`
    /// only if something was set since the last attempt.
    ///
    /// A sync that fails says so once: the pages that could not be written count as clean from
    /// then on, and what is read back later may be holes. So everything that was not durable
    /// before is forgotten, and `lost` is called before any bit can be set again.
    pub(crate) fn flush(&self, force: bool, lost: impl FnOnce()) -> io::Result<()> {
        let mut map = self.map.lock();
        if !self.dirty.swap(false, Ordering::AcqRel) && !force {
            return Ok(());
        }
        if self.file.get().is_none() {
            return Ok(());
        }
        // Bits are set after their data was written, so the data of every bit in this copy is
        // covered by the sync that follows.
        let words: Vec<u64> = self.bits.words().collect();
        if let Err(error) = self.file().and_then(Tracked::sync) {
            let mut losses = self.losses.write();
            *losses += 1;
            self.bits.keep_only(map.words());
            lost();
            return Err(error);
        }
        let stored = map.store(&words);
        if stored.is_err() {
            // The data is safe; the map is written with the next flush.
            self.dirty.store(true, Ordering::Release);
        }
        stored
    }

    /// Whether every bit is set on disk.
    pub(crate) fn is_full_on_disk(&self) -> bool {
        let map = self.map.lock();
        let set = map.words().iter().map(|word| u64::from(word.count_ones()));
        set.sum::<u64>() == self.bits.len()
    }

    /// Forgets everything and gives the space back: bits first, then the map, then the file.
    pub(crate) fn retire(&self) -> io::Result<()> {
        let mut map = self.map.lock();
        {
            let mut losses = self.losses.write();
            *losses += 1;
            self.bits.clear_range(0..self.bits.len());
        }
        self.dirty.store(false, Ordering::Release);
        map.remove()?;
        if let Some(file) = self.file.get() {
            files::remove(&self.path)?;
            // The descriptor stays open, so unlinking alone would not free the blocks.
            file.set_len(0)?;
            file.set_len(self.len)?;
        }
        Ok(())
    }

    /// Bytes that the file occupies on disk.
    pub(crate) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        self.file
            .get()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |meta| meta.blocks() * 512)
    }
}
