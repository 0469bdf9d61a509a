//! The exchange of credentials for a bearer token.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};
use http_body_util::{BodyExt as _, Empty, Full};
use serde_json::Value;

use super::{
    auth::{Asker, basic},
    backoff::retry_after,
    body::{BodyError, ReplyBody, error_message},
    credentials::{Credential, Secret},
    error::{Object, RegistryError, Target},
    hosts::{is_loopback, split_port},
    redirect,
    stats::add,
    transport::RequestBody,
};

const CLIENT_ID: &str = "snapshotterd";
const MAX_REPLY_BYTES: usize = 256 << 10;
const MAX_REDIRECTS: usize = 3;
/// How long a token lasts that does not say so; the protocol's own default.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
const LONGEST_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// What is asked of a token server.
pub(super) struct TokenRequest<'a> {
    pub(super) realm: &'a str,
    pub(super) service: Option<&'a str>,
    pub(super) scopes: &'a [String],
    pub(super) credential: Option<&'a Credential>,
    /// What to do when it is refused.
    pub(super) advice: &'a str,
}

/// A bearer token and for how long to use it.
pub(super) struct Token {
    pub(super) text: Secret,
    pub(super) lifetime: Duration,
}

/// Gets a token; transient failures are retried.
pub(super) async fn fetch_token(
    asker: &Asker<'_>,
    request: &TokenRequest<'_>,
) -> Result<Token, RegistryError> {
    let target = Arc::new(Target {
        repository: asker.target.repository.clone(),
        object: Object::Token(request.scopes.join(" ")),
    });
    let exchange = Exchange {
        asker,
        request,
        realm: realm(asker, request, &target)?,
        target,
    };
    let mut retry = 0;
    loop {
        match exchange.run().await {
            Err(error) if error.is_transient() && retry < asker.policy.retries => {
                let pause = asker.policy.pause(retry);
                let asked = error.retry_after().unwrap_or(Duration::ZERO);
                let pause = pause.max(asked.min(asker.policy.longest_retry_after));
                tracing::debug!(error = %error.report(), ?pause, "retrying a token request");
                tokio::time::sleep(pause).await;
                retry += 1;
            }
            result => return result,
        }
    }
}

/// The URL of the token server. A password goes to no server that others can listen to, unless
/// the registry itself is such a one.
fn realm(
    asker: &Asker<'_>,
    request: &TokenRequest<'_>,
    target: &Arc<Target>,
) -> Result<Uri, RegistryError> {
    let bad = |problem: &str| RegistryError::Protocol {
        target: Arc::clone(target),
        host: asker.endpoint.authority().to_owned(),
        problem: format!(
            "names a token server that {problem}: {:.200}",
            request.realm
        ),
    };
    let uri: Uri = request.realm.parse().map_err(|_| bad("is not a URL"))?;
    let Some(authority) = uri.authority() else {
        return Err(bad("is not a URL"));
    };
    let (host, _) = split_port(authority.as_str());
    match uri.scheme_str() {
        Some("https") => {}
        Some("http")
            if request.credential.is_none()
                || is_loopback(host)
                || asker.endpoint.url().scheme_str() == Some("http") => {}
        Some("http") => {
            return Err(bad("takes credentials over plain HTTP, which are not sent"));
        }
        _ => return Err(bad("is neither http nor https")),
    }
    Ok(uri)
}

struct Exchange<'a> {
    asker: &'a Asker<'a>,
    request: &'a TokenRequest<'a>,
    realm: Uri,
    target: Arc<Target>,
}

impl Exchange<'_> {
    async fn run(&self) -> Result<Token, RegistryError> {
        if let Some(Credential::IdentityToken(token)) = self.request.credential {
            let form = [
                ("grant_type", "refresh_token"),
                ("refresh_token", token.reveal()),
            ];
            return self.post(&form).await;
        }
        let got = self.get().await;
        match (&got, self.request.credential) {
            // Some servers speak only the newer protocol.
            (Err(error), Some(Credential::Basic { username, password }))
                if matches!(error.status(), Some(404 | 405)) =>
            {
                let form = [
                    ("grant_type", "password"),
                    ("username", username.as_str()),
                    ("password", password.reveal()),
                ];
                self.post(&form).await
            }
            _ => got,
        }
    }

    async fn get(&self) -> Result<Token, RegistryError> {
        let mut query = Vec::new();
        if let Some(service) = self.request.service {
            query.push(("service", service));
        }
        query.extend(
            self.request
                .scopes
                .iter()
                .map(|scope| ("scope", scope.as_str())),
        );
        let authorization = match self.request.credential {
            Some(Credential::Basic { username, password }) => {
                query.push(("client_id", CLIENT_ID));
                query.push(("account", username));
                Some(basic(username, password.reveal()))
            }
            _ => None,
        };
        let query = encode_form(&query);
        let text = self.realm.to_string();
        let separator = match text.split_once('?') {
            None => "?",
            Some((_, rest)) if rest.is_empty() || rest.ends_with('&') => "",
            Some(_) => "&",
        };
        let url = if query.is_empty() {
            text
        } else {
            format!("{text}{separator}{query}")
        };
        let mut url: Uri = url.parse().map_err(|_| self.protocol("has no valid URL"))?;
        for _ in 0..=MAX_REDIRECTS {
            let mut builder = Request::builder().method(Method::GET).uri(&url);
            let same_origin = redirect::same_origin(&url, &self.realm);
            if let Some(authorization) = authorization.as_ref().filter(|_| same_origin) {
                let value = sensitive(authorization)
                    .ok_or_else(|| self.protocol("wants credentials that no header can hold"))?;
                builder = builder.header(AUTHORIZATION, value);
            }
            let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
            match self.send(builder, body).await? {
                Sent::Token(token) => return Ok(token),
                Sent::Redirect(next) => url = next,
            }
        }
        Err(self.protocol("sent too many redirects"))
    }

    async fn post(&self, grant: &[(&str, &str)]) -> Result<Token, RegistryError> {
        let scope = self.request.scopes.join(" ");
        let mut form = grant.to_vec();
        form.push(("client_id", CLIENT_ID));
        form.push(("service", self.request.service.unwrap_or("")));
        if !scope.is_empty() {
            form.push(("scope", &scope));
        }
        let body = Full::new(Bytes::from(encode_form(&form)));
        let builder = Request::builder()
            .method(Method::POST)
            .uri(&self.realm)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        let body = body.map_err(|never| match never {}).boxed_unsync();
        match self.send(builder, body).await? {
            Sent::Token(token) => Ok(token),
            Sent::Redirect(_) => Err(self.protocol("answered a POST with a redirect")),
        }
    }

    async fn send(
        &self,
        mut builder: http::request::Builder,
        body: RequestBody,
    ) -> Result<Sent, RegistryError> {
        let endpoint = self.asker.endpoint;
        if let Some(headers) = builder.headers_mut() {
            endpoint.add_client_headers(headers);
            headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        }
        let request = builder
            .body(body)
            .map_err(|_| self.protocol("cannot be asked"))?;
        let url = request.uri().clone();
        add(&self.asker.counters.token_requests, 1);
        let reply = self
            .asker
            .transport
            .send(request, endpoint.tls(), endpoint.dial_timeout(), None)
            .await
            .map_err(|error| {
                error.into_registry_error(&self.target, self.host(), &endpoint.config())
            })?;
        let status = reply.status();
        if status.is_redirection() {
            let next = redirect::location(&url, reply.headers());
            return next.map(Sent::Redirect).map_err(|why| self.protocol(&why));
        }
        if !status.is_success() {
            let retry_after = retry_after(reply.headers(), std::time::SystemTime::now());
            let message = error_message(reply).await;
            return Err(self.refused(status.as_u16(), message, retry_after));
        }
        let body = ReplyBody::new(
            reply.into_body(),
            self.asker.transport.stall_timeout(),
            None,
        );
        let body = body
            .collect(MAX_REPLY_BYTES)
            .await
            .map_err(|error| match error {
                BodyError::Stalled(waited) => RegistryError::Stalled {
                    target: Arc::clone(&self.target),
                    host: self.host().to_owned(),
                    waited,
                },
                BodyError::Broken(error) => RegistryError::Broken {
                    target: Arc::clone(&self.target),
                    host: self.host().to_owned(),
                    source: Arc::new(error),
                },
                BodyError::TooLong(_) => self.protocol("sent a token reply that is too long"),
            })?;
        parse_reply(&body)
            .map(Sent::Token)
            .ok_or_else(|| self.protocol("sent a reply without a token"))
    }

    fn host(&self) -> &str {
        self.realm
            .authority()
            .map_or("", |authority| authority.as_str())
    }

    fn protocol(&self, problem: &str) -> RegistryError {
        RegistryError::Protocol {
            target: Arc::clone(&self.target),
            host: self.host().to_owned(),
            problem: problem.to_owned(),
        }
    }

    fn refused(
        &self,
        status: u16,
        message: String,
        retry_after: Option<Duration>,
    ) -> RegistryError {
        let (target, host) = (Arc::clone(&self.target), self.host().to_owned());
        match status {
            // Servers with OAuth answer 400 to a refresh token that is not valid any more.
            400 | 401 | 403 => RegistryError::Denied {
                advice: format!("{host} gives no token; {}", self.request.advice),
                target,
                host,
                status,
                message,
            },
            status => RegistryError::Status {
                target,
                host,
                status,
                message,
                retry_after,
            },
        }
    }
}

enum Sent {
    Token(Token),
    Redirect(Uri),
}

fn sensitive(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

pub(super) fn parse_reply(body: &[u8]) -> Option<Token> {
    let json: Value = serde_json::from_slice(body).ok()?;
    let text = ["access_token", "token"].iter().find_map(|name| {
        json.get(*name)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    })?;
    let stated = json.get("expires_in").and_then(|value| match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    });
    let lifetime = stated
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|lifetime| !lifetime.is_zero())
        .unwrap_or(DEFAULT_LIFETIME)
        .min(LONGEST_LIFETIME);
    Some(Token {
        text: Secret::new(text),
        // Gone a little before the server thinks so.
        lifetime: lifetime / 10 * 9,
    })
}

/// `name=value&…` with everything escaped that could be misread.
pub(super) fn encode_form(pairs: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (name, value) in pairs {
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(name);
        out.push('=');
        out.push_str(&encode_form_value(value));
    }
    out
}

/// A value for a query or form.
pub(super) fn encode_form_value(value: &str) -> String {
    let mut out = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:/,".contains(&byte) {
            out.push(char::from(byte));
        } else {
            use std::fmt::Write as _;
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_token_servers() {
        let parse = |text: &str| parse_reply(text.as_bytes());
        let token = parse(r#"{"token":"a","expires_in":300,"issued_at":"x"}"#).unwrap();
        assert_eq!(token.text.reveal(), "a");
        assert_eq!(token.lifetime, Duration::from_secs(270));
        let token = parse(r#"{"token":"a","access_token":"b","expires_in":"100"}"#).unwrap();
        assert_eq!(token.text.reveal(), "b");
        assert_eq!(token.lifetime, Duration::from_secs(90));
        for (text, seconds) in [
            (r#"{"token":"a"}"#, 54),
            (r#"{"token":"a","expires_in":0}"#, 54),
            (r#"{"token":"a","expires_in":-5}"#, 54),
            (r#"{"token":"a","expires_in":1e300}"#, 54),
            (r#"{"token":"a","expires_in":99999999999}"#, 77_760),
        ] {
            assert_eq!(parse(text).unwrap().lifetime.as_secs(), seconds, "{text}");
        }
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"token":""}"#,
            r#"{"token":5}"#,
            "<html>",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn forms_are_escaped() {
        let form = encode_form(&[("scope", "repository:a/b:pull,push"), ("p", "a&b=c d+é%")]);
        assert_eq!(
            form,
            "scope=repository:a/b:pull,push&p=a%26b%3Dc%20d%2B%C3%A9%25"
        );
        assert_eq!(encode_form(&[]), "");
    }
}
