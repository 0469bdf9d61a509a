//! Repository names, tags and references as the distribution specification spells them.

use core::{fmt, str::FromStr};

use formats::digest::Digest;

/// A repository name: path components of lower-case letters, digits and single separators.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoName(String);

/// A tag: at most 128 letters, digits, `_`, `.` and `-`, not starting with `.` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(String);

/// What stands behind `/manifests/`: a tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "the specification has exactly two")]
pub enum Reference {
    /// A movable name.
    Tag(Tag),
    /// The content itself.
    Digest(Digest),
}

/// Why a text is not a repository name, a tag or a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Not a repository name.
    #[error("{0:?} is not a repository name")]
    Repository(String),
    /// Neither a tag nor a sha256 digest.
    #[error("{0:?} is neither a tag nor a sha256 digest")]
    Reference(String),
}

impl RepoName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RepoName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() <= 255 && text.split('/').all(is_component) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Repository(shorten(text)))
        }
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let valid = text.len() <= 128
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|c| word(c) || c == b'.' || c == b'-');
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Reference(shorten(text)))
        }
    }
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains(':') {
            text.parse()
                .map(Self::Digest)
                .map_err(|_| NameError::Reference(shorten(text)))
        } else {
            text.parse().map(Self::Tag)
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(&tag.0),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    alnum(first)
        && alnum(last)
        && bytes.split(|&c| alnum(c)).all(|separator| match separator {
            [] | b"." | b"_" | b"__" => true,
            dashes => dashes.iter().all(|&c| c == b'-'),
        })
}

fn shorten(text: &str) -> String {
    text.chars().take(96).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names_follow_the_grammar() {
        for good in ["a", "library/python", "a.b_c__d---e/0", "x/y/z"] {
            assert!(good.parse::<RepoName>().is_ok(), "{good}");
        }
        for bad in [
            "", "/", "a/", "/a", "a//b", "A", "a..b", "_a", "a_", "a___b", "../x", "a/_tags", ".",
        ] {
            assert!(bad.parse::<RepoName>().is_err(), "{bad}");
        }
        assert!("a".repeat(256).parse::<RepoName>().is_err());
    }

    #[test]
    fn references_are_tags_or_digests() {
        assert!(matches!("v1.0-rc_1".parse(), Ok(Reference::Tag(_))));
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse(), Ok(Reference::Digest(digest)));
        for bad in ["", ".x", "-x", "a/b", "sha512:00", "sha256:zz"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
