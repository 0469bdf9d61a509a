//! The content behind the registry: a plain directory.
//!
//! ```text
//! blobs/sha256/<hex>                        every blob and manifest, shared by all repositories
//! repositories/<name>/_layers/<hex>         empty file: this repository holds that blob
//! repositories/<name>/_manifests/<hex>      media type of a manifest this repository holds
//! repositories/<name>/_tags/<tag>           digest a tag points at
//! repositories/<name>/_referrers/<subject>/<hex>  empty file: manifest <hex> has that subject
//! incoming/                                 files being written; renamed into place when whole
//! ```
//! Repository name components never start with `_`, so the two kinds of directories cannot meet.
//! Everything is written beside its place and renamed, so readers see all of a file or none of it
//! and any number of processes may share a directory.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
};

use formats::digest::Digest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use self::names::{NameError, Reference, RepoName, Tag};

mod names;
pub(crate) mod uploads;

/// Blobs, manifests and tags in one directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    root: Arc<Path>,
}

/// A manifest as it was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Manifest {
    /// SHA-256 of `bytes`.
    pub digest: Digest,
    /// The content type it was pushed with.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: Vec<u8>,
}

/// An open blob.
#[derive(Clone, Debug)]
pub(crate) struct BlobFile {
    pub(crate) file: Arc<File>,
    pub(crate) len: u64,
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system said no.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        source: io::Error,
    },
    /// Content does not have the digest it was announced with.
    #[error("content has digest {actual}, expected {expected}")]
    DigestMismatch {
        /// The announced digest.
        expected: Digest,
        /// The digest of what arrived.
        actual: Digest,
    },
    /// A name or reference is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
}

impl Store {
    /// Opens (and where missing creates) a store.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["blobs/sha256", "repositories", "incoming"] {
            create_dir(&root.join(dir))?;
        }
        Ok(Self { root: root.into() })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a blob's bytes are, whether or not it exists.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Stores `bytes` as a blob of `repo`.
    pub fn put_blob(&self, repo: &RepoName, bytes: &[u8]) -> Result<Digest, StoreError> {
        self.put_blob_from(repo, bytes).map(|(digest, _)| digest)
    }

    /// Stores what `reader` yields as a blob of `repo`; gives its digest and length.
    pub fn put_blob_from(
        &self,
        repo: &RepoName,
        mut reader: impl Read,
    ) -> Result<(Digest, u64), StoreError> {
        let mut incoming = self.incoming()?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(io_error("read input for", &incoming.path)(error)),
            };
            incoming.append(&buffer[..n])?;
        }
        let len = incoming.len;
        self.commit(&incoming, repo, None)
            .map(|digest| (digest, len))
    }

    /// Stores a manifest under its digest and, if `reference` is a tag, under that too.
    ///
    /// Nothing is checked but a digest given as the reference: what the manifest names need not
    /// exist, so that broken images can be made.
    pub fn put_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        if let Reference::Digest(expected) = reference
            && *expected != digest
        {
            return Err(StoreError::DigestMismatch {
                expected: *expected,
                actual: digest,
            });
        }
        self.write(&self.blob_path(&digest), bytes)?;
        self.write(&self.manifest_link(repo, &digest), media_type.as_bytes())?;
        if let Some(subject) = subject_of(bytes) {
            self.write(&self.referrers_dir(repo, &subject).join(digest.hex()), b"")?;
        }
        if let Reference::Tag(tag) = reference {
            self.write(&self.tag_path(repo, tag), digest.to_string().as_bytes())?;
        }
        Ok(digest)
    }

    /// The manifest behind a reference.
    pub fn manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Option<Manifest>, StoreError> {
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => match self.tag(repo, tag)? {
                Some(digest) => digest,
                None => return Ok(None),
            },
        };
        let Some(media_type) = read(&self.manifest_link(repo, &digest))? else {
            return Ok(None);
        };
        let Some(bytes) = read(&self.blob_path(&digest))? else {
            return Ok(None);
        };
        Ok(Some(Manifest {
            digest,
            media_type: String::from_utf8_lossy(&media_type).into_owned(),
            bytes,
        }))
    }

    /// The digest a tag points at.
    pub fn tag(&self, repo: &RepoName, tag: &Tag) -> Result<Option<Digest>, StoreError> {
        let text = read(&self.tag_path(repo, tag))?;
        Ok(text.and_then(|text| String::from_utf8_lossy(&text).trim().parse().ok()))
    }

    /// Length of a blob of `repo`, if the repository holds it.
    pub fn blob_len(&self, repo: &RepoName, digest: &Digest) -> Option<u64> {
        self.layer_link(repo, digest)
            .symlink_metadata()
            .and_then(|_| fs::metadata(self.blob_path(digest)))
            .ok()
            .map(|metadata| metadata.len())
    }

    /// Makes a stored blob part of `repo`. With `from`, that repository must hold it. False if the
    /// blob is not there.
    pub fn mount_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
        from: Option<&RepoName>,
    ) -> Result<bool, StoreError> {
        let present = match from {
            Some(from) => self.blob_len(from, digest).is_some(),
            None => self.blob_path(digest).exists(),
        };
        if present {
            self.write(&self.layer_link(repo, digest), b"")?;
        }
        Ok(present)
    }

    /// Takes a blob from `repo`; other repositories keep it. False if it was not there.
    pub fn delete_blob(&self, repo: &RepoName, digest: &Digest) -> Result<bool, StoreError> {
        remove(&self.layer_link(repo, digest))
    }

    /// Deletes a tag, or a manifest with all tags that point at it. False if it was not there.
    pub fn delete_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<bool, StoreError> {
        let digest = match reference {
            Reference::Tag(tag) => return remove(&self.tag_path(repo, tag)),
            Reference::Digest(digest) => digest,
        };
        if let Some(bytes) = read(&self.blob_path(digest))?
            && let Some(subject) = subject_of(&bytes)
        {
            remove(&self.referrers_dir(repo, &subject).join(digest.hex()))?;
        }
        for name in self.tags(repo)? {
            let tag: Tag = name.parse()?;
            if self.tag(repo, &tag)? == Some(*digest) {
                remove(&self.tag_path(repo, &tag))?;
            }
        }
        remove(&self.manifest_link(repo, digest))
    }

    /// All tags of a repository, sorted.
    pub fn tags(&self, repo: &RepoName) -> Result<Vec<String>, StoreError> {
        Ok(list(&self.repo_dir(repo).join("_tags"))?
            .into_iter()
            .filter(|name| name.parse::<Tag>().is_ok())
            .collect())
    }

    /// Whether anything was ever pushed to `repo`.
    pub fn has_repo(&self, repo: &RepoName) -> bool {
        let dir = self.repo_dir(repo);
        ["_manifests", "_layers", "_tags"]
            .iter()
            .any(|name| dir.join(name).is_dir())
    }

    /// All repositories, sorted.
    pub fn repos(&self) -> Result<Vec<String>, StoreError> {
        let mut found = Vec::new();
        let mut pending = vec![String::new()];
        while let Some(prefix) = pending.pop() {
            for name in list(&self.root.join("repositories").join(&prefix))? {
                if name.starts_with('_') {
                    continue;
                }
                let path = if prefix.is_empty() {
                    name
                } else {
                    format!("{prefix}/{name}")
                };
                if let Ok(repo) = path.parse::<RepoName>()
                    && self.has_repo(&repo)
                {
                    found.push(path.clone());
                }
                pending.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    /// Descriptors of the manifests of `repo` whose subject is `subject`.
    pub fn referrers(&self, repo: &RepoName, subject: &Digest) -> Result<Vec<Value>, StoreError> {
        let mut found = Vec::new();
        for hex in list(&self.referrers_dir(repo, subject))? {
            let Ok(digest) = format!("sha256:{hex}").parse::<Digest>() else {
                continue;
            };
            if let Some(manifest) = self.manifest(repo, &Reference::Digest(digest))? {
                found.push(descriptor_of(&manifest));
            }
        }
        Ok(found)
    }

    /// Opens a blob of `repo`.
    pub(crate) fn open_blob(
        &self,
        repo: &RepoName,
        digest: &Digest,
    ) -> Result<Option<BlobFile>, StoreError> {
        if !self.layer_link(repo, digest).exists() {
            return Ok(None);
        }
        let path = self.blob_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let len = file.metadata().map_err(io_error("stat", &path))?.len();
        Ok(Some(BlobFile {
            file: Arc::new(file),
            len,
        }))
    }

    /// A new file to collect content in.
    pub(crate) fn incoming(&self) -> Result<Incoming, StoreError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let path = self.root.join("incoming").join(format!(
            "{}-{}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        ));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(io_error("create", &path))?;
        Ok(Incoming {
            file,
            path,
            hasher: Sha256::new(),
            len: 0,
        })
    }

    /// Makes collected content a blob of `repo`, if it has the expected digest.
    pub(crate) fn commit(
        &self,
        incoming: &Incoming,
        repo: &RepoName,
        expected: Option<Digest>,
    ) -> Result<Digest, StoreError> {
        let actual = Digest::finish(incoming.hasher.clone());
        if let Some(expected) = expected
            && expected != actual
        {
            return Err(StoreError::DigestMismatch { expected, actual });
        }
        let path = self.blob_path(&actual);
        fs::rename(&incoming.path, &path).map_err(io_error("rename to", &path))?;
        self.write(&self.layer_link(repo, &actual), b"")?;
        Ok(actual)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        if let Some(parent) = path.parent() {
            create_dir(parent)?;
        }
        let mut incoming = self.incoming()?;
        incoming.write(bytes)?;
        fs::rename(&incoming.path, path).map_err(io_error("rename to", path))
    }

    fn repo_dir(&self, repo: &RepoName) -> PathBuf {
        self.root.join("repositories").join(repo.as_str())
    }

    fn layer_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_layers").join(digest.hex())
    }

    fn manifest_link(&self, repo: &RepoName, digest: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_manifests").join(digest.hex())
    }

    fn tag_path(&self, repo: &RepoName, tag: &Tag) -> PathBuf {
        self.repo_dir(repo).join("_tags").join(tag.as_str())
    }

    fn referrers_dir(&self, repo: &RepoName, subject: &Digest) -> PathBuf {
        self.repo_dir(repo).join("_referrers").join(subject.hex())
    }
}

/// Content on its way into the store; its file goes away with it unless it was committed.
#[derive(Debug)]
pub(crate) struct Incoming {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    pub(crate) len: u64,
}

impl Incoming {
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(bytes)?;
        self.hasher.update(bytes);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_all(bytes)
            .map_err(io_error("write", &self.path))?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // After a commit the file has its final name and this finds nothing.
        let _ = fs::remove_file(&self.path);
    }
}

fn subject_of(manifest: &[u8]) -> Option<Digest> {
    let value: Value = serde_json::from_slice(manifest).ok()?;
    value.get("subject")?.get("digest")?.as_str()?.parse().ok()
}

/// A referrer's descriptor as the specification wants it: an image without an artifact type has
/// its config's media type for one.
fn descriptor_of(manifest: &Manifest) -> Value {
    let value: Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
    let mut descriptor = json!({
        "mediaType": manifest.media_type,
        "digest": manifest.digest,
        "size": manifest.bytes.len(),
    });
    let kind = value.get("artifactType").or_else(|| {
        value
            .get("config")
            .and_then(|config| config.get("mediaType"))
    });
    if let Some(kind) = kind {
        descriptor["artifactType"] = kind.clone();
    }
    if let Some(annotations) = value.get("annotations") {
        descriptor["annotations"] = annotations.clone();
    }
    descriptor
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

fn create_dir(path: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(path).map_err(io_error("create directory", path))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

fn remove(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

fn list(path: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", path)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list", path))?;
        names.extend(entry.file_name().to_str().map(str::to_owned));
    }
    names.sort();
    Ok(names)
}
