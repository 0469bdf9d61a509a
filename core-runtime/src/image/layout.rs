//! One image in an OCI image layout.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use formats::{
    digest::Digest,
    oci::{ANNOTATION_REF_NAME, Descriptor, Index, OciLayout, blob_path},
};
use sha2::{Digest as _, Sha256};
use storage::ranges::{FileSource, RangeSource};

use super::{ImageError, Progress};

/// Configs and manifests are smaller; layers are never read into memory.
const MAX_BYTES: u64 = 16 << 20;

/// A layout directory and a tag in it.
#[derive(Debug)]
pub struct LayoutStore {
    dir: PathBuf,
    tag: Option<String>,
}

impl LayoutStore {
    /// Nothing is read yet.
    pub fn new(dir: &Path, tag: Option<&str>) -> Self {
        Self {
            dir: dir.to_owned(),
            tag: tag.map(str::to_owned),
        }
    }

    pub(super) fn place(&self) -> String {
        match &self.tag {
            Some(tag) => format!("oci:{}:{tag}", self.dir.display()),
            None => format!("oci:{}", self.dir.display()),
        }
    }

    fn missing(&self, what: impl Into<String>) -> ImageError {
        ImageError::Missing {
            place: self.place(),
            what: what.into(),
        }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(blob_path(digest))
    }

    fn index(&self) -> Result<Index, ImageError> {
        let path = self.dir.join("index.json");
        let bytes = fs::read(&path).map_err(file(&path))?;
        Index::parse(&bytes, None).map_err(|source| ImageError::Document {
            place: self.place(),
            what: "index.json".into(),
            source,
        })
    }

    pub(super) fn root(&self) -> Result<(Descriptor, Vec<u8>), ImageError> {
        let index = self.index()?;
        let tags = || {
            let names = index
                .manifests
                .iter()
                .filter_map(|entry| entry.annotations.get(ANNOTATION_REF_NAME));
            names.map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        let descriptor = match &self.tag {
            Some(tag) => index
                .tagged(tag)
                .ok_or_else(|| self.missing(format!("no tag {tag:?}; there is {}", tags())))?,
            None => match index.manifests.as_slice() {
                [only] => only,
                [] => return Err(self.missing("the layout holds no image")),
                _ => return Err(self.missing(format!("several images; name one: {}", tags()))),
            },
        };
        Ok((descriptor.clone(), self.bytes(descriptor)?))
    }

    pub(super) fn bytes(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let path = self.path(&descriptor.digest);
        let mut bytes = Vec::new();
        let open = File::open(&path).map_err(file(&path))?;
        open.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(file(&path))?;
        let found = Digest::of(&bytes);
        if found != descriptor.digest {
            return Err(ImageError::Corrupt {
                place: self.place(),
                digest: descriptor.digest,
                detail: format!("{} has digest {found}", path.display()),
            });
        }
        Ok(bytes)
    }

    pub(super) fn file(
        &self,
        descriptor: &Descriptor,
        progress: Progress<'_>,
    ) -> Result<PathBuf, ImageError> {
        let path = self.path(&descriptor.digest);
        let mut open = File::open(&path).map_err(file(&path))?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = open.read(&mut buffer).map_err(file(&path))?;
            if length == 0 {
                break;
            }
            hasher.update(&buffer[..length]);
            progress(length as u64);
        }
        let found = Digest::finish(hasher);
        if found != descriptor.digest {
            return Err(ImageError::Corrupt {
                place: self.place(),
                digest: descriptor.digest,
                detail: format!("{} has digest {found}", path.display()),
            });
        }
        Ok(path)
    }

    pub(super) fn range_source(
        &self,
        descriptor: &Descriptor,
    ) -> Result<Arc<dyn RangeSource>, ImageError> {
        let path = self.path(&descriptor.digest);
        Ok(Arc::new(FileSource::open(&path).map_err(file(&path))?))
    }

    pub(super) fn put_file(
        &self,
        descriptor: &Descriptor,
        source: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ImageError> {
        let path = self.path(&descriptor.digest);
        if !path.exists() {
            self.replace(&path, |temporary| fs::copy(source, temporary).map(drop))?;
        }
        progress(descriptor.size);
        Ok(())
    }

    pub(super) fn put_bytes(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let path = self.path(&descriptor.digest);
        if path.exists() {
            return Ok(());
        }
        self.replace(&path, |temporary| fs::write(temporary, bytes))
    }

    pub(super) fn put_manifest(
        &self,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        self.put_bytes(descriptor, bytes)?;
        let path = self.dir.join("index.json");
        let mut index = if path.exists() {
            self.index()?
        } else {
            Index::new(Vec::new())
        };
        let tag = self.tag.clone().unwrap_or_else(|| "latest".into());
        index
            .manifests
            .retain(|entry| entry.annotations.get(ANNOTATION_REF_NAME) != Some(&tag));
        let mut descriptor = descriptor.clone();
        descriptor
            .annotations
            .insert(ANNOTATION_REF_NAME.into(), tag);
        index.manifests.push(descriptor);
        let marker = self.dir.join("oci-layout");
        self.replace(&marker, |temporary| {
            fs::write(temporary, OciLayout::default().to_json())
        })?;
        self.replace(&path, |temporary| fs::write(temporary, index.to_json()))
    }

    /// Writes beside the target, then renames: a reader sees the old or the new file.
    fn replace(
        &self,
        path: &Path,
        write: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<(), ImageError> {
        let parent = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).map_err(file(parent))?;
        let temporary = tempfile::NamedTempFile::new_in(parent).map_err(file(parent))?;
        write(temporary.path()).map_err(file(temporary.path()))?;
        temporary.as_file().flush().map_err(file(path))?;
        temporary
            .persist(path)
            .map_err(|error| file(path)(error.error))?;
        Ok(())
    }
}

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::File { path, source }
}
