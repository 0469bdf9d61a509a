//! Metadata images: one per layer and set of attributes that its implied directories inherit.

use std::{fs, io, path::PathBuf, sync::Arc};

use formats::{
    erofs,
    limits::Limits,
    tree::{Attrs, Kind, LayerTree, Mtime},
};
use serde::{Deserialize, Serialize};
use storage::ranges::report;

use super::{
    blobs::Opener,
    dir::{LayerDir, write_whole},
    implied::{BASE_VARIANT, Found, Lookup, inherit, variant_name},
    record::{LayerNumber, LayerRecord, LazySnapshot},
};

/// The attributes of one inherited directory, as stored beside a variant.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    path: Vec<u8>,
    mode: u16,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanos: u32,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl From<(&Vec<u8>, &Attrs)> for Stored {
    fn from((path, attrs): (&Vec<u8>, &Attrs)) -> Self {
        Self {
            path: path.clone(),
            mode: attrs.mode,
            uid: attrs.uid,
            gid: attrs.gid,
            seconds: attrs.mtime.seconds,
            nanos: attrs.mtime.nanos,
            xattrs: attrs.xattrs.clone().into_iter().collect(),
        }
    }
}

impl From<Stored> for (Vec<u8>, Attrs) {
    fn from(stored: Stored) -> Self {
        let attrs = Attrs {
            mode: stored.mode,
            uid: stored.uid,
            gid: stored.gid,
            mtime: Mtime {
                seconds: stored.seconds,
                nanos: stored.nanos,
            },
            xattrs: stored.xattrs.into_iter().collect(),
        };
        (stored.path, attrs)
    }
}

/// Chooses the variant of a layer on top of `below` (nearest first) and makes sure its image is
/// there. Blocks.
pub fn choose(
    opener: &Opener,
    record: &LayerRecord,
    below: &mut [Box<dyn Lookup + Send>],
) -> Result<String, String> {
    let inherited = inherit(&record.implied, below)
        .map_err(|error| format!("attributes of the layers below: {error}"))?;
    let variant = variant_name(&inherited);
    let dir = opener.dir(record.number);
    if record.empty || dir.metadata(&variant).exists() {
        return Ok(variant);
    }
    if variant != BASE_VARIANT {
        let stored: Vec<Stored> = inherited.iter().map(Stored::from).collect();
        let text = serde_json::to_vec(&stored).map_err(|error| error.to_string())?;
        write_whole(&dir.inherited(&variant), &text).map_err(|error| error.to_string())?;
    }
    make(opener, record, &variant)?;
    Ok(variant)
}

/// Makes the image of a variant that was chosen before, if it is not there. Blocks.
pub fn restore(opener: &Opener, record: &LayerRecord, variant: &str) -> Result<PathBuf, String> {
    let path = opener.dir(record.number).metadata(variant);
    if !path.exists() {
        make(opener, record, variant)?;
    }
    Ok(path)
}

/// Writes the image that all layers without inherited attributes share. Blocks.
pub fn write_base(
    dir: &LayerDir,
    tree: &LayerTree,
    device_len: u64,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let image = erofs::write(&tree.as_unpacked(), device_len)?;
    write_whole(&dir.metadata(BASE_VARIANT), &image)?;
    Ok(())
}

fn make(opener: &Opener, record: &LayerRecord, variant: &str) -> Result<(), String> {
    let dir = opener.dir(record.number);
    let mut tree = opener.load(record).map_err(|error| report(&error))?.tree;
    if variant != BASE_VARIANT {
        let path = dir.inherited(variant);
        let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let stored: Vec<Stored> = serde_json::from_slice(&text)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        for (path, attrs) in stored.into_iter().map(<(Vec<u8>, Attrs)>::from) {
            tree.set_implied_attrs(&path, attrs);
        }
    }
    let image =
        erofs::write(&tree.as_unpacked(), record.device_len).map_err(|error| report(&error))?;
    write_whole(&dir.metadata(variant), &image).map_err(|error| error.to_string())
}

/// A lazy layer that can be asked for attributes: reads its metadata image when first asked.
#[derive(Debug)]
pub struct LazyLookup {
    opener: Opener,
    layer: LayerNumber,
    variant: String,
    tree: Option<LayerTree>,
}

impl LazyLookup {
    /// The layer of `snapshot`, as it is presented.
    pub fn new(opener: Opener, snapshot: &LazySnapshot) -> Self {
        Self {
            opener,
            layer: snapshot.layer,
            variant: snapshot.variant.clone(),
            tree: None,
        }
    }

    fn load(&self) -> io::Result<LayerTree> {
        let record: Arc<LayerRecord> = self
            .opener
            .table
            .layer(self.layer)
            .ok_or_else(|| io::Error::other(format!("layer {} is not known", self.layer)))?;
        if record.empty {
            return Ok(LayerTree::empty());
        }
        let path = restore(&self.opener, &record, &self.variant).map_err(io::Error::other)?;
        let bytes = fs::read(path)?;
        erofs::Image::open(&bytes)
            .and_then(|image| image.tree(&Limits::default()))
            .map_err(io::Error::other)
    }
}

impl Lookup for LazyLookup {
    fn look_up(&mut self, path: &[u8]) -> io::Result<Found> {
        if self.tree.is_none() {
            self.tree = Some(self.load()?);
        }
        Ok(self
            .tree
            .as_ref()
            .map_or(Found::Absent, |tree| look_up(tree, path)))
    }
}

/// Symbolic links followed at most, as the kernel does it.
const MAX_LINKS: usize = 40;

/// What is at `path` in a tree; links are followed within the tree.
pub fn look_up(tree: &LayerTree, path: &[u8]) -> Found {
    use formats::tree::InodeId;
    let mut links = 0;
    let mut todo: Vec<Vec<u8>> = components(path);
    let mut at = vec![InodeId::ROOT];
    while let Some(name) = todo.pop() {
        if name == b".." {
            if at.len() > 1 {
                at.pop();
            }
            continue;
        }
        let here = at.last().copied().unwrap_or(InodeId::ROOT);
        let Some(directory) = tree.directory(here) else {
            return Found::Other;
        };
        let Some(child) = directory.entries.get(&name).copied() else {
            return Found::Absent;
        };
        match &tree.inode(child).kind {
            Kind::Symlink(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Found::Other;
                }
                if target.starts_with(b"/") {
                    at.truncate(1);
                }
                todo.extend(components(target));
            }
            _ => at.push(child),
        }
    }
    let inode = tree.inode(at.last().copied().unwrap_or(InodeId::ROOT));
    match &inode.kind {
        Kind::Directory(_) => Found::Directory(inode.attrs.clone()),
        _ => Found::Other,
    }
}

/// The names of a path, last one first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}
