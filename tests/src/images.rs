//! Contents of test images: the tree with every oddity that a lazily served image must show right.

use harness::{listing::Allowed, tarball::Tarball};

/// Bytes that look random but are the same on every run.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The tars of the oddities, bottom first: times, modes, devices, names, hard links, holes,
/// whiteouts, opaque and implied directories, an empty layer three times, a real one twice.
pub fn oddities() -> Vec<Vec<u8>> {
    let long = "n".repeat(255);
    let mut holes = noise(1, 12_000);
    holes.extend(std::iter::repeat_n(0, 3 << 20));
    holes.extend(noise(2, 5_000));
    let mut base = Tarball::new();
    base.dir("etc")
        .file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n");
    base.mode(0o1777).dir("tmp");
    base.mode(0o700)
        .owner(1000, 1001)
        .mtime(1_600_000_000, 0)
        .dir("private");
    base.file("private/inside", b"inside");
    base.mtime(0, 0).file("epoch", b"zero");
    base.mtime(-86_400, 0).file("before", b"1969");
    base.mode(0o4755).file("suid", b"#!suid");
    base.mode(0o2755).file("sgid", b"#!sgid");
    base.mode(0o1644)
        .owner(4_000_000, 4_000_001)
        .file("sticky", b"owner beyond 16 bits");
    base.char_device("null", 1, 3)
        .block_device("disk", 259, 300)
        .fifo("pipe");
    base.symlink("link", "etc/passwd")
        .symlink("dangling", "/no/such/target");
    base.symlink("far", &"t/".repeat(200));
    base.file("group/a", b"one inode")
        .hardlink("group/b", "group/a")
        .hardlink("c", "group/a");
    base.file(&format!("names/{long}"), b"255 bytes")
        .dir(&format!("names/d{}", "m".repeat(254)));
    base.file("names/\u{fc}\u{4e2d}", b"utf-8")
        .file("names/with space", b"");
    base.xattr("user.comment", b"binary \x00\xff value")
        .xattr("user.empty", b"")
        .file("attributes", b"x");
    base.xattr(
        "security.capability",
        &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    base.file("capable", b"cap");
    // An ordinary unpack does not restore it, nor may a lazy layer show it.
    base.xattr("trusted.admin", b"no").file("admin", b"x");
    base.file("empty", b"")
        .file("holes", &holes)
        .file("big", &noise(3, 9_500_000));
    base.file("one", b"1")
        .file("page", &noise(4, 4096))
        .file("page1", &noise(5, 4097));
    base.dir("replaced")
        .file("replaced/old", b"old")
        .dir("gone")
        .file("gone/file", b"gone");
    base.dir("opaque")
        .file("opaque/hidden", b"hidden")
        .file("opaque/kept", b"below");
    base.file("deep/1/2/3/4/5/6/7/8/9/file", b"implied parents");
    for index in 0..300 {
        base.file(
            &format!("many/{index:04}"),
            format!("file {index}\n").as_bytes(),
        );
    }

    let mut second = Tarball::new();
    second
        .whiteout("gone")
        .whiteout("replaced")
        .file("replaced", b"now a file");
    second.opaque("opaque").file("opaque/kept", b"above");
    // Directories below are implied here: their attributes come from the layer below.
    second
        .file("private/added", b"added")
        .file("tmp/added", b"tmp");
    second.whiteout("many/0007").file("many/0008", b"changed");
    second.hardlink("no-such", "private/added");

    let empty = Tarball::new().finish();
    let mut repeated = Tarball::new();
    repeated
        .mode(0o750)
        .dir("twice")
        .file("twice/file", &noise(6, 70_000));
    let repeated = repeated.finish();
    let mut last = Tarball::new();
    last.whiteout("twice/file").file("last", b"last");

    vec![
        base.finish(),
        empty.clone(),
        repeated.clone(),
        second.finish(),
        empty.clone(),
        last.finish(),
        repeated,
        empty,
    ]
}

/// What may differ in [`oddities`]: times of the directories that an entry is missing for, in some
/// layer. (An unpack changes the time of a directory of a layer below as well.)
pub fn allowed() -> Allowed {
    let mut implied: Vec<std::path::PathBuf> =
        ["group", "names", "deep", "many", "private", "tmp", "opaque"]
            .map(Into::into)
            .into();
    let mut deep = std::path::PathBuf::from("deep");
    for part in 1..=9 {
        deep.push(part.to_string());
        implied.push(deep.clone());
    }
    Allowed { implied }
}
