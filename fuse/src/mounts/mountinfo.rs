//! /proc/self/mountinfo, decoded.

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStringExt, path::PathBuf};

/// One mount of this mount namespace (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Mount id.
    pub id: u64,
    /// Id of the mount it sits on.
    pub parent: u64,
    /// Device numbers of the superblock.
    pub device: (u32, u32),
    /// Root of the mount within its file system.
    pub root: PathBuf,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Mount options, comma separated.
    pub options: String,
    /// File system type.
    pub fs_type: String,
    /// Source as given when it was mounted.
    pub source: OsString,
    /// Superblock options, comma separated.
    pub super_options: OsString,
}

/// All mounts of the calling process' mount namespace, in mount order: of several at one target
/// the last is the visible one. Touches no file system but proc.
pub fn mountinfo() -> io::Result<Vec<MountInfo>> {
    Ok(parse_mountinfo(&fs::read("/proc/self/mountinfo")?))
}

/// Parses the text of a mountinfo file; a line that is not as documented is left out.
pub fn parse_mountinfo(text: &[u8]) -> Vec<MountInfo> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options = String::from_utf8(fields.next()?.to_vec()).ok()?;
    // Optional fields end with a lone dash.
    while fields.next()? != b"-" {}
    let fs_type = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = unescape(fields.next()?);
    let super_options = unescape(fields.next().unwrap_or_default());
    Some(MountInfo {
        id,
        parent,
        device,
        root: root.into(),
        target: target.into(),
        options,
        fs_type,
        source,
        super_options,
    })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's `\ooo` for space, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().filter(|digits| {
            byte == b'\\' && digits[0] <= b'3' && digits.iter().all(|d| (b'0'..=b'7').contains(d))
        });
        if let Some(digits) = octal {
            out.push(digits.iter().fold(0u8, |n, d| (n << 3) | (d - b'0')));
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn decodes_escapes_and_skips_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /mnt\\040two\\134x rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
                     41 36 0:57 / /run/sd/b ro,nosuid - fuse blobfs:a\\0111 rw,user_id=0\n\
                     garbage\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].target, Path::new("/mnt two\\x"));
        assert_eq!(mounts[0].root, Path::new("/mnt1"));
        assert_eq!(mounts[1].device, (0, 57));
        assert_eq!(mounts[1].source, "blobfs:a\t1");
        assert_eq!(mounts[1].super_options, "rw,user_id=0");
    }

    #[test]
    fn a_backslash_without_digits_stays() {
        assert_eq!(unescape(b"a\\9\\04"), "a\\9\\04");
    }

    #[test]
    fn reads_the_real_one() {
        let mounts = mountinfo().unwrap();
        assert!(mounts.iter().any(|m| m.target == Path::new("/")));
    }
}
