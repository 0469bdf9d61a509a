//! Scripted faults, in process and over HTTP.

use formats::digest::Digest;
use http::Method;
use lab::{Action, Match, RequestKind, Rule, RuleId};
use serde_json::json;

use crate::client::{Client, Fixture, get, noise, request};

const SIZE: usize = 600_000;

struct Blob {
    fixture: Fixture,
    digest: Digest,
    path: String,
    bytes: Vec<u8>,
}

impl Blob {
    async fn new() -> Self {
        let fixture = Fixture::plain().await;
        let bytes = noise(SIZE);
        let digest = fixture.lab.push_blob("r", &bytes).unwrap();
        Self {
            fixture,
            digest,
            path: format!("/v2/r/blobs/{digest}"),
            bytes,
        }
    }

    fn rule(&self, action: Action) -> Rule {
        Rule::new(Match::blob(self.digest), action)
    }

    fn add(&self, action: Action) -> RuleId {
        self.fixture.lab.rules().add(self.rule(action))
    }
}

#[tokio::test]
async fn a_stalled_blob_holds_only_its_own_requests() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let other = lab.push_blob("r", b"other").unwrap();
    let rule = lab.stall(blob.digest);
    let (handle, path) = ((**lab).clone(), blob.path.clone());
    let held = tokio::spawn(async move { get(&handle, &path, &[]).await });
    lab.rules().wait_held(rule, 1).await;
    assert_eq!(
        get(lab, &format!("/v2/r/blobs/{other}"), &[]).await.body,
        "other"
    );
    assert_eq!(lab.log().blob_bytes(&blob.digest), 0);
    assert!(!held.is_finished());
    assert!(lab.release(rule));
    assert!(held.await.unwrap().body == blob.bytes);
}

#[tokio::test]
async fn a_body_stalls_where_it_is_told_to() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let rule = blob.add(Action::Stall {
        after: Some(300_001),
    });
    let (handle, path) = ((**lab).clone(), blob.path.clone());
    let held = tokio::spawn(async move { get(&handle, &path, &[]).await });
    lab.rules().wait_held(rule, 1).await;
    assert_eq!(lab.log().blob_bytes(&blob.digest), 300_001);
    lab.rules().clear();
    assert!(held.await.unwrap().body == blob.bytes);
}

#[tokio::test]
async fn a_client_that_gives_up_is_no_longer_held() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let rule = lab.stall(blob.digest);
    let (handle, path) = ((**lab).clone(), blob.path.clone());
    let held = tokio::spawn(async move { get(&handle, &path, &[]).await });
    lab.rules().wait_held(rule, 1).await;
    held.abort();
    lab.log()
        .wait_until(|entries| entries[0].duration_ms.is_some())
        .await;
    assert_eq!(lab.rules().state(rule).unwrap().held, 0);
    assert_eq!(lab.log().entries()[0].status, None);
}

#[tokio::test]
async fn bodies_are_cut_bent_and_mislabelled() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    for after in [0, 1, 299_999, SIZE - 1] {
        let rule = blob.add(Action::Truncate {
            after: after as u64,
        });
        let answer = get(lab, &blob.path, &[]).await;
        assert_eq!(answer.header("content-length"), SIZE.to_string());
        assert!(answer.cut && answer.body == blob.bytes[..after], "{after}");
        lab.release(rule);
    }

    // A reset may overtake what was sent before it, so less may arrive.
    let rule = blob.add(Action::Reset { after: 300_000 });
    let answer = get(lab, &blob.path, &[]).await;
    assert!(answer.cut && blob.bytes[..300_000].starts_with(&answer.body));
    lab.rules().remove(rule);

    let rule = blob.add(Action::Flip {
        at: 300_000,
        len: 2,
    });
    let answer = get(lab, &blob.path, &[("range", "bytes=299999-300002")]).await;
    let good = &blob.bytes[299_999..300_003];
    assert_eq!(&answer.body[..], [good[0], !good[1], !good[2], good[3]]);
    let answer = get(lab, &blob.path, &[]).await;
    let wrong: Vec<_> = (0..SIZE)
        .filter(|&i| answer.body[i] != blob.bytes[i])
        .collect();
    assert_eq!(wrong, [300_000, 300_001]);
    lab.release(rule);

    let rule = blob.add(Action::ShiftContentRange { by: 7 });
    let answer = get(lab, &blob.path, &[("range", "bytes=10-19")]).await;
    assert_eq!(
        answer.header("content-range"),
        format!("bytes 17-26/{SIZE}")
    );
    assert!(answer.body == blob.bytes[10..20]);
    lab.release(rule);

    let rule = blob.add(Action::IgnoreRange);
    let answer = get(lab, &blob.path, &[("range", "bytes=10-19")]).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (200, SIZE));
    lab.release(rule);

    let rule = blob.add(Action::Trickle {
        bytes_per_s: 1_000_000,
    });
    let answer = get(lab, &blob.path, &[("range", "bytes=0-99999")]).await;
    assert!(answer.body == blob.bytes[..100_000]);
    assert_eq!(lab.rules().state(rule).unwrap().acted, 1);
}

#[tokio::test]
async fn answers_in_the_registrys_place_are_counted() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let status = |status, retry_after: Option<&str>| Action::Status {
        status,
        retry_after: retry_after.map(str::to_owned),
    };
    lab.rules().add(blob.rule(status(503, None)).times(2));
    lab.rules().add(blob.rule(status(429, Some("7"))).nth(3));
    lab.rules().add(blob.rule(status(404, None)).nth(4));
    lab.rules().add(blob.rule(Action::Close).nth(5));
    let mut client = Client::connect(lab).await;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let answer = client.get(&blob.path, &[]).await;
        seen.push((
            answer.status.as_u16(),
            answer.header("retry-after").to_owned(),
        ));
    }
    let plain = String::new;
    assert_eq!(
        seen,
        [
            (503, plain()),
            (503, plain()),
            (429, "7".into()),
            (404, plain())
        ]
    );
    assert!(client.send(Method::GET, &blob.path, &[], "").await.is_err());
    assert!(get(lab, &blob.path, &[]).await.body == blob.bytes);
    let statuses: Vec<_> = lab.log().entries().iter().map(|e| e.status).collect();
    assert_eq!(
        statuses,
        [Some(503), Some(503), Some(429), Some(404), None, Some(200)]
    );
}

#[tokio::test]
async fn rules_speak_of_places_in_a_blob() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    lab.rules().add(Rule::new(
        Match::blob(blob.digest).bytes(1000..2000),
        Action::Status {
            status: 500,
            retry_after: None,
        },
    ));
    for (range, status) in [
        ("bytes=0-999", 206),
        ("bytes=999-1000", 500),
        ("bytes=2000-", 206),
        ("bytes=-599000", 500),
    ] {
        let answer = get(lab, &blob.path, &[("range", range)]).await;
        assert_eq!(answer.status, status, "{range}");
    }
}

#[tokio::test]
async fn redirects_lead_to_a_signed_address_that_expires() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let local = ("host", "127.0.0.1:1");
    let rule = blob.add(Action::Redirect { expires_ms: 60_000 });
    let answer = get(lab, &blob.path, &[local, ("range", "bytes=1-2")]).await;
    assert_eq!(answer.status, 307);
    assert!(answer.body.is_empty());
    let location = answer.header("location").to_owned();
    let prefix = format!("http://lab.test:{}", lab.storage_addr().port());
    let path = location.strip_prefix(&prefix).unwrap();
    let head = request(lab, Method::HEAD, &blob.path, &[], "").await;
    assert_eq!(head.status, 200, "only GETs are redirected");

    let mut storage = Client::try_connect(lab.storage_addr()).await.unwrap();
    let part = storage.get(path, &[("range", "bytes=1-2")]).await;
    assert_eq!(
        (part.status.as_u16(), &part.body[..]),
        (206, &blob.bytes[1..3])
    );
    let forged = path.replace("expires=", "expires=9");
    assert_eq!(storage.get(&forged, &[]).await.status, 403);
    assert_eq!(storage.get("/v2/", &[]).await.status, 404);
    lab.release(rule);
    blob.add(Action::Redirect { expires_ms: 0 });
    let answer = get(lab, &blob.path, &[]).await;
    let expired = answer.header("location").strip_prefix(&prefix).unwrap();
    assert_eq!(storage.get(expired, &[]).await.status, 403);
    let kinds: Vec<_> = lab.log().entries().iter().map(|entry| entry.kind).collect();
    assert_eq!(
        kinds.iter().filter(|k| **k == RequestKind::Storage).count(),
        3
    );
}

#[tokio::test]
async fn other_processes_control_it_over_http() {
    let blob = Blob::new().await;
    let lab = &blob.fixture.lab;
    let mut admin = Client::try_connect(lab.admin_addr().unwrap())
        .await
        .unwrap();
    let rule = json!({"match": {"digest": blob.digest}, "times": 1,
                      "action": {"do": "status", "status": 401}})
    .to_string();
    let added = admin
        .send(Method::POST, "/_lab/rules", &[], rule)
        .await
        .unwrap();
    assert_eq!(added.json(), json!({"id": 1}));
    let mark = admin
        .send(Method::POST, "/_lab/mark", &[], "")
        .await
        .unwrap();
    assert_eq!(get(lab, &blob.path, &[]).await.status, 401);
    assert_eq!(get(lab, &blob.path, &[]).await.status, 200);
    let rules = admin.get("/_lab/rules", &[]).await.json();
    assert_eq!(
        (&rules[0]["matched"], &rules[0]["acted"]),
        (&json!(2), &json!(1))
    );
    let totals = admin
        .send(Method::POST, "/_lab/totals", &[], mark.body)
        .await
        .unwrap()
        .json();
    assert_eq!(
        totals["blobs"][blob.digest.to_string()],
        json!({"requests": 2, "bytes": SIZE})
    );
    let log = admin.get("/_lab/log?since=1", &[]).await.json();
    assert_eq!(
        (log.as_array().unwrap().len(), &log[0]["status"]),
        (1, &json!(200))
    );

    let wan = admin
        .send(Method::PUT, "/_lab/link", &[], "\"wan\"")
        .await
        .unwrap();
    assert_eq!(
        (wan.status.as_u16(), lab.link()),
        (204, Some(lab::LinkModel::wan()))
    );
    let none = admin
        .send(Method::PUT, "/_lab/link", &[], "null")
        .await
        .unwrap();
    assert_eq!((none.status.as_u16(), lab.link()), (204, None));
    for (method, path, body, status) in [
        (Method::POST, "/_lab/rules", "{}", 400),
        (Method::PUT, "/_lab/link", "\"fast\"", 400),
        (Method::DELETE, "/_lab/rules/99", "", 404),
        (Method::DELETE, "/_lab/rules/1", "", 204),
        (Method::DELETE, "/_lab/rules", "", 204),
        (Method::GET, "/_lab/info", "", 200),
        (Method::GET, "/_lab/gone", "", 405),
        (Method::GET, "/_lab/nothing", "", 404),
    ] {
        let answer = admin.send(method, path, &[], body).await.unwrap();
        assert_eq!(answer.status, status, "{path}");
    }
    // The controls are at the registry's port too, except for those that would take it away.
    let gone = request(lab, Method::POST, "/_lab/gone", &[], "").await;
    assert_eq!(gone.status, 409);
    assert_eq!(
        get(lab, "/_lab/info", &[]).await.json()["url"],
        json!(lab.url())
    );
    assert_eq!(lab.log().totals().requests, 2, "controls are not logged");

    let closed = Fixture::new(|options| options.admin = None).await;
    assert_eq!(get(&closed.lab, "/_lab/info", &[]).await.status, 404);
}
