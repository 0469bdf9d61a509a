//! Basic and bearer authentication.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, Method, StatusCode, header};
use parking_lot::Mutex;
use serde_json::json;

use crate::{
    options::{Auth, Credentials},
    query::Query,
    reply::Reply,
    store::uploads::Ids,
};

/// Issues and checks credentials.
#[derive(Debug)]
pub(crate) struct Authority {
    auth: Auth,
    ids: Ids,
    tokens: Mutex<HashMap<String, Token>>,
    token_requests: AtomicU64,
}

#[derive(Debug)]
struct Token {
    expires: Instant,
    scopes: Vec<String>,
}

/// What a request needs to be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need<'a> {
    /// Be known at all.
    Known,
    Pull(&'a str),
    Push(&'a str),
    Delete(&'a str),
}

impl Need<'_> {
    pub(crate) fn of<'a>(method: &Method, repo: Option<&'a str>) -> Need<'a> {
        match (repo, method) {
            (None, _) => Need::Known,
            (Some(repo), &Method::GET | &Method::HEAD) => Need::Pull(repo),
            (Some(repo), &Method::DELETE) => Need::Delete(repo),
            (Some(repo), _) => Need::Push(repo),
        }
    }

    /// The scope to ask a token for.
    fn scope(&self) -> Option<String> {
        match self {
            Self::Known => None,
            Self::Pull(repo) => Some(format!("repository:{repo}:pull")),
            Self::Push(repo) => Some(format!("repository:{repo}:pull,push")),
            Self::Delete(repo) => Some(format!("repository:{repo}:delete")),
        }
    }

    fn granted_by(&self, scopes: &[String]) -> bool {
        let (repo, action) = match self {
            Self::Known => return true,
            Self::Pull(repo) => (repo, "pull"),
            Self::Push(repo) => (repo, "push"),
            Self::Delete(repo) => (repo, "delete"),
        };
        scopes.iter().any(|scope| {
            scope
                .strip_prefix("repository:")
                .and_then(|rest| rest.rsplit_once(':'))
                .is_some_and(|(name, actions)| {
                    name == *repo && actions.split(',').any(|a| a == action || a == "*")
                })
        })
    }
}

impl Authority {
    pub(crate) fn new(auth: Auth) -> Self {
        Self {
            auth,
            ids: Ids::default(),
            tokens: Mutex::default(),
            token_requests: AtomicU64::new(0),
        }
    }

    pub(crate) fn token_requests(&self) -> u64 {
        self.token_requests.load(Ordering::Relaxed)
    }

    pub(crate) fn revoke_all(&self) {
        self.tokens.lock().clear();
    }

    /// `None` if the request may go on, else the challenge. `origin` is this server as the client
    /// knows it, such as `http://127.0.0.1:5000`.
    pub(crate) fn check(&self, headers: &HeaderMap, need: Need<'_>, origin: &str) -> Option<Reply> {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        match &self.auth {
            Auth::None => None,
            Auth::Basic(credentials) if basic(given).as_ref() == Some(credentials) => None,
            Auth::Basic(_) => Some(self.challenge(need, origin, None)),
            Auth::Bearer { .. } => {
                let error = match given.split_once(' ') {
                    Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                        match self.tokens.lock().get(token.trim()) {
                            Some(known) if known.expires <= Instant::now() => "invalid_token",
                            Some(known) if need.granted_by(&known.scopes) => return None,
                            Some(_) => "insufficient_scope",
                            None => "invalid_token",
                        }
                    }
                    _ => return Some(self.challenge(need, origin, None)),
                };
                Some(self.challenge(need, origin, Some(error)))
            }
        }
    }

    /// The 401 of this kind of authentication.
    pub(crate) fn challenge(&self, need: Need<'_>, origin: &str, error: Option<&str>) -> Reply {
        match self.auth {
            Auth::None => Reply::error(
                StatusCode::UNAUTHORIZED,
                "UNAUTHORIZED",
                "authentication required",
            ),
            Auth::Basic(_) => unauthorized(r#"Basic realm="lab""#),
            Auth::Bearer { .. } => {
                let error = error
                    .map(|error| format!(r#",error="{error}""#))
                    .unwrap_or_default();
                let scope = need
                    .scope()
                    .map(|scope| format!(r#",scope="{scope}""#))
                    .unwrap_or_default();
                unauthorized(&format!(
                    r#"Bearer realm="{origin}/token",service="lab"{scope}{error}"#
                ))
            }
        }
    }

    /// Answers `/token`: GET with basic credentials, or POST with an OAuth2 password form.
    pub(crate) fn token(&self, headers: &HeaderMap, query: &Query, form: Option<&Query>) -> Reply {
        self.token_requests.fetch_add(1, Ordering::Relaxed);
        let Auth::Bearer {
            credentials,
            expires_in,
        } = &self.auth
        else {
            return Reply::error(
                StatusCode::NOT_FOUND,
                "UNSUPPORTED",
                "tokens are not in use",
            );
        };
        let given = match form {
            Some(form) => Some(Credentials {
                user: form.first("username").unwrap_or_default().to_owned(),
                password: form.first("password").unwrap_or_default().to_owned(),
            }),
            None => headers
                .get(header::AUTHORIZATION)
                .and_then(|value| value.to_str().ok())
                .and_then(basic),
        };
        if credentials.is_some() && given != *credentials {
            return unauthorized(r#"Basic realm="lab""#);
        }
        let scopes = form
            .unwrap_or(query)
            .all("scope")
            .flat_map(|scopes| scopes.split_whitespace())
            .map(str::to_owned)
            .collect();
        let id = self.ids.next();
        let now = Instant::now();
        let mut tokens = self.tokens.lock();
        tokens.retain(|_, token| token.expires > now);
        tokens.insert(
            id.clone(),
            Token {
                expires: now + *expires_in,
                scopes,
            },
        );
        drop(tokens);
        let seconds = expires_in.as_secs() + u64::from(expires_in.subsec_nanos() > 0);
        Reply::json(
            StatusCode::OK,
            &json!({"token": id, "access_token": id, "expires_in": seconds}),
        )
    }
}

fn basic(authorization: &str) -> Option<Credentials> {
    let (scheme, encoded) = authorization.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Credentials {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

fn unauthorized(challenge: &str) -> Reply {
    Reply::error(
        StatusCode::UNAUTHORIZED,
        "UNAUTHORIZED",
        "authentication required",
    )
    .header(header::WWW_AUTHENTICATE, challenge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_grant_actions_on_their_repository() {
        let scopes = ["repository:a/b:pull,push".to_owned()];
        assert!(Need::Pull("a/b").granted_by(&scopes));
        assert!(Need::Push("a/b").granted_by(&scopes));
        assert!(!Need::Delete("a/b").granted_by(&scopes));
        assert!(!Need::Pull("a").granted_by(&scopes));
        assert!(Need::Known.granted_by(&[]));
        assert!(Need::Delete("x").granted_by(&["repository:x:*".to_owned()]));
    }

    #[test]
    fn basic_headers() {
        let credentials = Credentials {
            user: "u".into(),
            password: "p:q".into(),
        };
        assert_eq!(basic("Basic dTpwOnE="), Some(credentials));
        for bad in ["", "Basic", "Basic !!", "Bearer dTpw", "Basic dXA="] {
            assert_eq!(basic(bad), None, "{bad}");
        }
    }
}
