//! Files of one sample layer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Metadata},
    io::Write,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use formats::digest::Digest;

#[derive(Debug)]
enum Source {
    Host(PathBuf),
    Directory(u32),
    Symlink(PathBuf),
    Text(String),
}

/// The files of one layer by path in the image (relative).
#[derive(Debug, Default)]
pub struct LayerFiles {
    entries: BTreeMap<PathBuf, Source>,
    payload_bytes: u64,
}

impl LayerFiles {
    /// An empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries, implied parent directories not counted.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of regular files.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Adds an absolute path of the host as it is (file, link or directory) with its parents.
    pub fn add_host(&mut self, path: &Path, seen: &mut BTreeSet<PathBuf>) -> Result<()> {
        if !seen.insert(path.to_owned()) {
            return Ok(());
        }
        let meta = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
        let inside = path.strip_prefix("/").unwrap_or(path).to_owned();
        for parent in path
            .ancestors()
            .skip(1)
            .filter(|parent| parent.parent().is_some())
        {
            if seen.insert(parent.to_owned()) {
                let inside = parent.strip_prefix("/").unwrap_or(parent).to_owned();
                self.entries
                    .entry(inside)
                    .or_insert_with(|| Source::Host(parent.to_owned()));
            }
        }
        if meta.is_file() {
            self.payload_bytes += meta.len();
        }
        self.entries.insert(inside, Source::Host(path.to_owned()));
        Ok(())
    }

    /// Adds everything below a directory of the host that `keep` accepts.
    pub fn add_tree(
        &mut self,
        root: &Path,
        seen: &mut BTreeSet<PathBuf>,
        keep: &mut dyn FnMut(&Path) -> bool,
    ) -> Result<()> {
        let mut paths = Vec::new();
        files_below(root, &mut |path, _| {
            if keep(path) {
                paths.push(path.to_owned());
            }
        })?;
        for path in paths {
            self.add_host(&path, seen)?;
        }
        Ok(())
    }

    /// Adds a directory.
    pub fn add_directory(&mut self, path: &Path, mode: u32) {
        self.entries
            .insert(path.to_owned(), Source::Directory(mode));
    }

    /// Adds a symbolic link.
    pub fn add_symlink(&mut self, path: &Path, target: &Path) {
        self.entries
            .insert(path.to_owned(), Source::Symlink(target.to_owned()));
    }

    /// Adds a small text file.
    pub fn add_text(&mut self, path: &Path, text: &str) {
        self.payload_bytes += text.len() as u64;
        self.entries
            .insert(path.to_owned(), Source::Text(text.to_owned()));
    }

    /// Writes the layer as an uncompressed tar, sorted by path.
    pub fn write_tar(&self, out: impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(out);
        tar.follow_symlinks(false);
        for (path, source) in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1_700_000_000);
            match source {
                Source::Host(host) => {
                    let meta =
                        fs::symlink_metadata(host).with_context(|| host.display().to_string())?;
                    header.set_mode(meta.mode() & 0o7777);
                    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
                    if meta.is_dir() {
                        header.set_entry_type(tar::EntryType::Directory);
                        header.set_size(0);
                        tar.append_data(&mut header, path, std::io::empty())?;
                    } else if meta.is_symlink() {
                        header.set_entry_type(tar::EntryType::Symlink);
                        header.set_size(0);
                        tar.append_link(&mut header, path, fs::read_link(host)?)?;
                    } else {
                        header.set_size(meta.len());
                        let file = File::open(host).with_context(|| host.display().to_string())?;
                        tar.append_data(&mut header, path, file)?;
                    }
                }
                Source::Directory(mode) => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_size(0);
                    tar.append_data(&mut header, path, std::io::empty())?;
                }
                Source::Symlink(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_size(0);
                    tar.append_link(&mut header, path, target)?;
                }
                Source::Text(text) => {
                    header.set_mode(0o644);
                    header.set_size(text.len() as u64);
                    tar.append_data(&mut header, path, text.as_bytes())?;
                }
            }
        }
        tar.into_inner()?.flush()?;
        Ok(())
    }
}

/// Calls `visit` for every file and link below `root` on the same file system, sorted.
pub(super) fn files_below(root: &Path, visit: &mut dyn FnMut(&Path, &Metadata)) -> Result<()> {
    let device = fs::metadata(root)
        .with_context(|| root.display().to_string())?
        .dev();
    let mut queue = vec![root.to_owned()];
    while let Some(folder) = queue.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        let mut paths: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        paths.sort();
        for path in paths {
            let Ok(meta) = fs::symlink_metadata(&path) else {
                continue;
            };
            if meta.is_dir() {
                if meta.dev() == device {
                    queue.push(path);
                }
            } else if meta.is_file() || meta.is_symlink() {
                visit(&path, &meta);
            }
        }
    }
    Ok(())
}

/// A key that orders paths as if shuffled, the same on every run.
pub(super) fn shuffle_key(path: &Path) -> Digest {
    Digest::of(path.as_os_str().as_encoded_bytes())
}
