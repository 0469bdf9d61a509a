use super::*;

/// A header block of the given dialect with its checksum.
fn block(name: &str, flag: u8, size: &str, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..124 + size.len()].copy_from_slice(size.as_bytes());
    block[136..147].copy_from_slice(b"00000000017");
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    change(&mut block);
    seal(&mut block);
    block
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let body: Vec<u8> = records
        .iter()
        .flat_map(|(key, value)| pax::tests::record(key.as_bytes(), value.as_bytes()))
        .collect();
    let mut out = block("x", b'x', &format!("{:o}", body.len()), |_| {});
    out.extend(padded(body));
    out
}

#[derive(Debug, Default, PartialEq)]
struct Parsed {
    entries: Vec<(Header, Vec<u8>)>,
    ended: bool,
}

fn parse_in_steps(bytes: &[u8], step: usize) -> Result<Parsed, TarError> {
    let mut parser = Parser::new(Limits::default());
    let mut parsed = Parsed::default();
    for mut piece in bytes.chunks(step) {
        while let Some(event) = parser.next_event(&mut piece)? {
            match event {
                Event::Entry(header) => parsed.entries.push((*header, Vec::new())),
                Event::Payload { position, bytes } => {
                    let payload = &mut parsed.entries.last_mut().expect("an entry").1;
                    assert_eq!(payload.len() as u64, position);
                    payload.extend_from_slice(bytes);
                }
                Event::EntryEnd => {
                    let (header, payload) = parsed.entries.last().expect("an entry");
                    assert_eq!(header.size, payload.len() as u64);
                }
                Event::End => parsed.ended = true,
            }
        }
        assert!(piece.is_empty());
    }
    parser.finish()?;
    Ok(parsed)
}

fn parse(bytes: &[u8]) -> Result<Parsed, TarError> {
    let whole = parse_in_steps(bytes, usize::MAX);
    for step in [1, 3, 511, 513] {
        assert_eq!(parse_in_steps(bytes, step), whole, "in steps of {step}");
    }
    whole
}

#[test]
fn entries_payloads_and_offsets() {
    let mut tar = block("a", b'0', "5", |_| {});
    tar.extend(padded(b"hello".to_vec()));
    tar.extend(pax(&[("mtime", "-1.25"), ("uid", "4000000")]));
    tar.extend(block("d/", b'5', "7", |b| b[108..116].fill(b'9')));
    tar.extend(block("old-dir/", 0, "0", |_| {}));
    tar.extend([0; 1024]);
    tar.extend(b"trailing garbage is ignored");
    let parsed = parse(&tar).expect("parses");
    assert!(parsed.ended);
    let [(a, hello), (d, none), (old, _)] = &parsed.entries[..] else {
        panic!("{parsed:?}");
    };
    assert_eq!(
        (a.offset, a.payload_offset, &hello[..]),
        (0, 512, &b"hello"[..])
    );
    assert_eq!(a.mtime.seconds, 0o17);
    assert_eq!((d.offset, d.payload_offset, none.len()), (1024, 2560, 0));
    assert_eq!((d.uid, d.size), (4_000_000, 0));
    assert_eq!((d.mtime.seconds, d.mtime.nanos), (-2, 750_000_000));
    assert_eq!(old.kind, EntryType::Directory);
}

#[test]
fn the_end_of_an_archive() {
    let entry = block("a", b'0', "0", |_| {});
    for zeros in [0, 512, 1024, 10240] {
        let tar = [entry.clone(), vec![0; zeros]].concat();
        assert_eq!(parse(&tar).expect("parses").entries.len(), 1, "{zeros}");
    }
    assert_eq!(parse(b"").expect("parses"), Parsed::default());
    let lone = [vec![0; 512], entry.clone()].concat();
    assert_eq!(parse(&lone), Err(TarError::LoneZeroBlock { offset: 0 }));
    for (cut, inside) in [(511, "a header"), (700, "a payload"), (1000, "padding")] {
        let tar = [block("a", b'0', "310", |_| {}), vec![1; 512]].concat();
        assert_eq!(
            parse(&tar[..cut]),
            Err(TarError::Truncated {
                offset: cut as u64,
                inside
            })
        );
    }
    assert!(matches!(
        parse(&pax(&[("a", "b")])),
        Err(TarError::Truncated { .. })
    ));
}

#[test]
fn gnu_names_beat_pax_names() {
    let gnu = |b: &mut [u8]| b[257..265].copy_from_slice(b"ustar  \0");
    let mut tar = pax(&[("path", "from-pax")]);
    tar.extend(block("l", b'L', "12", gnu));
    tar.extend(padded(b"from-gnu\0".to_vec()));
    tar.extend(block("l", b'K', "7", gnu));
    tar.extend(padded(b"target\0".to_vec()));
    tar.extend(block("short", b'2', "0", gnu));
    let parsed = parse(&tar).expect("parses");
    assert_eq!(parsed.entries[0].0.path, b"from-gnu");
    assert_eq!(parsed.entries[0].0.link, b"target");
    assert_eq!(parsed.entries[0].0.offset, 0);
}

#[test]
fn prefixes() {
    let prefix = |b: &mut [u8]| b[345..348].copy_from_slice(b"pre");
    assert_eq!(
        parse(&block("n", b'0', "0", prefix))
            .expect("parses")
            .entries[0]
            .0
            .path,
        b"pre/n"
    );
    // In a GNU header the bytes are a time, unless they cannot be one.
    let gnu = |value: &'static [u8]| {
        move |b: &mut [u8]| {
            b[257..265].copy_from_slice(b"ustar  \0");
            b[345..345 + value.len()].copy_from_slice(value);
        }
    };
    let time = block("n", b'0', "0", gnu(b"00000000017"));
    assert_eq!(parse(&time).expect("parses").entries[0].0.path, b"n");
    let old_go = block("n", b'0', "0", gnu(b"pre"));
    assert_eq!(parse(&old_go).expect("parses").entries[0].0.path, b"pre/n");
    let v7 = block("n", b'0', "0", |b| b[257..].fill(b'x'));
    assert_eq!(parse(&v7).expect("parses").entries[0].0.path, b"n");
}

#[test]
fn sparse_files_are_reported() {
    let mut old = block("s", b'S', "3", |b| {
        b[257..265].copy_from_slice(b"ustar  \0");
        b[482] = 1;
    });
    let mut map = vec![0; 512];
    map[504] = 1;
    old.extend(&map);
    map[504] = 0;
    old.extend(&map);
    old.extend(padded(b"abc".to_vec()));
    let parsed = parse(&old).expect("parses");
    let (header, payload) = &parsed.entries[0];
    assert!(header.sparse);
    assert_eq!((header.payload_offset, &payload[..]), (1536, &b"abc"[..]));

    for records in [
        &[("GNU.sparse.major", "1"), ("GNU.sparse.name", "s")][..],
        &[("GNU.sparse.map", "0,1,2,3"), ("GNU.sparse.name", "s")],
    ] {
        let tar = [pax(records), block("x", b'0', "0", |_| {})].concat();
        let parsed = parse(&tar).expect("parses");
        assert!(parsed.entries[0].0.sparse);
        assert_eq!(parsed.entries[0].0.path, b"s");
    }
}

#[test]
fn global_headers_have_no_effect() {
    let body = b"10 path=x\n";
    let mut tar = block("g", b'g', &format!("{:o}", body.len()), |_| {});
    tar.extend(padded(body.to_vec()));
    tar.extend(block("a", b'0', "0", |_| {}));
    let parsed = parse(&tar).expect("parses");
    assert_eq!(parsed.entries[0].0.path, b"a");
    assert_eq!(parsed.entries[0].0.offset, 1024);
}

#[test]
fn errors_carry_offsets() {
    let mut tar = block("a", b'0', "0", |_| {});
    let mut bad = block("b", b'0', "0", |_| {});
    bad[0] = b'c';
    tar.extend(bad);
    assert!(matches!(
        parse(&tar),
        Err(TarError::Checksum { offset: 512, .. })
    ));
    let negative = block("a", b'0', "0", |b| b[124..136].fill(0xff));
    assert_eq!(
        parse(&negative),
        Err(TarError::Number {
            offset: 0,
            field: "size"
        })
    );
    let huge = block("a", b'0', "0", |b| {
        b[124..136].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    });
    assert!(matches!(parse(&huge), Err(TarError::TooLarge { .. })));
    let long = block("a", b'L', "77777777", |_| {});
    assert!(matches!(
        parse(&long),
        Err(TarError::ExtensionTooLarge { .. })
    ));
}
