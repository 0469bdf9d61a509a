//! Attributes of directories that a layer implies without describing them: those that the layers
//! below give the path, as a serial unpack leaves them.
//!
//! The rule is that of containerd's Apply: the first layer below, nearest first, in which the path
//! exists decides; its symbolic links are followed within that layer; where it is no directory,
//! or lies below something that is none, the defaults stand (0755, root). Opaque directories in
//! between do not end the search. `trusted.*` attributes are not taken. A directory made in a setgid
//! one gets its group and the bit, as mkdir does it.

use std::{
    collections::BTreeMap,
    ffi::CString,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use formats::{
    digest::Digest,
    tree::{Attrs, LayerTree, Mtime, Xattrs},
};
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::record::ImpliedDirectory;

const SETGID: u16 = 0o2000;

/// File stem of the metadata image of a layer whose implied directories keep the defaults.
pub const BASE_VARIANT: &str = "base";

/// What one layer says about a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A directory with these attributes.
    Directory(Attrs),
    /// Something else, or the path leads through something else.
    Other,
    /// Nothing.
    Absent,
}

/// A layer that can be asked for attributes. Answering may read local files, never anything
/// remote, and never our own mounts.
pub trait Lookup {
    /// What is at `path` (cleaned, relative).
    fn look_up(&mut self, path: &[u8]) -> io::Result<Found>;
}

/// Finds the attributes of `implied` in the layers below, nearest first. The result holds only
/// what differs from the defaults.
pub fn inherit(
    implied: &[ImpliedDirectory],
    below: &mut [Box<dyn Lookup + Send>],
) -> io::Result<BTreeMap<Vec<u8>, Attrs>> {
    let mut inherited: BTreeMap<Vec<u8>, Attrs> = BTreeMap::new();
    for directory in implied {
        let path = &directory.path;
        let attrs = match find(path, below)? {
            Some(attrs) => attrs,
            None => made_in(
                directory
                    .group
                    .or_else(|| setgid(parent_of(path), &inherited)),
            ),
        };
        if attrs != Attrs::implied_directory() {
            inherited.insert(path.clone(), attrs);
        }
    }
    Ok(inherited)
}

fn find(path: &[u8], below: &mut [Box<dyn Lookup + Send>]) -> io::Result<Option<Attrs>> {
    for layer in below {
        match layer.look_up(path)? {
            Found::Absent => {}
            Found::Other => return Ok(None),
            Found::Directory(mut attrs) => {
                attrs
                    .xattrs
                    .retain(|name, _| !name.starts_with(b"trusted."));
                return Ok(Some(attrs));
            }
        }
    }
    Ok(None)
}

/// What mkdir makes in a directory of that setgid group, or in another one.
fn made_in(group: Option<u32>) -> Attrs {
    let mut attrs = Attrs::implied_directory();
    if let Some(group) = group {
        attrs.mode |= SETGID;
        attrs.gid = group;
    }
    attrs
}

fn setgid(parent: &[u8], inherited: &BTreeMap<Vec<u8>, Attrs>) -> Option<u32> {
    let attrs = inherited.get(parent)?;
    (attrs.mode & SETGID != 0).then_some(attrs.gid)
}

/// The directories of `tree` that no entry describes, the root aside, parents first.
pub fn implied_directories(tree: &LayerTree) -> Vec<ImpliedDirectory> {
    tree.implied_directories()
        .into_iter()
        .filter(|path| !path.is_empty())
        .map(|path| {
            let parent = tree.lookup(parent_of(&path));
            let described = parent.filter(|id| tree.directory(*id).is_some_and(|d| !d.implied));
            let group = described.and_then(|id| {
                let attrs = &tree.inode(id).attrs;
                (attrs.mode & SETGID != 0).then_some(attrs.gid)
            });
            ImpliedDirectory { path, group }
        })
        .collect()
}

fn parent_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    &path[..end]
}

/// Names the variant of a metadata image that has these inherited attributes.
pub fn variant_name(inherited: &BTreeMap<Vec<u8>, Attrs>) -> String {
    if inherited.is_empty() {
        return BASE_VARIANT.to_owned();
    }
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for (path, attrs) in inherited {
        field(path);
        field(&attrs.mode.to_le_bytes());
        field(&attrs.uid.to_le_bytes());
        field(&attrs.gid.to_le_bytes());
        field(&attrs.mtime.seconds.to_le_bytes());
        field(&attrs.mtime.nanos.to_le_bytes());
        field(&(attrs.xattrs.len() as u64).to_le_bytes());
        for (name, value) in &attrs.xattrs {
            field(name);
            field(value);
        }
    }
    Digest::finish(hash).hex()[..16].to_owned()
}

/// An ordinarily unpacked layer.
#[derive(Debug)]
pub struct Unpacked {
    dir: PathBuf,
}

impl Unpacked {
    /// The layer whose root directory is `dir`.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn open(&self, path: &[u8]) -> io::Result<Option<rustix::fd::OwnedFd>> {
        let root = rustix::fs::open(
            &self.dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        let opened = rustix::fs::openat2(
            &root,
            path.as_c_str(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV,
        );
        match opened {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Lookup for Unpacked {
    fn look_up(&mut self, path: &[u8]) -> io::Result<Found> {
        let file = match self.open(path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(Found::Absent),
            // Through a file or a whiteout, round in circles, onto another file system.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOTDIR | Errno::LOOP | Errno::XDEV)
                ) =>
            {
                return Ok(Found::Other);
            }
            Err(error) => return Err(error),
        };
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(Found::Other);
        }
        // An O_PATH descriptor has no xattr calls of its own; its /proc name leads to the same
        // inode.
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(Found::Directory(Attrs {
            // Twelve bits remain.
            mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or_default(),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Mtime {
                seconds: stat.st_mtime,
                nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
            },
            xattrs: xattrs(Path::new(&name))?,
        }))
    }
}

fn xattrs(path: &Path) -> io::Result<Xattrs> {
    let names = match grow(|buffer| rustix::fs::listxattr(path, buffer)) {
        Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
        names => names?,
    };
    let mut xattrs = Xattrs::new();
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let name_c = CString::new(name).map_err(|_| Errno::INVAL)?;
        match grow(|buffer| rustix::fs::getxattr(path, name_c.as_c_str(), buffer)) {
            Ok(value) => {
                xattrs.insert(name.to_vec(), value);
            }
            Err(Errno::NODATA | Errno::NOTSUP | Errno::ACCESS | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(xattrs)
}

/// Calls `read` with a buffer that is large enough.
fn grow(
    mut read: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    loop {
        match read(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            // 64 KiB is the kernel's own limit for lists and values.
            Err(Errno::RANGE) if buffer.len() < 65_536 => buffer.resize(65_536, 0),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[derive(Clone)]
    struct Fixed(BTreeMap<Vec<u8>, Found>);

    impl Lookup for Fixed {
        fn look_up(&mut self, path: &[u8]) -> io::Result<Found> {
            Ok(self.0.get(path).cloned().unwrap_or(Found::Absent))
        }
    }

    fn attrs(mode: u16) -> Attrs {
        Attrs {
            mode,
            ..Attrs::default()
        }
    }

    fn layer(entries: &[(&[u8], Found)]) -> Box<dyn Lookup + Send> {
        Box::new(Fixed(
            entries
                .iter()
                .map(|(path, found)| (path.to_vec(), found.clone()))
                .collect(),
        ))
    }

    #[test]
    fn the_nearest_layer_that_knows_the_path_decides() {
        let implied = ["a", "a/under", "b", "c", "d"].map(|path| ImpliedDirectory {
            path: path.as_bytes().to_vec(),
            group: (path == "b").then_some(8),
        });
        let mut with_xattr = attrs(0o2700);
        with_xattr.gid = 9;
        with_xattr
            .xattrs
            .insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        with_xattr.xattrs.insert(b"user.k".to_vec(), b"v".to_vec());
        let mut below = [
            layer(&[(b"b", Found::Other), (b"a", Found::Directory(with_xattr))]),
            layer(&[
                (b"a", Found::Directory(attrs(0o711))),
                (b"b", Found::Directory(attrs(0o711))),
                (b"c", Found::Directory(attrs(0o711))),
                (b"d", Found::Directory(Attrs::implied_directory())),
            ]),
        ];
        let inherited = inherit(&implied, &mut below).unwrap();
        assert_eq!(inherited.len(), 4);
        assert_eq!(inherited[b"a".as_slice()].mode, 0o2700);
        // Nothing below has these two: they are made, in setgid directories.
        let made = |path: &[u8]| (inherited[path].mode, inherited[path].gid);
        assert_eq!(made(b"a/under"), (0o2755, 9));
        assert_eq!(made(b"b"), (0o2755, 8));
        assert_eq!(inherited[b"a".as_slice()].xattrs.len(), 1);
        assert_eq!(inherited[b"c".as_slice()].mode, 0o711);
        assert_ne!(variant_name(&inherited), BASE_VARIANT);
        assert_eq!(variant_name(&BTreeMap::new()), BASE_VARIANT);
    }

    #[test]
    fn an_unpacked_layer_is_read_within_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("usr/lib/x")).unwrap();
        std::fs::set_permissions(root.join("usr/lib"), PermissionsExt::from_mode(0o2750)).unwrap();
        symlink("/usr/lib", root.join("lib")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        std::fs::write(root.join("file"), b"").unwrap();
        let mut layer = Unpacked::new(root.to_owned());
        let mut mode = |path: &str| match layer.look_up(path.as_bytes()).unwrap() {
            Found::Directory(attrs) => Ok(attrs.mode),
            other => Err(other),
        };
        assert_eq!(mode("usr/lib"), Ok(0o2750));
        // Absolute targets stay inside the layer.
        assert_eq!(mode("lib"), Ok(0o2750));
        assert_eq!(mode("nothing/here"), Err(Found::Absent));
        assert_eq!(mode("file"), Err(Found::Other));
        assert_eq!(mode("file/below"), Err(Found::Other));
        assert_eq!(mode("loop"), Err(Found::Other));
    }
}
