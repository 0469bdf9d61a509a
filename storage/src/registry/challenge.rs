//! `WWW-Authenticate`: which ways of authentication a server offers.
//!
//! Servers write this header in many ways (several challenges in one header or in several, unquoted
//! values, blanks around `=`, stray commas); whatever can be understood is used, the rest skipped.

use http::{HeaderMap, header::WWW_AUTHENTICATE};

/// More headers or parameters than this are not looked at.
const MAX_CHALLENGES: usize = 16;
const MAX_PARAMETERS: usize = 32;

/// One offered way to authenticate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Challenge {
    /// `bearer`, `basic` or another scheme, in lower case.
    pub(super) scheme: String,
    /// The parameters, names in lower case, in order.
    pub(super) parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of that name.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        let mut parameters = self.parameters.iter();
        let (_, value) = parameters.find(|(key, _)| key == name)?;
        Some(value)
    }
}

/// All challenges of a reply, in order.
pub(super) fn of_headers(headers: &HeaderMap) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    for value in headers.get_all(WWW_AUTHENTICATE) {
        parse(&String::from_utf8_lossy(value.as_bytes()), &mut challenges);
    }
    challenges.truncate(MAX_CHALLENGES);
    challenges
}

/// Appends the challenges in one header value.
pub(super) fn parse(header: &str, challenges: &mut Vec<Challenge>) {
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() || challenges.len() >= MAX_CHALLENGES {
            return;
        }
        let (word, after) = token(rest);
        if word.is_empty() {
            // Not a token: skip the character and look on.
            let mut chars = rest.chars();
            chars.next();
            rest = chars.as_str();
            continue;
        }
        let after = after.trim_start_matches([' ', '\t']);
        match (after.strip_prefix('='), challenges.last_mut()) {
            // `name=value` belongs to the challenge before it.
            (Some(value), Some(challenge)) => {
                let (value, after) = token_or_quoted(value.trim_start_matches([' ', '\t']));
                if challenge.parameters.len() < MAX_PARAMETERS {
                    let name = word.to_ascii_lowercase();
                    challenge.parameters.push((name, value));
                }
                rest = after;
            }
            // A parameter without a scheme before it.
            (Some(value), None) => rest = token_or_quoted(value).1,
            // Base64 data after a scheme (token68) is a word too; it makes a scheme nobody knows.
            (None, _) => {
                challenges.push(Challenge {
                    scheme: word.to_ascii_lowercase(),
                    parameters: Vec::new(),
                });
                rest = after;
            }
        }
    }
}

fn token(text: &str) -> (&str, &str) {
    let is_token = |c: char| {
        c.is_ascii_graphic() && !matches!(c, '"' | ',' | '=' | ';' | '(' | ')' | '<' | '>' | '\\')
    };
    text.split_at(text.find(|c| !is_token(c)).unwrap_or(text.len()))
}

fn token_or_quoted(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        // Unquoted values may hold `=` (base64) although the grammar forbids it.
        let end = text.find([' ', '\t', ',', '"']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return (value, chars.as_str()),
            '\\' => value.extend(chars.next()),
            c => value.push(c),
        }
    }
    // The closing quote is missing: take what there is.
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(header: &str) -> Vec<Challenge> {
        let mut challenges = Vec::new();
        parse(header, &mut challenges);
        challenges
    }

    #[test]
    fn forms_seen_in_practice() {
        for header in [
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
            r#"bearer  Realm = "https://auth.docker.io/token" , SERVICE = registry.docker.io, , scope="repository:a/b:pull,push","#,
            r#"Bearer realm=https://auth.docker.io/token,service=registry.docker.io,scope="repository:a\/b:pull,push"#,
        ] {
            let [challenge] = &all(header)[..] else {
                panic!("{header}: {:?}", all(header));
            };
            assert_eq!(challenge.scheme, "bearer");
            assert_eq!(
                challenge.parameter("realm"),
                Some("https://auth.docker.io/token")
            );
            assert_eq!(challenge.parameter("service"), Some("registry.docker.io"));
            assert_eq!(
                challenge.parameter("scope"),
                Some("repository:a/b:pull,push")
            );
        }
        let both = all(r#"Basic realm="x, y", Bearer realm="https://t/",error="invalid_token""#);
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].parameter("realm"), Some("x, y"));
        assert_eq!(both[1].parameter("error"), Some("invalid_token"));
        assert_eq!(all("Basic")[0].scheme, "basic");
        assert_eq!(all("Negotiate, Basic realm=x").len(), 2);
    }

    #[test]
    fn several_headers_count_together() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Basic realm=a".parse().unwrap());
        headers.append(WWW_AUTHENTICATE, "Bearer realm=b".parse().unwrap());
        let schemes: Vec<_> = of_headers(&headers).into_iter().map(|c| c.scheme).collect();
        assert_eq!(schemes, ["basic", "bearer"]);
    }

    #[test]
    fn odd_headers_are_survived() {
        for header in [
            "",
            ",",
            "=",
            "==,=",
            "\"",
            "a=\"",
            "\\",
            "Bearer =x",
            "Bearer \"",
            "é=ü",
            "a b c",
            "\u{0}",
        ] {
            all(header);
        }
        assert!(all(&"a,".repeat(10_000)).len() <= MAX_CHALLENGES);
        let flood = all(&format!("Bearer {}", "a=b,".repeat(10_000)));
        assert!(flood[0].parameters.len() <= MAX_PARAMETERS);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(header in "\\PC{0,120}") {
            all(&header);
        }

        #[test]
        fn quoted_values_round_trip(
            scheme in "[A-Za-z]{1,8}",
            parameters in proptest::collection::vec(("[a-z]{1,8}", "[ -~]{0,24}"), 0..6),
        ) {
            let quoted: Vec<String> = parameters
                .iter()
                .map(|(name, value)| {
                    format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
                })
                .collect();
            let header = format!("{scheme} {}", quoted.join(", "));
            let challenges = all(&header);
            prop_assert_eq!(challenges.len(), 1, "{}", header);
            prop_assert_eq!(&challenges[0].scheme, &scheme.to_ascii_lowercase());
            prop_assert_eq!(&challenges[0].parameters, &parameters);
        }
    }
}
