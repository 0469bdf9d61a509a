//! What is wrong with a configuration.

use std::{
    io,
    path::{Path, PathBuf},
};

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The text is not TOML, or not of the right shape.
    #[error("{place}: {problem}")]
    Syntax {
        /// File and line.
        place: Place,
        /// What the parser says.
        problem: String,
    },
    /// A value is not allowed.
    #[error("{place}: {key}: {problem}")]
    Invalid {
        /// File and line of the key; no line when the value is a flag's or a default.
        place: Place,
        /// The dotted key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// The configuration cannot be printed.
    #[error("cannot print the configuration: {0}")]
    Dump(String),
}

/// Where in which file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The file, when there is one.
    pub path: Option<PathBuf>,
    /// The line, from 1.
    pub line: Option<usize>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.display())?,
            None => f.write_str("configuration")?,
        }
        match self.line {
            Some(line) => write!(f, ":{line}"),
            None => Ok(()),
        }
    }
}

impl ConfigError {
    pub(super) fn syntax(text: &str, error: &toml::de::Error) -> Self {
        Self::Syntax {
            place: Place {
                path: None,
                line: error.span().map(|span| line_of(text, span.start)),
            },
            problem: error.message().to_owned(),
        }
    }

    pub(super) fn invalid(text: &str, key: &str, problem: String) -> Self {
        Self::Invalid {
            place: Place {
                path: None,
                line: find(text, key),
            },
            key: key.to_owned(),
            problem,
        }
    }

    pub(super) fn in_file(mut self, file: &Path) -> Self {
        if let Self::Syntax { place, .. } | Self::Invalid { place, .. } = &mut self {
            place.path = Some(file.to_owned());
        }
        self
    }
}

/// The line on which the text sets a dotted key.
fn find(text: &str, key: &str) -> Option<usize> {
    let document = toml::de::DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut names = key.split('.').peekable();
    loop {
        let name = names.next()?;
        let (found, value) = table
            .iter()
            .find(|(candidate, _)| candidate.get_ref() == name)?;
        if names.peek().is_none() {
            return Some(line_of(text, found.span().start));
        }
        table = value.get_ref().as_table()?;
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()
        .iter()
        .take(offset)
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}
