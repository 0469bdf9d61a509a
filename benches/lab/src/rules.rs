//! Scripted misbehaviour: a list of rules, each a match and an action.
//!
//! Every rule that matches a request acts on it, in the order they were added; of several that
//! answer in the registry's place the first one wins. Rules count what they match, so a rule can
//! speak of the nth request or of the next n.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use formats::digest::Digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::log::RequestKind;

/// Names a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuleId(pub u64);

/// One scripted deviation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "written as a literal by tests")]
pub struct Rule {
    /// Which requests.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Matching requests to let pass first.
    #[serde(default)]
    pub skip: u64,
    /// How many requests to act on after those; without it, all.
    #[serde(default)]
    pub times: Option<u64>,
    /// What to do.
    pub action: Action,
}

/// Which requests a rule speaks of: all given conditions hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::exhaustive_structs, reason = "written as a literal by tests")]
pub struct Match {
    /// What the request is for.
    pub kind: Option<RequestKind>,
    /// HTTP method, upper case.
    pub method: Option<String>,
    /// Repository name.
    pub repo: Option<String>,
    /// Digest in the path.
    pub digest: Option<Digest>,
    /// Tag or digest of a manifest as requested.
    pub reference: Option<String>,
    /// Any requested byte of the blob lies in `[start, end)`.
    pub bytes: Option<(u64, u64)>,
    /// Whether the request has a `Range` header.
    pub ranged: Option<bool>,
}

/// What a rule does to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Action {
    /// Holds the reply until the rule is released or removed: before the headers, or in the body
    /// after that many bytes.
    Stall {
        /// Body bytes to send first.
        #[serde(default)]
        after: Option<u64>,
    },
    /// Waits before working on the request.
    Delay {
        /// Milliseconds.
        ms: u64,
    },
    /// Answers with a status and a short error body.
    Status {
        /// The status.
        status: u16,
        /// Value of `Retry-After`.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// Closes the connection without an answer.
    Close,
    /// Announces the whole body, closes the connection after that many bytes of it.
    Truncate {
        /// Body bytes to send.
        after: u64,
    },
    /// The same, but the connection ends in a reset.
    Reset {
        /// Body bytes to send.
        after: u64,
    },
    /// Answers a range request with status 200 and the whole blob.
    IgnoreRange,
    /// Moves both numbers of `Content-Range` while the bytes stay right.
    ShiftContentRange {
        /// By how much.
        by: i64,
    },
    /// Inverts bytes of the blob, `[at, at + len)`, in what is sent.
    Flip {
        /// Offset in the blob.
        at: u64,
        /// Number of bytes.
        #[serde(default = "one")]
        len: u64,
    },
    /// Sends the body at this rate at most.
    Trickle {
        /// Bytes per second.
        bytes_per_s: u64,
    },
    /// Answers GETs of blobs with 307 to the storage port and a signed query that expires.
    Redirect {
        /// Life of the signature in milliseconds.
        expires_ms: u64,
    },
}

/// What a rule has done so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RuleState {
    /// Its name.
    pub id: RuleId,
    /// The rule.
    pub rule: Rule,
    /// Requests that matched.
    pub matched: u64,
    /// Requests it acted on.
    pub acted: u64,
    /// Requests held by it now.
    pub held: u64,
}

impl Match {
    /// Every request.
    pub fn any() -> Self {
        Self::default()
    }

    /// Requests for the bytes of one blob, at the registry or where it redirects.
    pub fn blob(digest: Digest) -> Self {
        Self {
            method: Some("GET".into()),
            digest: Some(digest),
            ..Self::default()
        }
    }

    /// Requests of one kind.
    pub fn kind(kind: RequestKind) -> Self {
        Self {
            kind: Some(kind),
            ..Self::default()
        }
    }

    /// Narrows to requests that touch `[start, end)` of the blob.
    #[must_use]
    pub fn bytes(self, span: Range<u64>) -> Self {
        Self {
            bytes: Some((span.start, span.end)),
            ..self
        }
    }
}

impl Rule {
    /// Acts on every match.
    pub fn new(matches: Match, action: Action) -> Self {
        Self {
            matches,
            skip: 0,
            times: None,
            action,
        }
    }

    /// Acts on the nth match only, counted from 1.
    #[must_use]
    pub fn nth(self, n: u64) -> Self {
        Self {
            skip: n.saturating_sub(1),
            times: Some(1),
            ..self
        }
    }

    /// Acts on the next `n` matches only.
    #[must_use]
    pub fn times(self, n: u64) -> Self {
        Self {
            times: Some(n),
            ..self
        }
    }
}

/// The rules of one server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Rules {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    list: Mutex<List>,
    version: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    live: BTreeMap<RuleId, Live>,
}

#[derive(Debug)]
struct Live {
    rule: Rule,
    matched: u64,
    acted: u64,
    gate: Arc<Gate>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            inner: Arc::new(Inner {
                list: Mutex::default(),
                version: Arc::new(watch::Sender::new(0)),
            }),
        }
    }
}

impl Rules {
    /// Adds a rule.
    pub fn add(&self, rule: Rule) -> RuleId {
        let mut list = self.inner.list.lock();
        list.next += 1;
        let id = RuleId(list.next);
        let gate = Arc::new(Gate::new(self.inner.version.clone()));
        list.live.insert(
            id,
            Live {
                rule,
                matched: 0,
                acted: 0,
                gate,
            },
        );
        id
    }

    /// Removes a rule; requests it holds go on. False if there is none of that name.
    pub fn remove(&self, id: RuleId) -> bool {
        let live = self.inner.list.lock().live.remove(&id);
        live.is_some_and(|live| {
            live.gate.open();
            true
        })
    }

    /// Removes all rules; requests they hold go on.
    pub fn clear(&self) {
        let live = std::mem::take(&mut self.inner.list.lock().live);
        for live in live.values() {
            live.gate.open();
        }
    }

    /// All rules with what they have done.
    pub fn list(&self) -> Vec<RuleState> {
        let list = self.inner.list.lock();
        list.live
            .iter()
            .map(|(id, live)| RuleState {
                id: *id,
                rule: live.rule.clone(),
                matched: live.matched,
                acted: live.acted,
                held: live.gate.held.load(Ordering::Relaxed) as u64,
            })
            .collect()
    }

    /// What one rule has done.
    pub fn state(&self, id: RuleId) -> Option<RuleState> {
        self.list().into_iter().find(|state| state.id == id)
    }

    /// Waits until a rule has acted on at least `n` requests. Ends early if it is removed.
    pub async fn wait_acted(&self, id: RuleId, n: u64) {
        self.wait(id, |state| state.acted >= n).await;
    }

    /// Waits until a rule holds at least `n` requests at once. Ends early if it is removed.
    pub async fn wait_held(&self, id: RuleId, n: u64) {
        self.wait(id, |state| state.held >= n).await;
    }

    async fn wait(&self, id: RuleId, wanted: impl Fn(&RuleState) -> bool) {
        let mut version = self.inner.version.subscribe();
        while self.state(id).is_some_and(|state| !wanted(&state)) {
            // The sender lives in self, so this cannot fail.
            let _ = version.changed().await;
        }
    }

    /// Whether there is anything to match.
    pub(crate) fn is_empty(&self) -> bool {
        self.inner.list.lock().live.is_empty()
    }

    /// What the rules do to a request.
    pub(crate) fn apply(&self, probe: &Probe<'_>) -> Effects {
        let mut effects = Effects::default();
        let mut list = self.inner.list.lock();
        for (id, live) in &mut list.live {
            if !probe.fits(&live.rule.matches) {
                continue;
            }
            live.matched += 1;
            let turn = live.matched > live.rule.skip
                && live.rule.times.is_none_or(|times| live.acted < times);
            if turn {
                live.acted += 1;
                effects.rules.push(id.0);
                effects.take(&live.rule.action, &live.gate);
            }
        }
        drop(list);
        if !effects.rules.is_empty() {
            self.inner.version.send_modify(|version| *version += 1);
        }
        effects
    }
}

/// What of a request rules can match.
#[derive(Debug)]
pub(crate) struct Probe<'a> {
    pub(crate) kind: RequestKind,
    pub(crate) method: &'a str,
    pub(crate) repo: Option<&'a str>,
    pub(crate) digest: Option<Digest>,
    pub(crate) reference: Option<&'a str>,
    /// Requested stretch and blob size, if the request is for a blob that exists.
    pub(crate) selection: Option<(crate::ranges::Selection, u64)>,
    pub(crate) ranged: bool,
}

impl Probe<'_> {
    fn fits(&self, wanted: &Match) -> bool {
        fn same<T: PartialEq + ?Sized>(wanted: Option<&T>, actual: Option<&T>) -> bool {
            wanted.is_none() || wanted == actual
        }
        same(wanted.kind.as_ref(), Some(&self.kind))
            && same(wanted.method.as_deref(), Some(self.method))
            && same(wanted.repo.as_deref(), self.repo)
            && same(wanted.digest.as_ref(), self.digest.as_ref())
            && same(wanted.reference.as_deref(), self.reference)
            && same(wanted.ranged.as_ref(), Some(&self.ranged))
            && wanted.bytes.is_none_or(|(start, end)| {
                self.selection
                    .as_ref()
                    .is_some_and(|(selection, size)| selection.touches(&(start..end), *size))
            })
    }
}

/// The sum of what rules do to one request.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) rules: Vec<u64>,
    pub(crate) delay: Duration,
    pub(crate) gates: Vec<Arc<Gate>>,
    pub(crate) instead: Option<Instead>,
    pub(crate) ignore_range: bool,
    pub(crate) shift: i64,
    pub(crate) redirect: Option<Duration>,
    pub(crate) body: BodyFaults,
}

/// What is answered in the registry's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Instead {
    Close,
    Status {
        status: u16,
        retry_after: Option<String>,
    },
}

/// What goes wrong within a body.
#[derive(Debug, Default)]
pub(crate) struct BodyFaults {
    pub(crate) stalls: Vec<(u64, Arc<Gate>)>,
    pub(crate) truncate: Option<u64>,
    pub(crate) reset: Option<u64>,
    pub(crate) flips: Vec<Range<u64>>,
    pub(crate) bytes_per_s: Option<u64>,
}

impl Effects {
    fn take(&mut self, action: &Action, gate: &Arc<Gate>) {
        fn least<T: Ord + Copy>(slot: &mut Option<T>, value: T) {
            *slot = Some(slot.map_or(value, |old| old.min(value)));
        }
        match action {
            Action::Stall { after: None } => self.gates.push(gate.clone()),
            Action::Stall { after: Some(after) } => self.body.stalls.push((*after, gate.clone())),
            Action::Delay { ms } => self.delay += Duration::from_millis(*ms),
            Action::Status {
                status,
                retry_after,
            } => {
                self.instead.get_or_insert(Instead::Status {
                    status: *status,
                    retry_after: retry_after.clone(),
                });
            }
            Action::Close => {
                self.instead.get_or_insert(Instead::Close);
            }
            Action::Truncate { after } => least(&mut self.body.truncate, *after),
            Action::Reset { after } => least(&mut self.body.reset, *after),
            Action::IgnoreRange => self.ignore_range = true,
            Action::ShiftContentRange { by } => self.shift = self.shift.saturating_add(*by),
            Action::Flip { at, len } => self.body.flips.push(*at..at.saturating_add(*len)),
            Action::Trickle { bytes_per_s } => least(&mut self.body.bytes_per_s, *bytes_per_s),
            Action::Redirect { expires_ms } => {
                self.redirect
                    .get_or_insert(Duration::from_millis(*expires_ms));
            }
        }
    }
}

/// Where a stall rule holds requests.
#[derive(Debug)]
pub(crate) struct Gate {
    opened: watch::Sender<bool>,
    held: AtomicUsize,
    version: Arc<watch::Sender<u64>>,
}

impl Gate {
    fn new(version: Arc<watch::Sender<u64>>) -> Self {
        Self {
            opened: watch::Sender::new(false),
            held: AtomicUsize::new(0),
            version,
        }
    }

    fn open(&self) {
        self.opened.send_replace(true);
    }

    /// Returns once the gate is open.
    pub(crate) async fn pass(&self) {
        struct Held<'a>(&'a Gate);
        impl Drop for Held<'_> {
            fn drop(&mut self) {
                self.0.held.fetch_sub(1, Ordering::Relaxed);
                self.0.version.send_modify(|version| *version += 1);
            }
        }
        let mut opened = self.opened.subscribe();
        self.held.fetch_add(1, Ordering::Relaxed);
        let _held = Held(self);
        self.version.send_modify(|version| *version += 1);
        // The sender lives in self, so this cannot fail.
        let _ = opened.wait_for(|open| *open).await;
    }
}

fn one() -> u64 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::Selection;

    fn probe(digest: Option<Digest>, range: Range<u64>) -> Probe<'static> {
        Probe {
            kind: RequestKind::Blob,
            method: "GET",
            repo: Some("a/b"),
            digest,
            reference: None,
            selection: Some((Selection::One(range), 1000)),
            ranged: true,
        }
    }

    #[test]
    fn rules_match_count_and_combine() {
        let rules = Rules::default();
        let digest = Digest::of(b"x");
        let error = rules.add(
            Rule::new(
                Match::blob(digest),
                Action::Status {
                    status: 503,
                    retry_after: None,
                },
            )
            .nth(2),
        );
        let flip = rules.add(Rule::new(
            Match::any().bytes(100..200),
            Action::Flip { at: 150, len: 1 },
        ));

        let first = rules.apply(&probe(Some(digest), 0..50));
        assert!(first.rules.is_empty() && first.instead.is_none());
        let second = rules.apply(&probe(Some(digest), 199..300));
        assert_eq!(second.rules, [error.0, flip.0]);
        assert!(matches!(
            second.instead,
            Some(Instead::Status { status: 503, .. })
        ));
        assert_eq!(second.body.flips, vec![150..151]);
        let third = rules.apply(&probe(Some(digest), 0..50));
        assert!(third.rules.is_empty());
        assert!(rules.apply(&probe(None, 0..50)).rules.is_empty());
        let state = rules.state(error).unwrap();
        assert_eq!((state.matched, state.acted), (3, 1));
        assert!(rules.remove(flip) && !rules.remove(flip));
    }

    #[test]
    fn json_form() {
        let text = r#"{"match":{"kind":"blob","bytes":[5,9]},"times":2,"action":{"do":"stall","after":100}}"#;
        let rule: Rule = serde_json::from_str(text).unwrap();
        assert_eq!(rule.matches.bytes, Some((5, 9)));
        assert_eq!(rule.action, Action::Stall { after: Some(100) });
        assert_eq!(
            serde_json::from_value::<Rule>(serde_json::to_value(&rule).unwrap()).unwrap(),
            rule
        );
        assert!(serde_json::from_str::<Rule>(r#"{"action":{"do":"nonsense"}}"#).is_err());
        assert!(serde_json::from_str::<Rule>(r#"{"mach":{},"action":{"do":"close"}}"#).is_err());
    }

    #[tokio::test]
    async fn a_gate_holds_until_its_rule_goes() {
        let rules = Rules::default();
        let id = rules.add(Rule::new(Match::any(), Action::Stall { after: None }));
        let effects = rules.apply(&probe(None, 0..1));
        let gate = effects.gates[0].clone();
        let held = tokio::spawn(async move { gate.pass().await });
        rules.wait_held(id, 1).await;
        assert!(!held.is_finished());
        rules.remove(id);
        held.await.unwrap();
        assert_eq!(effects.gates[0].held.load(Ordering::Relaxed), 0);
    }
}
