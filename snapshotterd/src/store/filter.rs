//! containerd's filter language, as List receives it.
//!
//! ```text
//! filter   := selector ( "," selector )*          all must match
//! selector := path [ ( "==" | "!=" | "~=" ) value ]   no operator: the field is present
//! path     := field ( "." field )*
//! field    := [A-Za-z0-9_]+ | quoted
//! value    := quoted | anything but white space and commas
//! quoted   := a Go string; after "~=" also between slashes or bars
//! ```
//!
//! Several filters are alternatives. Fields are `name`, `parent`, `kind` and `labels.KEY`; an
//! unknown field is absent. `!=` is true for an absent field, as it is in containerd.

mod scan;

use std::fmt;

use regex::{Regex, RegexBuilder};

use self::scan::Scanner;
use super::{Info, SNAPSHOT_REF};

/// Longest filter and largest number of alternatives: far above what containerd sends, and small
/// enough that a filter cannot waste memory.
const LENGTH_LIMIT: usize = 16 << 10;
const ALTERNATIVES_LIMIT: usize = 256;
const REGEX_SIZE_LIMIT_BYTES: usize = 1 << 20;

/// A parsed list of filters. The empty one matches everything.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    alternatives: Vec<Vec<Selector>>,
}

/// Why a filter does not parse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid filter {filter:?} at byte {offset}: {problem}")]
pub struct FilterError {
    /// The filter, shortened.
    pub filter: String,
    /// Where the problem is.
    pub offset: usize,
    /// What it is.
    pub problem: String,
}

/// What an index can answer of a filter; the rest is still to be matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortcut<'a> {
    /// Only snapshots with this `containerd.io/snapshot.ref` can match.
    Reference(&'a str),
    /// Only the snapshot of this name can match.
    Name(&'a str),
    None,
}

#[derive(Clone, Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
    Unknown,
}

#[derive(Clone, Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Parses alternatives. No filter at all, or an empty one among them, matches everything.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, FilterError> {
        if filters.len() > ALTERNATIVES_LIMIT {
            return Err(FilterError {
                filter: String::new(),
                offset: 0,
                problem: format!(
                    "{} alternatives, {ALTERNATIVES_LIMIT} are allowed",
                    filters.len()
                ),
            });
        }
        let alternatives = filters
            .iter()
            .map(|filter| parse_one(filter.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(if alternatives.iter().any(Vec::is_empty) {
            Self::default()
        } else {
            Self { alternatives }
        })
    }

    /// Whether `info` matches one of the alternatives.
    pub fn matches(&self, info: &Info) -> bool {
        self.alternatives.is_empty()
            || self
                .alternatives
                .iter()
                .any(|selectors| selectors.iter().all(|selector| selector.matches(info)))
    }

    pub(super) fn shortcut(&self) -> Shortcut<'_> {
        let [selectors] = self.alternatives.as_slice() else {
            return Shortcut::None;
        };
        let equal = |wanted: &Field| {
            selectors.iter().find_map(|selector| match &selector.test {
                Test::Equal(value) if selector.field == *wanted => Some(value.as_str()),
                _ => None,
            })
        };
        if let Some(name) = equal(&Field::Name) {
            Shortcut::Name(name)
        } else if let Some(reference) = equal(&Field::Label(SNAPSHOT_REF.to_owned()))
            // The index holds no empty values: an absent label is not equal to "" either.
            && !reference.is_empty()
        {
            Shortcut::Reference(reference)
        } else {
            Shortcut::None
        }
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = self.field.of(info);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted.as_str()),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(pattern) => pattern.is_match(value.unwrap_or_default()),
        }
    }
}

impl Field {
    fn from_path(path: &[String]) -> Self {
        match path.split_first() {
            Some((first, rest)) => match first.as_str() {
                "name" => Self::Name,
                "parent" => Self::Parent,
                "kind" => Self::Kind,
                "labels" => Self::Label(rest.join(".")),
                _ => Self::Unknown,
            },
            None => Self::Unknown,
        }
    }

    fn of<'a>(&self, info: &'a Info) -> Option<&'a str> {
        match self {
            Self::Name => Some(&info.name),
            Self::Parent => Some(info.parent.as_deref().unwrap_or_default()),
            Self::Kind => Some(info.kind.as_str()),
            Self::Label(key) => info.labels.get(key).map(String::as_str),
            Self::Unknown => None,
        }
    }
}

fn parse_one(filter: &str) -> Result<Vec<Selector>, FilterError> {
    let fail = |(offset, problem): (usize, String)| FilterError {
        filter: shortened(filter),
        offset,
        problem,
    };
    if filter.len() > LENGTH_LIMIT {
        return Err(fail((
            LENGTH_LIMIT,
            format!("longer than {LENGTH_LIMIT} bytes"),
        )));
    }
    if filter.is_empty() {
        return Ok(Vec::new());
    }
    let mut scanner = Scanner::new(filter);
    let mut selectors = Vec::new();
    loop {
        selectors.push(selector(&mut scanner).map_err(fail)?);
        if scanner.at_end() {
            return Ok(selectors);
        }
        scanner
            .expect(',')
            .map_err(|offset| fail((offset, "expected a comma".to_owned())))?;
    }
}

fn selector(scanner: &mut Scanner<'_>) -> Result<Selector, (usize, String)> {
    let mut path = vec![scanner.field()?];
    while scanner.eat('.') {
        path.push(scanner.field()?);
    }
    let field = Field::from_path(&path);
    if scanner.at_end() || scanner.peek() == Some(',') {
        return Ok(Selector {
            field,
            test: Test::Present,
        });
    }
    let offset = scanner.offset();
    let test = match scanner.operator() {
        "==" => Test::Equal(scanner.value(false)?),
        "!=" => Test::NotEqual(scanner.value(false)?),
        "~=" => {
            let offset = scanner.offset();
            let pattern = scanner.value(true)?;
            RegexBuilder::new(&pattern)
                .size_limit(REGEX_SIZE_LIMIT_BYTES)
                .dfa_size_limit(REGEX_SIZE_LIMIT_BYTES)
                .build()
                .map(Test::Matches)
                .map_err(|error| (offset, error.to_string()))?
        }
        other => {
            return Err((
                offset,
                format!("expected an operator (== != ~=), found {other:?}"),
            ));
        }
    };
    Ok(Selector { field, test })
}

fn shortened(filter: &str) -> String {
    const SHOWN: usize = 200;
    let mut text: String = filter.chars().take(SHOWN).collect();
    if text.len() < filter.len() {
        text.push('…');
    }
    text
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Field::Name => f.write_str("name"),
            Field::Parent => f.write_str("parent"),
            Field::Kind => f.write_str("kind"),
            Field::Label(key) => write!(f, "labels.{}", scan::quote(key)),
            Field::Unknown => f.write_str("unknown"),
        }?;
        match &self.test {
            Test::Present => Ok(()),
            Test::Equal(value) => write!(f, "=={}", scan::quote(value)),
            Test::NotEqual(value) => write!(f, "!={}", scan::quote(value)),
            Test::Matches(pattern) => write!(f, "~={}", scan::quote(pattern.as_str())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Kind, Labels};

    fn info(name: &str, parent: &str, kind: Kind, labels: &[(&str, &str)]) -> Info {
        Info {
            name: name.to_owned(),
            parent: (!parent.is_empty()).then(|| parent.to_owned()),
            kind,
            created: crate::store::now(),
            updated: crate::store::now(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<Labels>(),
        }
    }

    #[test]
    fn matches_as_containerd_does() {
        let sample = info(
            "k8s.io/7/sha256:ab",
            "base",
            Kind::Committed,
            &[
                ("l", "2"),
                ("very complex label", "something"),
                (SNAPSHOT_REF, "sha256:ab"),
                ("a.b", "dotted"),
            ],
        );
        for (filter, expected) in [
            ("", true),
            ("name", true),
            ("name==k8s.io/7/sha256:ab", true),
            (r#"name=="k8s.io/7/sha256:ab""#, true),
            ("name != other", true),
            ("kind==committed", true),
            ("kind==Committed", false),
            (r#"parent!="""#, true),
            ("parent==base,kind==committed", true),
            ("parent==base,kind==active", false),
            ("labels.l", true),
            ("labels.l==2", true),
            ("labels.m", false),
            ("labels.m!=2", true),
            ("labels.a.b==dotted", true),
            (r#"labels."a.b"==dotted"#, true),
            (r#"labels."very complex label"==something"#, true),
            (
                r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="base""#,
                true,
            ),
            ("name~=^k8s", true),
            ("name~=/^k8s.io/", true),
            ("name~=|sha256:..$|", true),
            (r#"name~="sha256:[a-f]+""#, true),
            ("name~=zzz", false),
            ("colour", false),
            ("colour!=red", true),
            (r#"name=="k8s.io\x2f7/sha256:\u0061b""#, true),
        ] {
            let parsed = Filter::parse(&[filter]).expect(filter);
            assert_eq!(parsed.matches(&sample), expected, "{filter}");
        }
        let either = Filter::parse(&["name==x", "labels.l"]).expect("two");
        assert!(either.matches(&sample));
        assert!(Filter::parse::<&str>(&[]).expect("none").matches(&sample));
    }

    #[test]
    fn refuses_bad_syntax() {
        for filter in [
            ",",
            "name==",
            "name=",
            "name===x",
            "name==x,",
            "name==x y",
            "name.",
            ".name",
            r#"name=="x"#,
            r#"name=="\q""#,
            r#"name=="\xff""#,
            r#"name=="\ud800""#,
            "name==/x/",
            "name~=(",
            "name~=/a",
            "é==1",
            "name==a\0b",
        ] {
            assert!(Filter::parse(&[filter]).is_err(), "{filter:?}");
        }
    }

    #[test]
    fn uses_an_index_where_it_decides() {
        let parse = |filter: &str| Filter::parse(&[filter]).expect("parses");
        assert_eq!(
            parse(r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="p""#).shortcut(),
            Shortcut::Reference("sha256:ab")
        );
        assert_eq!(
            parse("kind==active,name==n").shortcut(),
            Shortcut::Name("n")
        );
        assert_eq!(parse("name!=n").shortcut(), Shortcut::None);
        assert_eq!(
            Filter::parse(&["name==n", "name==m"])
                .expect("parses")
                .shortcut(),
            Shortcut::None
        );
    }

    fn any_selector() -> impl Strategy<Value = Selector> {
        let field = prop_oneof![
            Just(Field::Name),
            Just(Field::Parent),
            Just(Field::Kind),
            any::<String>().prop_map(Field::Label),
        ];
        let test = prop_oneof![
            Just(Test::Present),
            any::<String>().prop_map(Test::Equal),
            any::<String>().prop_map(Test::NotEqual),
        ];
        (field, test).prop_map(|(field, test)| Selector { field, test })
    }

    proptest! {
        #[test]
        fn never_panics(filter in any::<String>()) {
            let _ = Filter::parse(&[filter]);
        }

        #[test]
        fn never_panics_near_the_grammar(filter in r#"[a-z.,=!~"/|\\x0-9 ]{0,40}"#) {
            let _ = Filter::parse(&[filter]);
        }

        #[test]
        fn parses_what_it_prints(selectors in proptest::collection::vec(any_selector(), 1..4)) {
            let text = selectors.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let parsed = parse_one(&text).expect("printed filters parse");
            prop_assert_eq!(
                parsed.iter().map(ToString::to_string).collect::<Vec<_>>(),
                selectors.iter().map(ToString::to_string).collect::<Vec<_>>()
            );
        }
    }
}
