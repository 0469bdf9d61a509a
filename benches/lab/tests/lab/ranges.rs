//! Ranges over the network.

use std::sync::Arc;

use formats::digest::Digest;
use tokio::task::JoinSet;

use crate::client::{Client, Fixture, get, noise};

const SIZE: usize = 1_000_003;

async fn fixture() -> (Fixture, String, Vec<u8>) {
    let fixture = Fixture::plain().await;
    let bytes = noise(SIZE);
    let digest = fixture.lab.push_blob("r", &bytes).unwrap();
    (fixture, format!("/v2/r/blobs/{digest}"), bytes)
}

#[tokio::test]
async fn single_ranges_give_exactly_what_they_say() {
    let (fixture, path, bytes) = fixture().await;
    let mut client = Client::connect(&fixture.lab).await;
    for (range, from, to) in [
        ("0-0", 0, 1),
        ("0-1023", 0, 1024),
        ("262143-262144", 262_143, 262_145),
        ("5-", 5, SIZE),
        ("-512", SIZE - 512, SIZE),
        ("-99999999", 0, SIZE),
        ("999999-99999999", 999_999, SIZE),
        ("0-18446744073709551615", 0, SIZE),
    ] {
        let range = format!("bytes={range}");
        // If-Range is ignored: blobs never change.
        let headers = [("range", range.as_str()), ("if-range", "\"other\"")];
        let answer = client.get(&path, &headers).await;
        assert_eq!(answer.status, 206, "{range}");
        assert!(answer.body == bytes[from..to], "{range}");
        assert_eq!(
            answer.header("content-range"),
            format!("bytes {from}-{}/{SIZE}", to - 1)
        );
        assert_eq!(answer.header("content-length"), (to - from).to_string());
        assert_eq!(answer.header("accept-ranges"), "bytes");
        assert_eq!(answer.header("content-type"), "application/octet-stream");
    }
}

#[tokio::test]
async fn unsatisfiable_ranges_leave_the_connection_usable() {
    let (fixture, path, _) = fixture().await;
    let mut client = Client::connect(&fixture.lab).await;
    for range in ["1000003-", "1000003-1000005", "-0", "9-8", "nonsense"] {
        let answer = client
            .get(&path, &[("range", &format!("bytes={range}"))])
            .await;
        assert_eq!(answer.status, 416, "{range}");
        assert_eq!(answer.header("content-range"), format!("bytes */{SIZE}"));
        assert_eq!(
            answer.header("content-length"),
            answer.body.len().to_string()
        );
    }
    let other_unit = client.get(&path, &[("range", "lines=1-2")]).await;
    assert_eq!(
        (other_unit.status.as_u16(), other_unit.body.len()),
        (200, SIZE)
    );
}

#[tokio::test]
async fn an_empty_blob_has_no_ranges() {
    let (fixture, ..) = fixture().await;
    let digest = fixture.lab.push_blob("r", b"").unwrap();
    let path = format!("/v2/r/blobs/{digest}");
    let whole = get(&fixture.lab, &path, &[]).await;
    assert_eq!(
        (whole.status.as_u16(), whole.header("content-length")),
        (200, "0")
    );
    let range = get(&fixture.lab, &path, &[("range", "bytes=0-")]).await;
    assert_eq!(
        (range.status.as_u16(), range.header("content-range")),
        (416, "bytes */0")
    );
}

#[tokio::test]
async fn several_ranges_come_as_parts() {
    let (fixture, path, bytes) = fixture().await;
    let headers = [("range", "bytes=0-9,500000-800000,-1")];
    let answer = get(&fixture.lab, &path, &headers).await;
    assert_eq!(answer.status, 206);
    assert_eq!(
        answer.header("content-length"),
        answer.body.len().to_string()
    );
    let boundary = answer
        .header("content-type")
        .strip_prefix("multipart/byteranges; boundary=")
        .unwrap();
    let mut expected = Vec::new();
    for (at, (from, to)) in [(0, 10), (500_000, 800_001), (SIZE - 1, SIZE)]
        .iter()
        .enumerate()
    {
        let lead = if at == 0 { "" } else { "\r\n" };
        expected.extend_from_slice(
            format!(
                "{lead}--{boundary}\r\nContent-Type: application/octet-stream\r\n\
                 Content-Range: bytes {from}-{}/{SIZE}\r\n\r\n",
                to - 1
            )
            .as_bytes(),
        );
        expected.extend_from_slice(&bytes[*from..*to]);
    }
    expected.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    assert!(answer.body == expected);

    let whole = get(&fixture.lab, &path, &[("range", "bytes=0-,0-")]).await;
    assert_eq!((whole.status.as_u16(), whole.body.len()), (200, SIZE));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_stay_apart() {
    let (fixture, path, bytes) = fixture().await;
    let bytes = Arc::new(bytes);
    let mut tasks = JoinSet::new();
    for task in 0..64_usize {
        let (handle, path, bytes) = ((*fixture.lab).clone(), path.clone(), bytes.clone());
        tasks.spawn(async move {
            let mut client = Client::connect(&handle).await;
            for round in 0..10_usize {
                let from = (task * 15_013 + round * 77_777) % (SIZE - 1);
                let to = (from + 1 + round * 40_009).min(SIZE);
                let range = format!("bytes={from}-{}", to - 1);
                let answer = client.get(&path, &[("range", &range)]).await;
                assert_eq!(answer.status, 206);
                assert_eq!(Digest::of(&answer.body), Digest::of(&bytes[from..to]));
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let totals = fixture.lab.log().totals();
    assert_eq!(
        (totals.blob_requests, totals.connections, totals.failed),
        (640, 64, 0)
    );
}
