use std::io::Write as _;

use super::*;

fn body(range: Range<u64>, chunks: Vec<&'static [u8]>) -> RangeBody {
    let chunks = chunks
        .into_iter()
        .map(|chunk| Ok(Bytes::from_static(chunk)));
    RangeBody::new(
        "test".into(),
        range,
        Arc::default(),
        stream::iter(chunks).boxed(),
    )
}

#[tokio::test]
async fn a_body_delivers_exactly_what_it_announced() {
    let mut exact = body(4..10, vec![b"ab", b"", b"cdef"]);
    assert_eq!(exact.next_chunk().await.unwrap().unwrap(), "ab");
    assert_eq!(exact.position(), 6);
    assert_eq!(exact.next_chunk().await.unwrap().unwrap(), "cdef");
    assert!(exact.next_chunk().await.unwrap().is_none());

    let mut short = body(4..10, vec![b"ab"]);
    short.next_chunk().await.unwrap();
    let error = short.next_chunk().await.unwrap_err();
    assert!(
        matches!(error, FetchError::Length { reached: 6, .. }),
        "{error}"
    );
    assert!(short.next_chunk().await.is_err(), "the error stays");

    let mut long = body(4..10, vec![b"abcdefg"]);
    let error = long.next_chunk().await.unwrap_err();
    assert!(
        matches!(error, FetchError::Length { reached: 11, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn collect_cuts_the_wanted_part_out() {
    let chunks = || vec![&b"abc"[..], b"def", b"ghi"];
    assert_eq!(
        body(10..19, chunks()).collect(12..16).await.unwrap(),
        "cdef"
    );
    assert_eq!(
        body(10..19, chunks()).collect(10..19).await.unwrap(),
        "abcdefghi"
    );
    assert_eq!(body(10..19, chunks()).collect(13..15).await.unwrap(), "de");
    assert!(body(10..19, chunks()).collect(9..12).await.is_err());
    assert!(body(10..19, chunks()).collect(12..20).await.is_err());
}

#[tokio::test]
async fn files_and_memory_are_sources() {
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&data).unwrap();
    let file = FileSource::open(file.path()).unwrap();
    let memory = MemorySource::new("memory", data.clone());
    let sources: [&dyn RangeSource; 2] = [&file, &memory];
    for source in sources {
        assert_eq!(source.len(), 3_000_000);
        for range in [
            0..1,
            0..3_000_000,
            1_048_575..2_500_000,
            2_999_999..3_000_000,
        ] {
            let body = source.fetch(range.clone(), Cause::Demand).await.unwrap();
            assert_eq!(body.range(), range);
            let got = body.collect(range.clone()).await.unwrap();
            let index = |offset: u64| usize::try_from(offset).unwrap();
            let expected = &data[index(range.start)..index(range.end)];
            assert!(got == expected, "{range:?} of {}", source.origin());
        }
        #[expect(clippy::reversed_empty_ranges, reason = "what is tested")]
        for range in [5..5, 6..5, 0..3_000_001, u64::MAX - 1..u64::MAX] {
            let error = source.fetch(range, Cause::Demand).await.unwrap_err();
            assert!(matches!(error, FetchError::OutOfBounds { .. }), "{error}");
            assert!(!error.is_transient());
        }
    }
}

#[tokio::test]
async fn a_file_that_shrinks_is_an_error_with_its_cause() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(100).unwrap();
    let source = FileSource::open(file.path()).unwrap();
    file.as_file().set_len(50).unwrap();
    let mut body = source.fetch(0..100, Cause::Hydration).await.unwrap();
    let error = body.next_chunk().await.unwrap_err();
    assert_eq!(error.failure(), FetchFailure::Local);
    assert!(
        error.report().contains("failed to fill"),
        "{}",
        error.report()
    );
}

#[tokio::test]
async fn whole_blobs_are_checked_against_their_digest() {
    let open = |bytes: &'static [u8], digest| async move {
        let source = MemorySource::new("memory", bytes);
        let body = VerifiedBody::open(&source, digest, Cause::Metadata).await;
        body.unwrap()
    };
    let right = Digest::of(b"some bytes");
    let got = open(b"some bytes", right).await.collect().await.unwrap();
    assert_eq!(got, "some bytes");
    let empty = open(b"", Digest::of(b"")).await.collect().await.unwrap();
    assert!(empty.is_empty());
    for bytes in [&b"some bytes!"[..], b"Some bytes", b""] {
        let mut body = open(bytes, right).await;
        let error = loop {
            match body.next_chunk().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{bytes:?} passed"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, FetchError::Digest { .. }), "{error}");
        assert!(body.next_chunk().await.is_err(), "the error stays");
    }
}
