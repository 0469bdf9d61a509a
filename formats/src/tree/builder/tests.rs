use super::*;
use crate::tree::Mtime;

fn entry<'a>(path: &'a str, kind: EntryKind<'a>) -> Entry<'a> {
    Entry {
        path: path.as_bytes(),
        attrs: Attrs {
            mode: 0o100_640,
            uid: 7,
            gid: 8,
            mtime: Mtime {
                seconds: 1000,
                nanos: 0,
            },
            xattrs: Xattrs::new(),
        },
        kind,
    }
}

fn file(path: &str) -> Entry<'_> {
    entry(path, EntryKind::Regular { size: 3 })
}

fn dir(path: &str) -> Entry<'_> {
    entry(path, EntryKind::Directory)
}

fn link<'a>(path: &'a str, target: &'a str) -> Entry<'a> {
    entry(path, EntryKind::HardLink(target.as_bytes()))
}

fn build(entries: Vec<Entry<'_>>) -> (LayerTree, Option<NotLazyReason>) {
    let mut builder = Builder::new(Limits::default());
    for entry in entries {
        builder.apply(entry).expect("applies");
    }
    let irregular = builder.irregular().cloned();
    (builder.finish(), irregular)
}

fn refused(entries: Vec<Entry<'_>>) -> NotLazyReason {
    let mut builder = Builder::new(Limits::default());
    for entry in entries {
        match builder.apply_strict(entry) {
            Ok(_) => {}
            Err(BuildError::NotLazy(reason)) => return reason,
            Err(other) => panic!("{other}"),
        }
    }
    panic!("nothing was refused");
}

fn at<'a>(tree: &'a LayerTree, path: &str) -> &'a Inode {
    tree.inode(tree.lookup(path.as_bytes()).expect(path))
}

#[test]
fn implied_parents_and_link_counts() {
    let (tree, irregular) = build(vec![
        file("./a/b/c"),
        dir("a"),
        link("/x/hard", "a/./b/c"),
        dir("a/d/"),
    ]);
    assert_eq!(irregular, None);
    assert_eq!(tree.implied_directories(), [b"a/b".to_vec(), b"x".to_vec()]);
    assert_eq!(at(&tree, "a").nlink, 4);
    assert_eq!(at(&tree, "").nlink, 4);
    assert_eq!(at(&tree, "a/b/c").nlink, 2);
    assert_eq!(tree.lookup(b"a/b/c"), tree.lookup(b"x/hard"));
    assert_eq!(at(&tree, "a/b/c").attrs.mode, 0o640);
    // Stream order: a, a/b, a/b/c, x, a/d.
    assert_eq!(tree.lookup(b"a/d"), Some(InodeId(5)));
}

#[test]
fn a_hard_link_header_overwrites_the_inode() {
    let mut later = link("b", "a");
    later.attrs.uid = 99;
    later.attrs.xattrs.insert(b"user.b".to_vec(), b"2".to_vec());
    let mut first = file("a");
    first.attrs.xattrs.insert(b"user.a".to_vec(), b"1".to_vec());
    first
        .attrs
        .xattrs
        .insert(b"security.capability".to_vec(), vec![1; 20]);
    let (tree, _) = build(vec![first, later]);
    assert_eq!(at(&tree, "a").attrs.uid, 99);
    let names: Vec<_> = at(&tree, "a").attrs.xattrs.keys().collect();
    assert_eq!(names, [b"user.a", b"user.b"]);
}

#[test]
fn whiteouts() {
    let (tree, irregular) = build(vec![
        file("d/.wh.gone"),
        file("d/.wh.real"),
        file("d/real"),
        file("d/other"),
        file("d/.wh.other"),
        file("d/.wh.dir"),
        file("d/dir/below"),
        file("e/.wh..wh..opq"),
        file("e/.wh..wh.aufs"),
        file(".wh..wh.plnk/1.2"),
        file(".wh..wh..opq"),
    ]);
    assert_eq!(irregular, None);
    assert_eq!(at(&tree, "d/gone").kind, Kind::Whiteout);
    assert!(matches!(at(&tree, "d/real").kind, Kind::Regular(_)));
    assert!(matches!(at(&tree, "d/other").kind, Kind::Regular(_)));
    assert!(matches!(&at(&tree, "d/dir").kind, Kind::Directory(d) if d.implied));
    assert!(matches!(&at(&tree, "e").kind, Kind::Directory(d) if d.opaque && d.entries.is_empty()));
    assert!(matches!(&at(&tree, "").kind, Kind::Directory(d) if d.opaque && d.entries.len() == 2));
}

#[test]
fn later_entries_replace_earlier_ones() {
    let (tree, irregular) = build(vec![
        dir("d"),
        file("d/x"),
        link("keep", "d/x"),
        dir("d/sub"),
        file("d/sub/y"),
        file("d/x"),
        file("d/sub"),
        dir("d"),
    ]);
    assert_eq!(
        irregular,
        Some(NotLazyReason::Duplicate {
            path: TreePath::new("d/x")
        })
    );
    // root, d, keep, the new d/x, the new d/sub: nothing unreachable stays.
    assert_eq!(tree.inodes().len(), 5);
    assert_eq!(at(&tree, "keep").nlink, 1);
    assert_ne!(tree.lookup(b"keep"), tree.lookup(b"d/x"));
    assert_eq!(at(&tree, "d").nlink, 2);
    assert!(matches!(at(&tree, "d/sub").kind, Kind::Regular(_)));
}

#[test]
fn attributes_as_an_unpack_leaves_them() {
    let mut root = dir("./");
    root.attrs.mode = 0;
    let mut old = file("old");
    old.attrs.mtime.seconds = -1;
    let mut far = file("far");
    far.attrs.mtime.seconds = i64::MAX;
    let (tree, _) = build(vec![
        root,
        old,
        far,
        entry("link", EntryKind::Symlink(b"t")),
    ]);
    assert_eq!(at(&tree, "").attrs.mode, 0o755);
    assert_eq!(at(&tree, "old").attrs.mtime, Mtime::default());
    assert_eq!(at(&tree, "far").attrs.mtime, Mtime::default());
    assert_eq!(at(&tree, "link").attrs.mode, 0o777);
}

#[test]
fn what_an_index_cannot_hold_is_refused() {
    use NotLazyReason as R;
    type Case<'a> = (Vec<Entry<'a>>, fn(&R) -> bool);

    let long = "n".repeat(256);
    let mut overlay = file("o");
    overlay
        .attrs
        .xattrs
        .insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    let raw = Entry {
        path: b"latin\xe9",
        ..file("")
    };
    let cases: Vec<Case<'_>> = vec![
        (vec![raw], |r| matches!(r, R::NotText { .. })),
        (vec![file("a\u{fffd}")], |r| matches!(r, R::NotText { .. })),
        (vec![entry("l", EntryKind::Symlink(b"\xff"))], |r| {
            matches!(r, R::NotText { .. })
        }),
        (vec![file("a"), file("a")], |r| {
            matches!(r, R::Duplicate { .. })
        }),
        (vec![dir("a"), file("a")], |r| {
            matches!(r, R::Duplicate { .. })
        }),
        (vec![link("a", "a")], |r| {
            matches!(r, R::HardLinkTarget { .. })
        }),
        (vec![file("a"), link("a", "a")], |r| {
            matches!(r, R::HardLinkTarget { .. })
        }),
        (vec![dir("d"), link("a", "d")], |r| {
            matches!(r, R::HardLinkTarget { .. })
        }),
        (vec![file(".wh.d"), link("a", "d")], |r| {
            matches!(r, R::HardLinkTarget { .. })
        }),
        (vec![file("a"), file("a/b")], |r| {
            matches!(r, R::ParentNotDirectory { .. })
        }),
        (vec![file(".wh.a/b")], |r| matches!(r, R::Name { .. })),
        (vec![file(".wh...")], |r| matches!(r, R::Name { .. })),
        (vec![file(&long)], |r| matches!(r, R::Name { .. })),
        (vec![file("a\0b")], |r| matches!(r, R::Name { .. })),
        (vec![file("/..")], |r| matches!(r, R::Name { .. })),
        (vec![entry("l", EntryKind::Symlink(b""))], |r| {
            matches!(r, R::Name { .. })
        }),
        (vec![overlay], |r| matches!(r, R::OverlayXattr { .. })),
        (
            vec![entry(
                "c",
                EntryKind::CharDevice(Rdev {
                    major: 4096,
                    minor: 0,
                }),
            )],
            |r| matches!(r, R::DeviceNumber { .. }),
        ),
    ];
    for (index, (entries, expected)) in cases.into_iter().enumerate() {
        let reason = refused(entries);
        assert!(expected(&reason), "case {index}: {reason:?}");
        assert!(!reason.to_string().is_empty());
    }
}

#[test]
fn limits_hold() {
    let limits = Limits {
        max_entries: 3,
        max_path_bytes: 20,
        max_depth: 2,
        max_xattr_bytes: 10,
        ..Limits::default()
    };
    let mut builder = Builder::new(limits);
    let is_limit = |result| matches!(result, Err(BuildError::Limit { .. }));
    let mut xattrs = file("a");
    xattrs.attrs.xattrs.insert(vec![b'k'; 6], vec![0; 6]);
    assert!(is_limit(builder.apply(xattrs)));
    assert!(is_limit(builder.apply(file("a/b/c"))));
    assert!(is_limit(builder.apply(file("a23456789012345678901"))));
    assert!(!is_limit(builder.apply(file("d/a"))));
    assert!(!is_limit(builder.apply(link("d/b", "d/a"))));
    assert!(is_limit(builder.apply(link("d/c", "d/a"))));
    assert!(is_limit(builder.apply(file("d/e"))));
    assert!(is_limit(builder.apply(file("e/f"))));
    assert!(!is_limit(builder.apply(dir("d"))));
    assert_eq!(builder.finish().inodes().len(), 3);
}
