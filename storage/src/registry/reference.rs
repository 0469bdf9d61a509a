//! Names of images as people type them: `python`, `ghcr.io/a/b:1.2`, `localhost:5000/x@sha256:…`.
//!
//! The grammar is the one docker and containerd share: a first component without `.`, `:` or an
//! upper-case letter that is not `localhost` is no registry but a part of a name on Docker Hub,
//! and a single component there belongs to `library/`.

use std::{fmt, str::FromStr};

use formats::digest::{Digest, DigestError};

/// What a name without a registry is looked up in.
pub const DEFAULT_REGISTRY: &str = "docker.io";

const DEFAULT_TAG: &str = "latest";
const OFFICIAL_PREFIX: &str = "library/";
const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;

/// A repository of one registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    registry: String,
    name: String,
}

/// An image: a repository with a tag or a digest (with both, the digest counts).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is not an image reference.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Nothing was given.
    #[error("the image reference is empty")]
    Empty,
    /// The registry part is no host name with an optional port.
    #[error("{registry:?} in image reference {reference:?} is not a registry host")]
    Registry {
        /// What was parsed.
        reference: String,
        /// The offending part.
        registry: String,
    },
    /// The repository part has characters that a name may not have.
    #[error(
        "{name:?} in image reference {reference:?} is not a repository name (lower-case letters, \
         digits and single separators . _ __ - between them)"
    )]
    Name {
        /// What was parsed.
        reference: String,
        /// The offending part.
        name: String,
    },
    /// The name is longer than registries accept.
    #[error("the name in image reference {reference:?} is longer than {MAX_NAME_BYTES} bytes")]
    TooLong {
        /// What was parsed, cut.
        reference: String,
    },
    /// The tag has characters that a tag may not have, or is too long.
    #[error("{tag:?} in image reference {reference:?} is not a tag")]
    Tag {
        /// What was parsed.
        reference: String,
        /// The offending part.
        tag: String,
    },
    /// The digest is not a SHA-256 digest.
    #[error("image reference {reference:?}")]
    Digest {
        /// What was parsed.
        reference: String,
        /// What is wrong with it.
        #[source]
        source: DigestErrorText,
    },
}

/// A [`DigestError`] that can be cloned.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct DigestErrorText(String);

impl From<DigestError> for DigestErrorText {
    fn from(error: DigestError) -> Self {
        Self(error.to_string())
    }
}

impl Repository {
    /// A repository from its two parts, as they appear in a canonical reference.
    pub fn new(registry: &str, name: &str) -> Result<Self, ReferenceError> {
        let joined = format!("{registry}/{name}");
        let repository = joined.parse::<Reference>()?.repository;
        if repository.registry != registry {
            return Err(ReferenceError::Registry {
                reference: clip(&joined),
                registry: clip(registry),
            });
        }
        Ok(repository)
    }

    /// Host and optional port of the registry; `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The name within the registry, for example `library/python`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Reference {
    /// The repository that holds the image.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Host and optional port of the registry; `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        &self.repository.registry
    }

    /// The tag, `latest` when neither tag nor digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest or index, if given.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same image pinned to a digest.
    #[must_use]
    pub fn with_digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// What stands after `/manifests/` in a request: the digest, or else the tag.
    pub fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.repository, f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let reference = || clip(text);
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest
                    .parse::<Digest>()
                    .map_err(|error| ReferenceError::Digest {
                        reference: reference(),
                        source: error.into(),
                    })?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it belongs to the registry.
        let last = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[last..].find(':') {
            Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag {
                reference: reference(),
                tag: clip(tag),
            });
        }
        let (registry, name) = split_registry(name);
        if !is_registry(registry) {
            return Err(ReferenceError::Registry {
                reference: reference(),
                registry: clip(registry),
            });
        }
        let is_hex_id = name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
        if !name.split('/').all(is_name_component) || is_hex_id {
            return Err(ReferenceError::Name {
                reference: reference(),
                name: clip(name),
            });
        }
        let name = if registry == DEFAULT_REGISTRY && !name.contains('/') {
            format!("{OFFICIAL_PREFIX}{name}")
        } else {
            name.to_owned()
        };
        if registry.len() + 1 + name.len() > MAX_NAME_BYTES {
            return Err(ReferenceError::TooLong {
                reference: reference(),
            });
        }
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Self {
            repository: Repository {
                registry: registry.to_owned(),
                name,
            },
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            let registry = if first == "index.docker.io" {
                DEFAULT_REGISTRY
            } else {
                first
            };
            (registry, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn is_registry(text: &str) -> bool {
    let host = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    } else if let Some((host, port)) = text.split_once(':') {
        if !is_port(port) {
            return false;
        }
        host
    } else {
        text
    };
    host.split('.').all(|label| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    })
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

fn is_name_component(text: &str) -> bool {
    let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !is_alphanumeric(*first) || !is_alphanumeric(*last) {
        return false;
    }
    bytes
        .split(|b| is_alphanumeric(*b))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || is_dashes(separator))
}

fn is_dashes(separator: &[u8]) -> bool {
    separator.iter().all(|b| *b == b'-')
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
}

fn clip(text: &str) -> String {
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Reference {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn short_names_belong_to_docker_hub() {
        let digest = Digest::of(b"x");
        for (text, expected) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("a/b", "docker.io/a/b:latest"),
            ("docker.io/python", "docker.io/library/python:latest"),
            ("index.docker.io/a/b:t", "docker.io/a/b:t"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x/y:t", "localhost:5000/x/y:t"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("[::1]/x", "[::1]/x:latest"),
            ("Registry/x", "Registry/x:latest"),
            (
                "ghcr.io/a/b_c/d__e/f---g.h",
                "ghcr.io/a/b_c/d__e/f---g.h:latest",
            ),
            ("quay.io/a:T_1.2-3", "quay.io/a:T_1.2-3"),
            ("python:5000", "docker.io/library/python:5000"),
        ] {
            assert_eq!(parse(text).to_string(), expected, "{text}");
        }
        let pinned = format!("ghcr.io/a/b@{digest}");
        assert_eq!(parse(&pinned).to_string(), pinned);
        assert_eq!(parse(&pinned).manifest_name(), digest.to_string());
        let both = format!("ghcr.io/a/b:t@{digest}");
        assert_eq!(parse(&both).to_string(), both);
        assert_eq!(parse(&both).manifest_name(), digest.to_string());
        assert_eq!(parse("python").manifest_name(), "latest");
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        let hex = "a".repeat(64);
        let long = format!("x.io/{}", "a/".repeat(130) + "a");
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "UPPER",
            "a b",
            "a:",
            "a:b:c",
            "a:-x",
            "a@",
            "a@sha256:12",
            "x.io/A",
            "x.io/a//b",
            "x.io/a___b",
            "x.io/a..b",
            "x.io/.a",
            "x.io/a-",
            "x.io:port/a",
            "x.io:99999/a",
            "x..io/a",
            "-x.io/a",
            "[::1/a",
            "[zz]:1/a",
            "[::1]5/a",
            "https://x.io/a",
            "a@sha256:0@sha256:0",
            &hex,
            &long,
            "x.io/a:é",
            "é/a",
        ] {
            let error = bad.parse::<Reference>().expect_err(bad);
            assert!(!error.to_string().is_empty());
        }
        assert!(Repository::new("x.io", "a/b").is_ok());
        assert!(Repository::new("docker.io", "library/a").is_ok());
        assert!(
            Repository::new("x", "a").is_err(),
            "that would be docker.io/x/a"
        );
        assert!(Repository::new("index.docker.io", "a/b").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(&parse(&reference.to_string()), &reference);
            }
        }

        #[test]
        fn canonical_references_round_trip(
            registry in "([a-z0-9]{1,8}\\.){1,3}[a-z]{2,5}(:[1-9][0-9]{0,3})?",
            name in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,3}",
            tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in proptest::option::of(any::<[u8; 32]>()),
        ) {
            let digest = digest.map(Digest::from_bytes);
            let at_tag = tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
            let at_digest = digest.map(|digest| format!("@{digest}")).unwrap_or_default();
            let text = format!("{registry}/{name}{at_tag}{at_digest}");
            let reference = parse(&text);
            prop_assert_eq!(reference.registry(), registry);
            prop_assert_eq!(reference.repository().name(), name);
            prop_assert_eq!(reference.digest(), digest);
            if tag.is_some() || digest.is_some() {
                prop_assert_eq!(reference.tag(), tag.as_deref());
                prop_assert_eq!(reference.to_string(), text);
            } else {
                prop_assert_eq!(reference.tag(), Some("latest"));
            }
            prop_assert_eq!(&parse(&reference.to_string()), &reference);
        }
    }
}
