//! Paths inside a layer: raw bytes, cleaned, shown without control characters.

use core::fmt;

/// A path inside a layer as bytes: cleaned and relative ("" is the root), or, in errors about
/// paths that cannot be cleaned, as the image spelt it. Shown with everything that is not
/// printable ASCII escaped, and cut when very long.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreePath(Vec<u8>);

/// How many bytes of a path a message shows.
const SHOWN_BYTES: usize = 256;

impl TreePath {
    /// Wraps path bytes as they are.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// Cleans `raw` like `path.Clean("/" + raw)` without the leading slash: empty components and
    /// `.` vanish, `..` removes what precedes it and stops at the root.
    pub fn clean(raw: &[u8]) -> Self {
        let mut out = Vec::new();
        clean_into(raw, &mut out);
        Self(out)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(SHOWN_BYTES)];
        write!(f, "/{}", shown.escape_ascii())?;
        if shown.len() < self.0.len() {
            write!(f, "... ({} bytes)", self.0.len())?;
        }
        Ok(())
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Replaces `out` with the cleaned form of `raw` ([`TreePath::clean`]).
pub(crate) fn clean_into(raw: &[u8], out: &mut Vec<u8>) {
    out.clear();
    for component in raw.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                let parent = out.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                out.truncate(parent);
            }
            name => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(name);
            }
        }
    }
}

/// Splits a cleaned path into its directory ("" for the root) and its last component.
pub(crate) fn split_last(cleaned: &[u8]) -> (&[u8], &[u8]) {
    match cleaned.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&cleaned[..slash], &cleaned[slash + 1..]),
        None => (&[], cleaned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleans_like_go() {
        for (raw, cleaned) in [
            ("", ""),
            ("/", ""),
            ("./", ""),
            ("a/", "a"),
            ("./a//b/./c", "a/b/c"),
            ("/a/../b", "b"),
            ("../../a", "a"),
            ("a/b/../../..", ""),
            ("a/..b/...", "a/..b/..."),
        ] {
            assert_eq!(
                TreePath::clean(raw.as_bytes()).as_bytes(),
                cleaned.as_bytes(),
                "{raw}"
            );
        }
    }

    #[test]
    fn shows_no_control_characters() {
        assert_eq!(
            TreePath::new(b"a\n\xff\\b".to_vec()).to_string(),
            "/a\\n\\xff\\\\b"
        );
        assert!(TreePath::new(vec![b'x'; 5000]).to_string().len() < 300);
    }
}
