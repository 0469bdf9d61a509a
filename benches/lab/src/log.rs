//! What was asked and what was sent: one record per request, counted while it is running.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    io::{self, Write},
    path::Path,
    sync::Arc,
    sync::OnceLock,
    sync::atomic::{AtomicU64, Ordering},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use formats::digest::Digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RequestKind {
    /// `/v2/`
    Base,
    /// `/token`
    Token,
    /// `/v2/<name>/manifests/…`
    Manifest,
    /// `/v2/<name>/blobs/…`
    Blob,
    /// A blob from the storage port, where redirects lead.
    Storage,
    /// `/v2/<name>/blobs/uploads/…`
    Upload,
    /// Tags, catalog, referrers.
    List,
    /// Anything else.
    Other,
}

/// One request. `duration_ms` is `None` while it is running.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LogEntry {
    /// Number of the request since the server started.
    pub index: u64,
    /// When it was read, in milliseconds since 1970.
    pub time_ms: f64,
    /// Number of the connection.
    pub connection: u64,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// What it is for.
    pub kind: RequestKind,
    /// The repository, if the path names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// The tag or digest of a manifest, as requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The digest, if the path names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// The `Range` header as sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<String>,
    /// Status of the reply; `None` until decided, or if the connection was closed instead.
    pub status: Option<u16>,
    /// Length the reply announced.
    pub length: u64,
    /// Body bytes handed to the connection.
    pub bytes: u64,
    /// All announced bytes were handed over.
    pub complete: bool,
    /// From reading the request to its first body byte.
    pub first_byte_ms: Option<f64>,
    /// From reading the request to the end of its body.
    pub duration_ms: Option<f64>,
    /// The `User-Agent` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
    /// The request carried an `Authorization` header.
    pub authorization: bool,
    /// Rules that acted on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<u64>,
}

/// A moment in the log; see [`Log::mark`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    next: u64,
    /// Requests that were running, with the bytes they had sent by then.
    running: BTreeMap<u64, u64>,
}

/// Sums over log entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Totals {
    /// All requests.
    pub requests: u64,
    /// Connections they came over.
    pub connections: u64,
    /// Token requests.
    pub token_requests: u64,
    /// Manifest requests.
    pub manifest_requests: u64,
    /// Requests for blobs, redirected ones counted at both ends.
    pub blob_requests: u64,
    /// Replies with status 4xx or 5xx.
    pub failed: u64,
    /// Body bytes of all replies.
    pub bytes: u64,
    /// Body bytes of successful blob replies.
    pub blob_bytes: u64,
    /// The same by blob.
    pub blobs: BTreeMap<Digest, BlobTotals>,
}

/// Sums over the requests for one blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlobTotals {
    /// Requests, whatever the answer.
    pub requests: u64,
    /// Body bytes of successful replies.
    pub bytes: u64,
}

/// The request log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    records: Mutex<Records>,
    keep: usize,
    file: Option<File>,
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Records {
    /// Index of the front record.
    first: u64,
    kept: VecDeque<Arc<Record>>,
}

impl Log {
    /// A log that remembers at least `keep` requests and appends finished ones to `file`.
    pub(crate) fn open(keep: usize, file: Option<&Path>) -> io::Result<Self> {
        let file = file
            .map(|path| File::options().create(true).append(true).open(path))
            .transpose()?;
        Ok(Self {
            inner: Arc::new(Inner {
                records: Mutex::default(),
                keep,
                file,
                version: watch::Sender::new(0),
            }),
        })
    }

    /// This moment, to ask for what came after it.
    pub fn mark(&self) -> Marker {
        let records = self.inner.records.lock();
        Marker {
            next: records.first + records.kept.len() as u64,
            running: records
                .kept
                .iter()
                .filter(|record| record.end.get().is_none())
                .map(|record| (record.head.index, record.bytes.load(Ordering::Relaxed)))
                .collect(),
        }
    }

    /// All remembered requests, the running ones included.
    pub fn entries(&self) -> Vec<LogEntry> {
        self.entries_since(&Marker::default())
    }

    /// Requests read after `marker`, and those that were running then, with the bytes they have
    /// sent since.
    pub fn entries_since(&self, marker: &Marker) -> Vec<LogEntry> {
        let records = self.inner.records.lock();
        records
            .kept
            .iter()
            .filter_map(|record| {
                let index = record.head.index;
                let before = marker.running.get(&index).copied();
                if index < marker.next && before.is_none() {
                    return None;
                }
                let mut entry = record.entry();
                entry.bytes -= before.unwrap_or(0).min(entry.bytes);
                Some(entry)
            })
            .collect()
    }

    /// Sums over everything remembered.
    pub fn totals(&self) -> Totals {
        Totals::of(&self.entries())
    }

    /// Sums over what was served after `marker`.
    pub fn totals_since(&self, marker: &Marker) -> Totals {
        Totals::of(&self.entries_since(marker))
    }

    /// Body bytes served so far of one blob.
    pub fn blob_bytes(&self, digest: &Digest) -> u64 {
        self.totals().blobs.get(digest).map_or(0, |blob| blob.bytes)
    }

    /// Waits until `wanted` holds for the entries; it is asked again whenever a request begins,
    /// is answered or ends.
    pub async fn wait_until(&self, mut wanted: impl FnMut(&[LogEntry]) -> bool) {
        let mut version = self.inner.version.subscribe();
        while !wanted(&self.entries()) {
            // The sender lives in self, so this cannot fail.
            let _ = version.changed().await;
        }
    }

    pub(crate) fn begin(&self, mut head: Head) -> Recording {
        let record = {
            let mut records = self.inner.records.lock();
            head.index = records.first + records.kept.len() as u64;
            let record = Arc::new(Record::new(head));
            records.kept.push_back(record.clone());
            while records.kept.len() > self.inner.keep
                && records.kept.front().is_some_and(|r| r.end.get().is_some())
            {
                records.kept.pop_front();
                records.first += 1;
            }
            record
        };
        self.bump();
        Recording {
            log: self.clone(),
            record,
        }
    }

    fn bump(&self) {
        self.inner.version.send_modify(|version| *version += 1);
    }
}

impl Totals {
    /// Sums over `entries`.
    pub fn of(entries: &[LogEntry]) -> Self {
        let mut totals = Self::default();
        let mut connections = BTreeSet::new();
        for entry in entries {
            let status = entry.status.unwrap_or(0);
            connections.insert(entry.connection);
            totals.requests += 1;
            totals.bytes += entry.bytes;
            totals.failed += u64::from(status >= 400);
            match entry.kind {
                RequestKind::Token => totals.token_requests += 1,
                RequestKind::Manifest => totals.manifest_requests += 1,
                RequestKind::Blob | RequestKind::Storage => {
                    let good = if (200..300).contains(&status) {
                        entry.bytes
                    } else {
                        0
                    };
                    totals.blob_requests += 1;
                    totals.blob_bytes += good;
                    if let Some(digest) = entry.digest {
                        let blob = totals.blobs.entry(digest).or_default();
                        blob.requests += 1;
                        blob.bytes += good;
                    }
                }
                _ => {}
            }
        }
        totals.connections = connections.len() as u64;
        totals
    }
}

/// What is known of a request when it has been read.
#[derive(Debug)]
pub(crate) struct Head {
    /// Set by the log.
    pub(crate) index: u64,
    pub(crate) arrived: Instant,
    pub(crate) connection: u64,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) kind: RequestKind,
    pub(crate) repo: Option<String>,
    pub(crate) reference: Option<String>,
    pub(crate) digest: Option<Digest>,
    pub(crate) range: Option<String>,
    pub(crate) user_agent: Option<String>,
    pub(crate) authorization: bool,
}

#[derive(Debug)]
struct Record {
    head: Head,
    time: SystemTime,
    answer: OnceLock<Answer>,
    bytes: AtomicU64,
    first_byte: OnceLock<Instant>,
    end: OnceLock<Instant>,
}

#[derive(Debug)]
struct Answer {
    status: Option<u16>,
    length: u64,
    rules: Vec<u64>,
}

impl Record {
    fn new(head: Head) -> Self {
        Self {
            head,
            time: SystemTime::now(),
            answer: OnceLock::new(),
            bytes: AtomicU64::new(0),
            first_byte: OnceLock::new(),
            end: OnceLock::new(),
        }
    }

    fn entry(&self) -> LogEntry {
        let head = &self.head;
        let since = |at: &Instant| millis(at.duration_since(head.arrived).as_secs_f64());
        let bytes = self.bytes.load(Ordering::Relaxed);
        let answer = self.answer.get();
        let length = answer.map_or(0, |answer| answer.length);
        let epoch = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        LogEntry {
            index: head.index,
            time_ms: millis(epoch.as_secs_f64()),
            connection: head.connection,
            method: head.method.clone(),
            path: head.path.clone(),
            kind: head.kind,
            repo: head.repo.clone(),
            reference: head.reference.clone(),
            digest: head.digest,
            range: head.range.clone(),
            status: answer.and_then(|answer| answer.status),
            length,
            bytes,
            complete: answer.is_some_and(|answer| answer.status.is_some())
                && (bytes == length || head.method == "HEAD"),
            first_byte_ms: self.first_byte.get().map(since),
            duration_ms: self.end.get().map(since),
            user_agent: head.user_agent.clone(),
            authorization: head.authorization,
            rules: answer
                .map(|answer| answer.rules.clone())
                .unwrap_or_default(),
        }
    }
}

/// A running request; its end is when this is dropped.
#[derive(Debug)]
pub(crate) struct Recording {
    log: Log,
    record: Arc<Record>,
}

impl Recording {
    pub(crate) fn answered(&self, status: Option<u16>, length: u64, rules: Vec<u64>) {
        // A request is answered once; a second answer would be a bug and is not recorded.
        let _ = self.record.answer.set(Answer {
            status,
            length,
            rules,
        });
        self.log.bump();
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.record.first_byte.get_or_init(Instant::now);
        self.record.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Set once: a recording has one owner.
        let _ = self.record.end.set(Instant::now());
        if let Some(mut file) = self.log.inner.file.as_ref()
            && let Ok(mut line) = serde_json::to_vec(&self.record.entry())
        {
            line.push(b'\n');
            // One write of a short line to a file opened for appending is not torn by others.
            if let Err(error) = file.write_all(&line) {
                tracing::warn!(%error, "cannot write the request log");
            }
        }
        self.log.bump();
    }
}

/// Seconds as milliseconds with three digits behind the point.
fn millis(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(digest: Option<Digest>) -> Head {
        Head {
            index: 0,
            arrived: Instant::now(),
            connection: 1,
            method: "GET".into(),
            path: "/".into(),
            kind: RequestKind::Blob,
            repo: None,
            reference: None,
            digest,
            range: None,
            user_agent: None,
            authorization: false,
        }
    }

    #[test]
    fn a_marker_splits_the_bytes_of_a_running_request() {
        let log = Log::open(100, None).unwrap();
        let digest = Digest::of(b"blob");
        let first = log.begin(head(Some(digest)));
        first.answered(Some(206), 30, vec![]);
        first.sent(10);
        let marker = log.mark();
        first.sent(20);
        drop(first);
        let second = log.begin(head(None));
        second.answered(Some(404), 5, vec![7]);
        second.sent(5);

        let since = log.totals_since(&marker);
        assert_eq!((since.requests, since.bytes, since.blob_bytes), (2, 25, 20));
        assert_eq!(since.failed, 1);
        assert_eq!(log.blob_bytes(&digest), 30);
        let entries = log.entries();
        assert!(entries[0].complete && entries[0].duration_ms.is_some());
        assert!(entries[1].duration_ms.is_none());
        assert_eq!(entries[1].rules, [7]);
        drop(second);
        assert_eq!(log.entries_since(&log.mark()), []);
    }

    #[test]
    fn old_finished_requests_are_forgotten_and_numbers_stay() {
        let log = Log::open(2, None).unwrap();
        for _ in 0..5 {
            drop(log.begin(head(None)));
        }
        let indices: Vec<_> = log.entries().iter().map(|entry| entry.index).collect();
        assert_eq!(indices, [3, 4]);
    }
}
