//! What a person types for an image.

use std::{fmt, path::PathBuf, str::FromStr};

use storage::registry::{Reference, ReferenceError};

/// `oci:DIR[:TAG]` for an OCI image layout, anything else is a registry reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A layout directory and the tag in it (its only image when absent).
    Layout {
        /// The directory with `index.json`.
        dir: PathBuf,
        /// `org.opencontainers.image.ref.name` of the image.
        tag: Option<String>,
    },
    /// A registry reference.
    Registry(Reference),
}

/// Why text is not a location.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LocationError {
    /// `oci:` without a directory.
    #[error("{0:?} names no directory; write oci:DIR or oci:DIR:TAG")]
    NoDirectory(String),
    /// Not a registry reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let Some(rest) = text.strip_prefix("oci:") else {
            return Ok(Self::Registry(text.parse()?));
        };
        let (dir, tag) = match rest.rsplit_once(':') {
            Some((dir, tag)) if !tag.contains('/') => (dir, Some(tag.to_owned())),
            _ => (rest, None),
        };
        if dir.is_empty() {
            return Err(LocationError::NoDirectory(text.to_owned()));
        }
        Ok(Self::Layout {
            dir: dir.into(),
            tag: tag.filter(|tag| !tag.is_empty()),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout { dir, tag: None } => write!(f, "oci:{}", dir.display()),
            Self::Layout {
                dir,
                tag: Some(tag),
            } => write!(f, "oci:{}:{tag}", dir.display()),
            Self::Registry(reference) => reference.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_and_references_are_told_apart() {
        let layout = |dir: &str, tag: Option<&str>| Location::Layout {
            dir: dir.into(),
            tag: tag.map(str::to_owned),
        };
        assert_eq!("oci:/a/b".parse(), Ok(layout("/a/b", None)));
        assert_eq!("oci:b:1.2".parse(), Ok(layout("b", Some("1.2"))));
        assert_eq!("oci:/a:b/c".parse(), Ok(layout("/a:b/c", None)));
        assert!(matches!(
            "oci:".parse::<Location>(),
            Err(LocationError::NoDirectory(_))
        ));
        assert!(matches!(
            "localhost:5000/a:1".parse(),
            Ok(Location::Registry(_))
        ));
        assert!("UPPER CASE".parse::<Location>().is_err());
    }
}
