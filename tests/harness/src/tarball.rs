//! A small writer of tar layers for test images: ustar headers, PAX records where needed.

use std::collections::BTreeMap;

/// Builds one uncompressed tar.
#[derive(Debug, Default)]
pub struct Tarball {
    bytes: Vec<u8>,
    next: Meta,
}

/// Attributes of the next entry; reset after each.
#[derive(Clone, Debug)]
struct Meta {
    mode: Option<u32>,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            mode: None,
            uid: 0,
            gid: 0,
            mtime: (1_700_000_000, 0),
            xattrs: BTreeMap::new(),
        }
    }
}

impl Tarball {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Mode of the next entry.
    pub fn mode(&mut self, mode: u32) -> &mut Self {
        self.next.mode = Some(mode);
        self
    }

    /// Owner of the next entry.
    pub fn owner(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.next.uid = uid;
        self.next.gid = gid;
        self
    }

    /// Modification time of the next entry.
    pub fn mtime(&mut self, seconds: i64, nanos: u32) -> &mut Self {
        self.next.mtime = (seconds, nanos);
        self
    }

    /// An extended attribute of the next entry.
    pub fn xattr(&mut self, name: &str, value: &[u8]) -> &mut Self {
        self.next.xattrs.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.entry(path, b'0', 0o644, "", (0, 0), data)
    }

    /// A directory.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.entry(
            &format!("{}/", path.trim_end_matches('/')),
            b'5',
            0o755,
            "",
            (0, 0),
            b"",
        )
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, b'2', 0o777, target, (0, 0), b"")
    }

    /// A hard link to an earlier entry.
    pub fn hardlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, b'1', 0o644, target, (0, 0), b"")
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(path, b'3', 0o600, "", (major, minor), b"")
    }

    /// A block device.
    pub fn block_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(path, b'4', 0o600, "", (major, minor), b"")
    }

    /// A named pipe.
    pub fn fifo(&mut self, path: &str) -> &mut Self {
        self.entry(path, b'6', 0o600, "", (0, 0), b"")
    }

    /// The whiteout of `path`.
    pub fn whiteout(&mut self, path: &str) -> &mut Self {
        let (parent, name) = path
            .rsplit_once('/')
            .map_or(("", path), |(parent, name)| (parent, name));
        let slash = if parent.is_empty() { "" } else { "/" };
        self.file(&format!("{parent}{slash}.wh.{name}"), b"")
    }

    /// Marks directory `path` opaque.
    pub fn opaque(&mut self, path: &str) -> &mut Self {
        self.file(&format!("{path}/.wh..wh..opq"), b"")
    }

    fn entry(
        &mut self,
        path: &str,
        kind: u8,
        mode: u32,
        link: &str,
        device: (u32, u32),
        data: &[u8],
    ) -> &mut Self {
        let meta = std::mem::take(&mut self.next);
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if path.len() > 100 || !path.is_ascii() {
            records.push(("path".into(), path.as_bytes().to_vec()));
        }
        if link.len() > 100 || !link.is_ascii() {
            records.push(("linkpath".into(), link.as_bytes().to_vec()));
        }
        let (seconds, nanos) = meta.mtime;
        if seconds < 0 || nanos != 0 {
            records.push(("mtime".into(), pax_time(seconds, nanos).into_bytes()));
        }
        for (name, value) in &meta.xattrs {
            records.push((format!("SCHILY.xattr.{name}"), value.clone()));
        }
        if !records.is_empty() {
            let body = pax_body(&records);
            self.header(
                "PaxHeaders/entry",
                b'x',
                0o644,
                0,
                0,
                0,
                "",
                (0, 0),
                body.len(),
            );
            self.payload(&body);
        }
        let mode = meta.mode.unwrap_or(mode);
        self.header(
            path,
            kind,
            mode,
            meta.uid,
            meta.gid,
            seconds.max(0),
            link,
            device,
            data.len(),
        );
        self.payload(data);
        self
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one argument for each field of a tar header"
    )]
    fn header(
        &mut self,
        path: &str,
        kind: u8,
        mode: u32,
        uid: u32,
        gid: u32,
        mtime: i64,
        link: &str,
        device: (u32, u32),
        size: usize,
    ) {
        let mut block = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &path.as_bytes()[..path.len().min(100)]);
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, format!("{uid:07o}\0").as_bytes());
        put(116, format!("{gid:07o}\0").as_bytes());
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, format!("{mtime:011o}\0").as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, &link.as_bytes()[..link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}\0", device.0).as_bytes());
        put(337, format!("{:07o}\0", device.1).as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
    }

    fn payload(&mut self, data: &[u8]) {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    /// The finished archive with its two end blocks.
    pub fn finish(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

fn pax_time(seconds: i64, nanos: u32) -> String {
    if seconds < 0 && nanos != 0 {
        // -0.3 s is floored to (-1, 700,000,000): written as a decimal it is -0.3.
        let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        return format!("-{}.{:09}", -total / 1_000_000_000, -total % 1_000_000_000);
    }
    if nanos == 0 {
        seconds.to_string()
    } else {
        format!("{seconds}.{nanos:09}")
    }
}

fn pax_body(records: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = 1 + key.len() + 1 + value.len() + 1;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length = rest + length.to_string().len();
        }
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}
