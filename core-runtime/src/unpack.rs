//! Applies a tar layer onto a mounted root file system, as a serial unpack does.
//!
//! The process that unpacks has made the root file system its own root (chroot in a private mount
//! namespace), so no path of the archive can lead out of it and plain path calls are enough.

mod child;

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

use formats::{
    digest::Digest,
    limits::Limits,
    tar::{EntryType, Event, Header, Parser, TarError},
    tree::Mtime,
};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
        lsetxattr, makedev, mknodat, utimensat,
    },
    io::Errno,
};
use sha2::{Digest as _, Sha256};

pub use child::{STAGE, in_child, run_stage};

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The bytes are no tar archive.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be made.
    #[error("entry {} at offset {offset}: {step}", path.display())]
    Entry {
        /// Its path.
        path: PathBuf,
        /// Its offset in the tar.
        offset: u64,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A type that a root file system does not have.
    #[error("entry {} at offset {offset}: type {kind:?} is not supported", path.display())]
    Unsupported {
        /// Its path.
        path: PathBuf,
        /// Its offset in the tar.
        offset: u64,
        /// Type flag, or `sparse`.
        kind: String,
    },
}

/// Applies one layer, fed with the bytes of its tar.
#[derive(Debug)]
pub struct Unpacker {
    parser: Parser,
    hasher: Sha256,
    current: Option<(Box<Header>, PathBuf, Option<File>)>,
    /// Names this layer has made: an opaque marker must not delete them.
    made: HashSet<PathBuf>,
    /// Directory times are set last: making children changes them.
    directories: BTreeMap<PathBuf, Mtime>,
}

impl Unpacker {
    /// Unpacks into the process's root directory.
    pub fn new(limits: Limits) -> Self {
        Self {
            parser: Parser::new(limits),
            hasher: Sha256::new(),
            current: None,
            made: HashSet::new(),
            directories: BTreeMap::new(),
        }
    }

    /// Takes the next bytes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), UnpackError> {
        self.hasher.update(bytes);
        while let Some(event) = self.parser.next_event(&mut bytes)? {
            match event {
                Event::Entry(header) => self.begin(header)?,
                Event::Payload { bytes, .. } => {
                    if let Some((header, path, Some(file))) = &mut self.current {
                        file.write_all(bytes)
                            .map_err(|source| failed(header, path, "writing", source))?;
                    }
                }
                Event::EntryEnd => self.end()?,
                Event::End => {}
            }
        }
        Ok(())
    }

    /// Ends the layer; returns the digest of the tar (the DiffID).
    pub fn finish(self) -> Result<Digest, UnpackError> {
        self.parser.finish()?;
        for (path, mtime) in self.directories.iter().rev() {
            // A later whiteout may have taken the directory away.
            let _ = set_times(path, *mtime);
        }
        Ok(Digest::finish(self.hasher))
    }

    fn begin(&mut self, header: Box<Header>) -> Result<(), UnpackError> {
        let path = inside(&header.path);
        if header.sparse {
            return Err(UnpackError::Unsupported {
                path,
                offset: header.offset,
                kind: "sparse".into(),
            });
        }
        let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            let parent = path.parent().unwrap_or(Path::new("/"));
            if hidden == b".wh..opq" {
                self.clear(parent)
                    .map_err(|source| failed(&header, &path, "opaque directory", source))?;
            } else if !hidden.starts_with(b".wh.") && !hidden.is_empty() {
                remove(&parent.join(OsStr::from_bytes(hidden)))
                    .map_err(|source| failed(&header, &path, "whiteout", source))?;
            }
            self.current = Some((header, path, None));
            return Ok(());
        }
        let file = if path == Path::new("/") {
            None
        } else {
            self.make(&header, &path)?
        };
        self.current = Some((header, path, file));
        Ok(())
    }

    fn make(&mut self, header: &Header, path: &Path) -> Result<Option<File>, UnpackError> {
        let step = |step: &'static str| move |source| failed(header, path, step, source);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(step("making parent directories"))?;
        }
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() && header.kind == EntryType::Directory => {}
            Ok(_) => remove(path).map_err(step("replacing"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(step("looking up")(error)),
        }
        self.made.insert(path.to_owned());
        let node = |kind: FileType| {
            let device = makedev(header.rdev.major, header.rdev.minor);
            mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), device).map_err(io::Error::from)
        };
        match header.kind {
            EntryType::Regular => {
                return File::options()
                    .write(true)
                    .create_new(true)
                    .open(path)
                    .map(Some)
                    .map_err(step("creating"));
            }
            EntryType::Directory => match fs::create_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(()),
            },
            EntryType::Symlink => std::os::unix::fs::symlink(OsStr::from_bytes(&header.link), path),
            EntryType::HardLink => fs::hard_link(inside(&header.link), path),
            EntryType::CharDevice => node(FileType::CharacterDevice),
            EntryType::BlockDevice => node(FileType::BlockDevice),
            EntryType::Fifo => node(FileType::Fifo),
            EntryType::Other(b'g' | b'x') => return Ok(None),
            EntryType::Other(flag) => {
                return Err(UnpackError::Unsupported {
                    path: path.to_owned(),
                    offset: header.offset,
                    kind: char::from(flag).to_string(),
                });
            }
        }
        .map_err(step("making"))?;
        Ok(None)
    }

    fn end(&mut self) -> Result<(), UnpackError> {
        let Some((header, path, file)) = self.current.take() else {
            return Ok(());
        };
        drop(file);
        let marker = path
            .file_name()
            .is_some_and(|name| name.as_bytes().starts_with(b".wh."));
        if marker || path == Path::new("/") || matches!(header.kind, EntryType::Other(_)) {
            return Ok(());
        }
        let step = |step: &'static str| {
            let (header, path) = (&header, &path);
            move |error: Errno| failed(header, path, step, error.into())
        };
        let owner = (
            Some(Uid::from_raw(header.uid)),
            Some(Gid::from_raw(header.gid)),
        );
        chownat(CWD, &path, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(step("setting the owner"))?;
        for (name, value) in &header.xattrs {
            // As containerd: attributes that act on the host are not taken from an archive.
            if name.starts_with(b"trusted.") {
                continue;
            }
            match lsetxattr(&path, OsStr::from_bytes(name), value, XattrFlags::empty()) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(error) => return Err(step("setting an extended attribute")(error)),
            }
        }
        if header.kind != EntryType::Symlink {
            let mode = Mode::from_raw_mode(header.mode & 0o7777);
            chmodat(CWD, &path, mode, AtFlags::empty()).map_err(step("setting the mode"))?;
        }
        if header.kind == EntryType::Directory {
            self.directories.insert(path, header.mtime);
        } else {
            set_times(&path, header.mtime).map_err(step("setting times"))?;
        }
        Ok(())
    }

    /// Deletes what lower layers have in a directory, keeping what this layer made.
    fn clear(&self, directory: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            if !self.made.contains(&path) {
                remove(&path)?;
            } else if fs::symlink_metadata(&path)?.is_dir() {
                self.clear(&path)?;
            }
        }
        Ok(())
    }
}

fn failed(header: &Header, path: &Path, step: &'static str, source: io::Error) -> UnpackError {
    UnpackError::Entry {
        path: path.to_owned(),
        offset: header.offset,
        step,
        source,
    }
}

/// The archive's path below `/`, with `.` and `..` resolved as text.
fn inside(raw: &[u8]) -> PathBuf {
    let mut path = PathBuf::from("/");
    for part in Path::new(OsStr::from_bytes(raw)).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn set_times(path: &Path, mtime: Mtime) -> Result<(), Errno> {
    // An ordinary unpack clamps what lies before 1970.
    let time = if mtime.seconds < 0 {
        Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }
    } else {
        Timespec {
            tv_sec: mtime.seconds,
            tv_nsec: i64::from(mtime.nanos),
        }
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}
