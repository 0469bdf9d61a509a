//! Extended attributes as they lie behind an inode.

use super::layout::{u16_at, u32_at};
use crate::tree::Xattrs;

/// A set of xattrs begins with a header of a name filter and the number of shared ones.
const HEADER_LEN: usize = 12;
/// Length of an entry without name and value.
const ENTRY_LEN: usize = 4;
/// Largest set of one inode: its length is stored as a 16-bit count of 4-byte words.
const MAX_LEN: usize = HEADER_LEN + 4 * (u16::MAX as usize - 1);

/// The name prefixes the kernel knows, with the number that stands for them on disk.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// The name by which overlayfs knows an opaque directory.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Why a set of xattrs does not fit into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Misfit {
    Name,
    Value,
    Total,
}

/// `true` if an image carries the xattr `name`: one of a namespace the kernel serves from EROFS,
/// and none of overlayfs's own, which would act on the overlay above. Other namespaces cannot be
/// asked for on Linux; an ordinary unpack drops them, too.
pub fn is_presented(name: &[u8]) -> bool {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return false;
    }
    split(name).is_some()
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // A prefix that ends in a dot is a namespace and needs a name; the ACLs are whole names.
        (prefix.ends_with(b".") != rest.is_empty()).then_some((*index, rest))
    })
}

/// Encodes what is presented of `xattrs`, and the mark of an opaque directory. Empty if there is
/// nothing to store.
pub(super) fn encode(xattrs: &Xattrs, opaque: bool) -> Result<Vec<u8>, Misfit> {
    let mut out = Vec::new();
    if opaque {
        push(&mut out, OPAQUE, b"y")?;
    }
    for (name, value) in xattrs {
        if is_presented(name) {
            push(&mut out, name, value)?;
        }
    }
    Ok(out)
}

fn push(out: &mut Vec<u8>, name: &[u8], value: &[u8]) -> Result<(), Misfit> {
    let (index, rest) = split(name).ok_or(Misfit::Name)?;
    let name_len = u8::try_from(rest.len()).map_err(|_| Misfit::Name)?;
    if name.contains(&0) || name.len() > 255 {
        return Err(Misfit::Name);
    }
    let value_len = u16::try_from(value.len()).map_err(|_| Misfit::Value)?;
    if out.is_empty() {
        // No name filter (its feature is off) and no shared xattrs.
        out.resize(HEADER_LEN, 0);
    }
    out.extend_from_slice(&[name_len, index]);
    out.extend_from_slice(&value_len.to_le_bytes());
    out.extend_from_slice(rest);
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    if out.len() > MAX_LEN {
        return Err(Misfit::Total);
    }
    Ok(())
}

/// The count an inode stores for `len` bytes of encoded xattrs.
pub(super) fn stored_count(len: usize) -> u16 {
    if len == 0 {
        return 0;
    }
    // `encode` keeps every length at or below `MAX_LEN`, whose count is 65,535.
    u16::try_from(1 + (len.saturating_sub(HEADER_LEN)) / 4).unwrap_or(u16::MAX)
}

/// What a set of xattrs says.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub(super) xattrs: Xattrs,
    pub(super) opaque: bool,
    /// Bytes of names and values.
    pub(super) bytes: usize,
}

/// Decodes the xattrs `body` of an inode. `shared` is the image from the first shared xattr on.
/// `None`: it is not well-formed, or holds more than `max_bytes` of names and values.
pub(super) fn decode(body: &[u8], shared: &[u8], max_bytes: usize) -> Option<Decoded> {
    let mut decoded = Decoded::default();
    if body.is_empty() {
        return Some(decoded);
    }
    let shared_count = usize::from(*body.get(4)?);
    let mut at = HEADER_LEN;
    for _ in 0..shared_count {
        let unit = usize::try_from(u32_at(body, at)?).ok()?;
        entry(&mut decoded, shared.get(unit.checked_mul(4)?..)?, max_bytes)?;
        at += 4;
    }
    while at < body.len() {
        let rest = &body[at..];
        if rest.iter().all(|byte| *byte == 0) {
            // Some writers leave room at the end.
            break;
        }
        at += entry(&mut decoded, rest, max_bytes)?;
    }
    Some(decoded)
}

/// Decodes the entry at the start of `bytes`, adds it, and returns its length.
fn entry(decoded: &mut Decoded, bytes: &[u8], max_bytes: usize) -> Option<usize> {
    let name_len = usize::from(*bytes.first()?);
    let index = *bytes.get(1)?;
    let value_len = usize::from(u16_at(bytes, 2)?);
    let rest = bytes.get(ENTRY_LEN..ENTRY_LEN + name_len)?;
    let value = bytes.get(ENTRY_LEN + name_len..ENTRY_LEN + name_len + value_len)?;
    let (_, prefix) = PREFIXES.iter().find(|(known, _)| *known == index)?;
    let name = [*prefix, rest].concat();
    if name == OPAQUE {
        decoded.opaque = value == b"y";
    } else if is_presented(&name) {
        decoded.bytes += name.len() + value.len();
        if decoded.bytes > max_bytes {
            return None;
        }
        decoded.xattrs.insert(name, value.to_vec());
    }
    Some((ENTRY_LEN + name_len + value_len).next_multiple_of(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_names_and_unknown_namespaces_stay_out() {
        for name in [
            &b"user.a"[..],
            b"security.capability",
            b"trusted.x",
            b"system.posix_acl_access",
            b"system.posix_acl_default",
            b"trusted.overlays",
        ] {
            assert!(is_presented(name), "{name:?}");
        }
        for name in [
            &b"user."[..],
            b"trusted.overlay.opaque",
            b"trusted.overlay.redirect",
            b"user.overlay.opaque",
            b"system.posix_acl_accessory",
            b"system.nfs4_acl",
            b"com.apple.provenance",
            b"",
        ] {
            assert!(!is_presented(name), "{name:?}");
        }
    }

    #[test]
    fn limits_are_those_of_the_layout() {
        let one = |name: &[u8], len: usize| {
            let xattrs = Xattrs::from([(name.to_vec(), vec![1; len])]);
            encode(&xattrs, false)
        };
        let longest = [&b"user."[..], &[b'n'; 250]].concat();
        assert_eq!(one(&longest, 65535).unwrap().len() % 4, 0);
        assert_eq!(one(b"user.a", 65536), Err(Misfit::Value));
        assert_eq!(
            one(&[&longest[..], b"n"].concat(), 1),
            Err(Misfit::Name),
            "the kernel takes 255 bytes with the prefix"
        );
        assert_eq!(one(b"user.\0", 1), Err(Misfit::Name));
        let many: Xattrs = (b'a'..=b'e')
            .map(|c| (vec![b'u', b's', b'e', b'r', b'.', c], vec![0; 65535]))
            .collect();
        assert_eq!(encode(&many, false), Err(Misfit::Total));
    }

    #[test]
    fn a_set_survives() {
        let xattrs = Xattrs::from([
            (b"user.empty".to_vec(), Vec::new()),
            (b"security.capability".to_vec(), vec![0; 20]),
            (b"trusted.t".to_vec(), b"v".to_vec()),
            (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]),
            (b"trusted.overlay.redirect".to_vec(), b"/x".to_vec()),
        ]);
        let body = encode(&xattrs, true).unwrap();
        assert_eq!(
            usize::from(stored_count(body.len()) - 1) * 4 + 12,
            body.len()
        );
        let decoded = decode(&body, &[], 4096).unwrap();
        assert!(decoded.opaque);
        assert_eq!(decoded.xattrs.len(), 4);
        for (name, value) in &decoded.xattrs {
            assert_eq!(&xattrs[name], value);
        }
        assert!(decode(&body, &[], 10).is_none());
        for cut in 1..body.len() {
            let _ = decode(&body[..cut], &[], 4096);
        }
    }
}
