//! A TOC that disagrees with its tar in one attribute or byte is refuted, and the verdict names the
//! attribute. Mutations are applied to the tar, and, the other way round, to the TOC.

use formats::{
    proof::{Attribute, Verdict},
    stargz::toc_mtime,
};
use proptest::prelude::*;

use crate::{
    generate::{Item, ItemKind, Model, models},
    proving::{judge, served},
};

/// One change to a model: what it is called, the model with it, the attribute that must be named.
struct Mutation {
    name: &'static str,
    model: Model,
    attribute: Attribute,
}

/// Every single change that makes `model` another layer, of every kind, at every place.
fn mutations(model: &Model) -> Vec<Mutation> {
    let mut all = Vec::new();
    for index in 0..model.items.len() {
        at(model, index, &mut all);
    }
    let mut add = |name, item: Item, attribute| {
        let mut model = model.clone();
        model.items.push(item);
        all.push(Mutation {
            name,
            model,
            attribute,
        });
    };
    add(
        "a new file",
        Item::new("new", ItemKind::File(b"new".to_vec())),
        Attribute::Presence,
    );
    add(
        "a new whiteout",
        Item::new(".wh.new", ItemKind::File(Vec::new())),
        Attribute::Presence,
    );
    add(
        "a new implied directory",
        Item::new("new/.wh.x", ItemKind::File(Vec::new())),
        Attribute::Presence,
    );
    for directory in directories(model) {
        let marker = format!("{directory}.wh..wh..opq");
        if !model.items.iter().any(|item| item.path == marker) {
            add(
                "an opaque marker",
                Item::new(&marker, ItemKind::File(Vec::new())),
                Attribute::Opaque,
            );
        }
        if directory.contains("implied")
            && directory
                .rsplit('/')
                .nth(1)
                .is_some_and(|name| name.starts_with("implied"))
        {
            add(
                "an entry for an implied directory",
                Item::new(directory.trim_end_matches('/'), ItemKind::Dir),
                Attribute::Implied,
            );
        }
    }
    all
}

/// All directories that exist ("" is the root), each with a slash at its end.
fn directories(model: &Model) -> Vec<String> {
    let mut found = vec![String::new()];
    for item in model.items.iter().filter(|item| !is_landmark(item)) {
        let own = (item.kind == ItemKind::Dir).then(|| format!("{}/", item.path));
        let parents = item
            .path
            .match_indices('/')
            .map(|(at, _)| item.path[..=at].to_owned());
        found.extend(parents.chain(own));
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn is_landmark(item: &Item) -> bool {
    item.path == ".prefetch.landmark"
}

fn at(model: &Model, index: usize, all: &mut Vec<Mutation>) {
    let item = &model.items[index];
    let (_, name) = item.path.rsplit_once('/').unwrap_or(("", &item.path));
    let mut change = |name, attribute, change: &dyn Fn(&mut Item)| {
        let mut model = model.clone();
        change(&mut model.items[index]);
        assert_ne!(model.items[index], *item, "{name}");
        all.push(Mutation {
            name,
            model,
            attribute,
        });
    };
    if is_landmark(item) {
        change("a landmark's byte", Attribute::Presence, &|item| {
            item.kind = ItemKind::File(vec![0x0e]);
        });
        return;
    }
    let linked = model
        .items
        .iter()
        .any(|other| other.kind == ItemKind::Link(item.path.clone()));
    let has_children = model
        .items
        .iter()
        .any(|other| other.path.starts_with(&format!("{}/", item.path)));
    if name == ".wh..wh..opq" {
        let mut without = model.clone();
        without.items.remove(index);
        // An otherwise empty implied directory vanishes with its marker.
        let gone = directories(model) != directories(&without);
        all.push(Mutation {
            name: "no opaque marker",
            model: without,
            attribute: if gone {
                Attribute::Presence
            } else {
                Attribute::Opaque
            },
        });
        return;
    }
    if name.starts_with(".wh.") {
        change("a real file for a whiteout", Attribute::Type, &|item| {
            item.path = item.path.replace(".wh.", "");
        });
        let mut without = model.clone();
        without.items.remove(index);
        all.push(Mutation {
            name: "no whiteout",
            model: without,
            attribute: Attribute::Presence,
        });
        return;
    }

    let is_file = matches!(item.kind, ItemKind::File(_));
    // A later hard link has the last word on these.
    let target = match &item.kind {
        ItemKind::Link(target) => target.clone(),
        _ => item.path.clone(),
    };
    let last_word = !model.items[index + 1..]
        .iter()
        .any(|other| other.kind == ItemKind::Link(target.clone()));
    if last_word {
        if !matches!(item.kind, ItemKind::Symlink(_)) {
            for bit in [0o1, 0o200, 0o1000, 0o4000] {
                change("mode", Attribute::Mode, &|item| item.mode ^= bit);
            }
        }
        change("uid", Attribute::Uid, &|item| item.uid += 1);
        change("gid", Attribute::Gid, &|item| item.gid ^= 1);
        let next = (toc_mtime(item.mtime).seconds.max(0)) + 1;
        change("mtime", Attribute::Mtime, &|item| {
            item.mtime.seconds = next;
            item.mtime.nanos = 0;
        });
        change("a new xattr", Attribute::Xattrs, &|item| {
            item.xattrs.push(("user.zzzz".into(), vec![1]));
        });
        if !item.xattrs.is_empty() {
            change("an xattr's value", Attribute::Xattrs, &|item| {
                item.xattrs[0].1.push(b'!');
            });
            let inherited = model.items[..index].iter().any(|other| {
                let same = other.path == target || other.kind == ItemKind::Link(target.clone());
                let key = &item.xattrs[0].0;
                same && other.xattrs.iter().any(|(known, _)| known == key)
            });
            if !inherited {
                change("no xattr", Attribute::Xattrs, &|item| {
                    item.xattrs.remove(0);
                });
            }
        }
    }
    match &item.kind {
        ItemKind::File(bytes) => {
            let chunks = (0..bytes.len()).step_by(model.chunk_size);
            for position in chunks.clone().take(1).chain(chunks.skip(1).last()) {
                change("a byte", Attribute::Content, &|item| {
                    if let ItemKind::File(bytes) = &mut item.kind {
                        bytes[position] ^= 0x40;
                    }
                });
            }
            change("one byte more", Attribute::Size, &|item| {
                if let ItemKind::File(bytes) = &mut item.kind {
                    bytes.push(0);
                }
            });
            if !bytes.is_empty() {
                change("one byte less", Attribute::Size, &|item| {
                    if let ItemKind::File(bytes) = &mut item.kind {
                        bytes.pop();
                    }
                });
            }
        }
        ItemKind::Symlink(_) => {
            change("a symlink's target", Attribute::LinkTarget, &|item| {
                if let ItemKind::Symlink(target) = &mut item.kind {
                    target.push('x');
                }
            });
        }
        ItemKind::Link(target) => {
            let source = model.items.iter().find(|other| other.path == *target);
            let bytes = source.expect("a target").kind.clone();
            change("a copy for a hard link", Attribute::HardLinks, &|item| {
                item.kind = bytes.clone();
            });
        }
        ItemKind::Char(major, minor) => {
            let (major, minor) = (*major, *minor);
            change("a device's major", Attribute::Device, &|item| {
                item.kind = ItemKind::Char(major + 1, minor);
            });
            change("a device's minor", Attribute::Device, &|item| {
                item.kind = ItemKind::Char(major, minor + 1);
            });
            change("a block for a character device", Attribute::Type, &|item| {
                item.kind = ItemKind::Block(major, minor);
            });
        }
        ItemKind::Block(major, minor) => {
            let (major, minor) = (*major, *minor);
            change("a device's minor", Attribute::Device, &|item| {
                item.kind = ItemKind::Block(major, minor + 1);
            });
        }
        ItemKind::Fifo => {
            change("a file for a pipe", Attribute::Type, &|item| {
                item.kind = ItemKind::File(Vec::new());
            });
        }
        ItemKind::Dir => {
            if has_children {
                let mut without = model.clone();
                without.items.remove(index);
                all.push(Mutation {
                    name: "no entry for a directory",
                    model: without,
                    attribute: Attribute::Implied,
                });
                return;
            }
            change("a pipe for a directory", Attribute::Type, &|item| {
                item.kind = ItemKind::Fifo;
            });
        }
    }
    if linked || has_children {
        return;
    }
    if is_file {
        change("a pipe for a file", Attribute::Type, &|item| {
            item.kind = ItemKind::Fifo;
        });
    }
    change("another name", Attribute::Presence, &|item| {
        item.path.push('x');
    });
    let mut without = model.clone();
    without.items.remove(index);
    all.push(Mutation {
        name: "an entry less",
        model: without,
        attribute: Attribute::Presence,
    });
}

fn assert_refuted(verdict: &Verdict, mutation: &Mutation, side: &str) {
    let Verdict::Refuted(mismatches) = verdict else {
        panic!("{} in the {side}: {verdict:?}", mutation.name);
    };
    assert!(
        mismatches
            .iter()
            .any(|mismatch| mismatch.attribute == mutation.attribute),
        "{} in the {side}: {mismatches:?}",
        mutation.name
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_mutation_is_refuted(model in models()) {
        let built = model.build_stored();
        let layer = served(&built);
        prop_assert_eq!(judge(&layer, &built.tar_with(&built.toc), 4096), Verdict::Proven);
        for mutation in mutations(&model) {
            let mutated = mutation.model.build_stored();
            let verdict = judge(&layer, &mutated.tar_with(&built.toc), 4096);
            assert_refuted(&verdict, &mutation, "tar");
            let forged = served(&mutated);
            let verdict = judge(&forged, &built.tar_with(&mutated.toc), 4096);
            assert_refuted(&verdict, &mutation, "TOC");
        }
    }
}

/// The generator does produce every kind of mutation.
#[test]
fn all_kinds_of_mutations_occur() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};

    let mut runner = TestRunner::deterministic();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let model = models().new_tree(&mut runner).expect("a model").current();
        seen.extend(mutations(&model).iter().map(|mutation| mutation.name));
    }
    assert_eq!(seen.len(), 30, "{seen:?}");
}
