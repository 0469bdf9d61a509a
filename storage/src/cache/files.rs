//! Every change that a cache makes on disk. In tests of this crate a journal can listen, from which
//! what a crash may leave behind is made again.

#[cfg(test)]
pub(crate) mod journal;

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
};

/// An open file of a cache.
#[derive(Debug)]
pub(crate) struct Tracked {
    file: File,
    #[cfg(test)]
    listener: Option<journal::Listener>,
}

/// Opens a file that is there, for reading and writing.
pub(crate) fn open(path: &Path) -> io::Result<Tracked> {
    Tracked::new(path, OpenOptions::new().read(true).write(true), false)
}

/// Opens a file, or makes an empty one.
pub(crate) fn open_or_create(path: &Path) -> io::Result<Tracked> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    Tracked::new(path, options, false)
}

/// Makes an empty file, or makes one empty that is there.
pub(crate) fn create(path: &Path) -> io::Result<Tracked> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(true);
    Tracked::new(path, options, true)
}

/// Removes a file; whether it was there.
pub(crate) fn remove(path: &Path) -> io::Result<bool> {
    #[cfg(test)]
    journal::unlinked(path);
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Renames a file within its folder.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    journal::renamed(from, to);
    std::fs::rename(from, to)
}

/// Makes creations, renames and removals in the folder of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    #[cfg(test)]
    let before = journal::mark(path);
    File::open(parent)?.sync_all()?;
    #[cfg(test)]
    journal::folder_synced(path, before);
    Ok(())
}

impl Tracked {
    #[cfg_attr(not(test), expect(unused_variables, reason = "for the journal"))]
    fn new(path: &Path, options: &OpenOptions, emptied: bool) -> io::Result<Self> {
        let file = options.open(path)?;
        Ok(Self {
            file,
            #[cfg(test)]
            listener: journal::opened(path, emptied),
        })
    }

    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        let _write = self.listener.as_ref().map(|l| l.write(bytes, offset));
        self.file.write_all_at(bytes, offset)
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        #[cfg(test)]
        if let Some(listener) = &self.listener {
            listener.len(len);
        }
        self.file.set_len(len)
    }

    /// Makes content and length durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(listener) = &self.listener {
            return listener.sync(&self.file);
        }
        self.file.sync_data()
    }
}
