//! Basic and bearer authentication.

use std::time::Duration;

use http::Method;
use lab::{Action, Auth, Credentials, Lab, Match, Rule};

use crate::client::{Client, Fixture, get, request};

fn credentials() -> Credentials {
    Credentials {
        user: "user".into(),
        password: "secret".into(),
    }
}

/// `user:secret`
const BASIC: (&str, &str) = ("authorization", "Basic dXNlcjpzZWNyZXQ=");

fn bearer(credentials: Option<Credentials>, expires_in: Duration) -> Auth {
    Auth::Bearer {
        credentials,
        expires_in,
    }
}

async fn token(lab: &Lab, scope: &str, headers: &[(&str, &str)]) -> String {
    let path = format!("/token?service=lab&scope={scope}");
    let answer = get(lab, &path, headers).await;
    assert_eq!(answer.status, 200);
    format!("Bearer {}", answer.json()["token"].as_str().unwrap())
}

#[tokio::test]
async fn basic_wants_the_password() {
    let fixture = Fixture::new(|options| options.auth = Auth::Basic(credentials())).await;
    let lab = &fixture.lab;
    for headers in [&[][..], &[("authorization", "Basic dXNlcjp3cm9uZw==")]] {
        let answer = get(lab, "/v2/", headers).await;
        assert_eq!(answer.status, 401);
        assert_eq!(answer.header("www-authenticate"), "Basic realm=\"lab\"");
    }
    assert_eq!(get(lab, "/v2/", &[BASIC]).await.status, 200);
}

#[tokio::test]
async fn bearer_tokens_open_what_their_scope_says() {
    let life = Duration::from_millis(1500);
    let fixture = Fixture::new(|options| options.auth = bearer(Some(credentials()), life)).await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("a/b", b"blob").unwrap();
    let path = format!("/v2/a/b/blobs/{digest}");
    let challenge = get(lab, &path, &[]).await;
    assert_eq!(challenge.status, 401);
    assert_eq!(
        challenge.header("www-authenticate"),
        "Bearer realm=\"http://lab.test/token\",service=\"lab\",scope=\"repository:a/b:pull\""
    );
    assert_eq!(
        get(lab, "/token?scope=repository:a/b:pull", &[])
            .await
            .status,
        401
    );
    let reply = get(lab, "/token?scope=repository:a/b:pull", &[BASIC]).await;
    assert_eq!(reply.json()["expires_in"], 2);
    let pull = token(lab, "repository:a/b:pull", &[BASIC]).await;
    let pull = ("authorization", pull.as_str());
    assert_eq!(get(lab, &path, &[pull]).await.body, "blob");
    assert_eq!(get(lab, "/v2/", &[pull]).await.status, 200);
    let other = get(lab, &path.replace("a/b", "a/c"), &[pull]).await;
    assert_eq!(other.status, 401);
    assert!(
        other
            .header("www-authenticate")
            .ends_with(",error=\"insufficient_scope\"")
    );
    let upload = "/v2/a/b/blobs/uploads/";
    assert_eq!(
        request(lab, Method::POST, upload, &[pull], "").await.status,
        401
    );
    let push = token(lab, "repository:a/b:pull,push", &[BASIC]).await;
    let push = ("authorization", push.as_str());
    assert_eq!(
        request(lab, Method::POST, upload, &[push], "").await.status,
        202
    );

    // The OAuth2 form, with two scopes.
    let form = "grant_type=password&service=lab&username=user&password=secret\
                &scope=repository%3Aa%2Fb%3Apull+repository%3Ax%3Apull";
    let reply = request(lab, Method::POST, "/token", &[], form).await;
    let oauth = format!("Bearer {}", reply.json()["access_token"].as_str().unwrap());
    assert_eq!(
        get(lab, &path, &[("authorization", &oauth)]).await.status,
        200
    );
    let wrong = form.replace("secret", "guess");
    assert_eq!(
        request(lab, Method::POST, "/token", &[], wrong)
            .await
            .status,
        401
    );
    assert_eq!(lab.token_requests(), 6);
    assert_eq!(lab.log().totals().token_requests, 6);
}

#[tokio::test]
async fn tokens_expire_and_can_be_revoked() {
    let fixture = Fixture::new(|options| {
        options.auth = bearer(None, Duration::from_hours(1));
    })
    .await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("r", b"blob").unwrap();
    let path = format!("/v2/r/blobs/{digest}");
    let anonymous = token(lab, "repository:r:pull", &[]).await;
    let header = ("authorization", anonymous.as_str());
    assert_eq!(get(lab, &path, &[header]).await.status, 200);
    let rule = lab.rules().add(Rule::new(
        Match::blob(digest),
        Action::Status {
            status: 401,
            retry_after: None,
        },
    ));
    let scripted = get(lab, &path, &[header]).await;
    assert_eq!(scripted.status, 401);
    assert!(
        scripted
            .header("www-authenticate")
            .starts_with("Bearer realm=")
    );
    lab.release(rule);
    lab.revoke_tokens();
    let refused = get(lab, &path, &[header]).await;
    assert_eq!(refused.status, 401);
    assert!(
        refused
            .header("www-authenticate")
            .ends_with(",error=\"invalid_token\"")
    );

    let brief = Fixture::new(|options| options.auth = bearer(None, Duration::ZERO)).await;
    let expired = token(&brief.lab, "repository:r:pull", &[]).await;
    let header = ("authorization", expired.as_str());
    assert_eq!(get(&brief.lab, "/v2/", &[header]).await.status, 401);
}

#[tokio::test]
async fn redirected_requests_need_no_credentials() {
    let fixture = Fixture::new(|options| {
        options.auth = Auth::Basic(credentials());
        options.redirect = Some(Duration::from_mins(1));
    })
    .await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("r", b"blob").unwrap();
    let path = format!("/v2/r/blobs/{digest}");
    assert_eq!(get(lab, &path, &[]).await.status, 401);
    let answer = get(lab, &path, &[BASIC]).await;
    assert_eq!(answer.status, 307);
    let (_, rest) = answer.header("location").split_once("/storage/").unwrap();
    let mut storage = Client::try_connect(lab.storage_addr()).await.unwrap();
    let blob = storage.get(&format!("/storage/{rest}"), &[]).await;
    assert_eq!(blob.body, "blob");
    let entries = lab.log().entries();
    assert!(entries[1].authorization && !entries[2].authorization);
}
