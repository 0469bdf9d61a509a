//! Prints time and size of metadata images: `cargo run --release -p formats --example erofs_figures`.

use std::{collections::BTreeMap, time::Instant};

use formats::{
    erofs::{Image, write},
    limits::Limits,
    tree::{Attrs, Directory, Extent, Inode, InodeId, Kind, LayerTree, Regular},
    units::DecodedOffset,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("inodes   write ms   read ms   image bytes   bytes/inode");
    for inodes in [16_000, 100_000, 1_000_000] {
        let (tree, device_len) = tree(inodes)?;
        let (mut writing, mut reading, mut len) = (f64::MAX, f64::MAX, 0);
        for _ in 0..3 {
            let start = Instant::now();
            let image = write(&tree, device_len)?;
            writing = writing.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            let read = Image::open(&image)?.tree(&Limits::default())?;
            reading = reading.min(start.elapsed().as_secs_f64());
            assert_eq!(read.inodes().len(), tree.inodes().len());
            len = image.len();
        }
        println!(
            "{inodes:>7} {:>9.1} {:>9.1} {len:>13} {:>13.1}",
            writing * 1e3,
            reading * 1e3,
            f64::from(u32::try_from(len)?) / f64::from(inodes)
        );
    }
    Ok(())
}

/// A tree shaped like an installed language runtime: one directory for every 12 files, names of 8
/// to 24 bytes, one symlink for every 30 files, a nesting of up to 6.
fn tree(inodes: u32) -> Result<(LayerTree, u64), Box<dyn std::error::Error>> {
    let mut all = vec![directory()];
    let mut directories = vec![0_usize];
    let mut device = 0;
    for id in 1..inodes {
        let at = usize::try_from(id)?;
        let name = format!("{:x<width$}{id}", "name", width = 4 + at % 13);
        let inode = if id % 13 == 1 {
            directory()
        } else if id % 30 == 0 {
            let target = format!("../lib/{name}.so");
            inode(Kind::Symlink(target.into_bytes()), 1)
        } else {
            let size = u64::from(id % 97) * 131;
            let extent = Extent {
                file_offset: 0,
                len: size,
                decoded: DecodedOffset(device),
            };
            device += size.next_multiple_of(4096);
            let extents = if size == 0 { vec![] } else { vec![extent] };
            inode(Kind::Regular(Regular { size, extents }), 1)
        };
        let is_directory = matches!(inode.kind, Kind::Directory(_));
        let parent = if is_directory {
            directories[at % directories.len().min(4000)]
        } else {
            directories[directories.len() - 1]
        };
        if is_directory {
            directories.push(at);
            all[parent].nlink += 1;
        }
        if let Kind::Directory(directory) = &mut all[parent].kind {
            directory.entries.insert(name.into_bytes(), InodeId(id));
        }
        all.push(inode);
    }
    Ok((LayerTree::from_inodes(all)?, device))
}

fn directory() -> Inode {
    let entries = BTreeMap::new();
    let directory = Directory {
        entries,
        ..Directory::default()
    };
    inode(Kind::Directory(directory), 2)
}

fn inode(kind: Kind, nlink: u32) -> Inode {
    Inode {
        attrs: Attrs {
            mode: 0o755,
            ..Attrs::default()
        },
        kind,
        nlink,
    }
}
