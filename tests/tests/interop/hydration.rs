//! Every layer ends in proven, and the registry sends nothing twice.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Duration};

use formats::stargz::WriterOptions;
use lab::LinkModel;
use suite::{
    images::{noise, oddities},
    listing::list,
    pushed::{self, PushedImage, PushedLayer},
    tarball::Tarball,
};

use crate::{
    fixture::{CONFIG, Fixture, runtime},
    world::{all_proven, ready, sizes, within_egress_bound},
};

#[test]
fn the_oddities_end_in_proven() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let layers: Vec<_> = oddities()
        .iter()
        .map(|tar| PushedLayer::estargz(tar))
        .collect();
    let image = PushedImage::push(&fixture.lab, "odd/image", "1", &layers);
    let before = fixture.lab.log().mark();
    runtime().block_on(async {
        let host = fixture.host("default").await;
        fixture.pull_lazily(&host, &image).await;
        all_proven(&fixture);
        within_egress_bound(&fixture.lab.log().totals_since(&before), &sizes(&image));
    });
}

/// The sample image, each layer as eStargz of ours.
fn sample(fixture: &Fixture) -> Option<PushedImage> {
    if !Path::new("/usr/bin/python3").exists() {
        suite::skip("no python3, of which the sample image is made");
        return None;
    }
    let options = WriterOptions {
        level: 1,
        prioritized: vec![b"usr/bin/python3".to_vec(), b"app/ready.py".to_vec()],
        ..WriterOptions::default()
    };
    let layers = pushed::sample(&fixture.work.sub("sample"));
    let layers = PushedLayer::all_estargz(&layers, &options);
    Some(PushedImage::push(
        &fixture.lab,
        "sample/image",
        "1",
        &layers,
    ))
}

#[test]
fn a_sample_read_at_random_ends_in_proven() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let Some(image) = sample(&fixture) else {
        return;
    };
    // Slow enough that reads, start lists and hydration meet.
    let link = LinkModel::new(100_000_000, Duration::from_millis(20));
    fixture.lab.set_link(Some(link));
    let before = fixture.lab.log().mark();
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        read_at_random(container.path());
        all_proven(&fixture);
        within_egress_bound(&fixture.lab.log().totals_since(&before), &sizes(&image));
        // Files are packed without entries for their directories, whose times are then free.
        let mut directories = list(container.path()).expect("the tree");
        directories.retain(|_, row| row.digest.is_none() && row.target.is_none());
        let directories: Vec<_> = directories
            .keys()
            .filter_map(|path| path.to_str())
            .collect();
        fixture.same_tree(&image, container.path(), &directories);
    });
}

/// Reads pages of files here and there, four readers at a time.
fn read_at_random(root: &Path) {
    let mut files = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let entry = entry.expect("an entry");
            let kind = entry.file_type().expect("a type");
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let files = &files;
            scope.spawn(move || {
                let choices = noise(40 + reader, 60 * 16);
                for choice in choices.chunks_exact(16) {
                    let number = |at: usize| {
                        let bytes = choice[at..at + 8].try_into().expect("8 bytes");
                        usize::try_from(u64::from_le_bytes(bytes) >> 8).expect("64 bits")
                    };
                    let path = &files[number(0) % files.len()];
                    let file = File::open(path).expect("a file");
                    let length = file.metadata().expect("its size").len();
                    let mut page = [0; 4096];
                    file.read_at(&mut page, number(8) as u64 % length.max(1))
                        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                }
            });
        }
    });
}

#[test]
fn chunks_read_out_of_order_are_not_fetched_again() {
    if !ready() {
        return;
    }
    let fixture = Fixture::new(CONFIG);
    let mut tar = Tarball::new();
    for index in 0..24 {
        tar.file(&format!("f{index:02}"), &noise(100 + index, 700_000));
    }
    let options = WriterOptions {
        chunk_size: 256 << 10,
        prioritized: vec![b"f20".to_vec(), b"f03".to_vec()],
        ..WriterOptions::default()
    };
    let layer = PushedLayer::estargz_with(&tar.finish(), &options);
    let image = PushedImage::push(&fixture.lab, "order/image", "1", &[layer]);
    let link = LinkModel::new(50_000_000, Duration::from_millis(20));
    fixture.lab.set_link(Some(link));
    let before = fixture.lab.log().mark();
    runtime().block_on(async {
        let host = fixture.host("default").await;
        let parent = fixture.pull_lazily(&host, &image).await;
        let (_, container) = fixture.container(&host, &parent, "c").await;
        for index in [23_u64, 3, 22, 11, 20, 0] {
            let read = std::fs::read(container.path().join(format!("f{index:02}")));
            assert_eq!(read.expect("a file"), noise(100 + index, 700_000));
        }
        all_proven(&fixture);
        let digest = image.layers[0].digest().to_string();
        eprintln!("traffic: {}", fixture.layer(&digest)["cache"]["traffic"]);
        within_egress_bound(&fixture.lab.log().totals_since(&before), &sizes(&image));
        fixture.same_tree(&image, container.path(), &[]);
    });
}
