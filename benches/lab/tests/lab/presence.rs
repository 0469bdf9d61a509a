//! Being gone and coming back.

use std::io::ErrorKind;

use http::Method;

use crate::client::{Client, Fixture, get, noise};

#[tokio::test]
async fn a_gone_registry_refuses_and_cuts_and_comes_back() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let digest = lab.push_blob("r", &noise(1000)).unwrap();
    let path = format!("/v2/r/blobs/{digest}");
    let mut idle = Client::connect(lab).await;
    assert_eq!(idle.get(&path, &[]).await.status, 200);
    let rule = lab.stall(digest);
    let mut held = Client::connect(lab).await;
    let held_path = path.clone();
    let held = tokio::spawn(async move { held.send(Method::GET, &held_path, &[], "").await });
    lab.rules().wait_held(rule, 1).await;

    lab.gone().await;
    lab.gone().await;
    for addr in [lab.addr(), lab.storage_addr()] {
        let refused = Client::try_connect(addr).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    assert!(idle.send(Method::GET, &path, &[], "").await.is_err());
    assert!(held.await.unwrap().is_err());

    lab.back().await;
    lab.release(rule);
    assert_eq!(get(lab, &path, &[]).await.status, 200);
}

#[tokio::test]
async fn another_process_can_take_it_away_for_a_while() {
    let fixture = Fixture::plain().await;
    let lab = &fixture.lab;
    let mut admin = Client::try_connect(lab.admin_addr().unwrap())
        .await
        .unwrap();
    let gone = admin
        .send(Method::POST, "/_lab/gone", &[], "")
        .await
        .unwrap();
    assert_eq!(gone.status, 204);
    assert!(Client::try_connect(lab.addr()).await.is_err());
    let back = admin
        .send(Method::POST, "/_lab/back", &[], "")
        .await
        .unwrap();
    assert_eq!(back.status, 204);
    assert_eq!(get(lab, "/v2/", &[]).await.status, 200);
    let body = r#"{"for_ms":1}"#;
    admin
        .send(Method::POST, "/_lab/gone", &[], body)
        .await
        .unwrap();
    loop {
        match Client::try_connect(lab.addr()).await {
            Ok(mut client) => {
                assert_eq!(client.get("/v2/", &[]).await.status, 200);
                break;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stopping_does_not_wait_for_held_requests() {
    let fixture = Fixture::plain().await;
    let digest = fixture.lab.push_blob("r", b"x").unwrap();
    let rule = fixture.lab.stall(digest);
    let mut client = Client::connect(&fixture.lab).await;
    let path = format!("/v2/r/blobs/{digest}");
    let held = tokio::spawn(async move { client.send(Method::GET, &path, &[], "").await });
    fixture.lab.rules().wait_held(rule, 1).await;
    fixture.lab.stop().await;
    assert!(held.await.unwrap().is_err());
}

#[tokio::test]
async fn a_shaped_link_changes_no_byte() {
    let fixture = Fixture::new(|options| {
        options.link = Some("2gbit,1ms".parse().unwrap());
    })
    .await;
    let lab = &fixture.lab;
    let bytes = noise(2_000_000);
    let digest = lab.push_blob("r", &bytes).unwrap();
    let path = format!("/v2/r/blobs/{digest}");
    let mut client = Client::connect(lab).await;
    assert!(client.get(&path, &[]).await.body == bytes);
    let part = client.get(&path, &[("range", "bytes=5-1000004")]).await;
    assert!(part.body == bytes[5..1_000_005]);
    // A line keeps no reply from being counted, and none is early: one round trip at least.
    for entry in lab.log().entries() {
        assert!(entry.first_byte_ms.unwrap() >= 1.0, "{entry:?}");
    }
}
