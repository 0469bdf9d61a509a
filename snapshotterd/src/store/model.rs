//! The store against a model in memory: same answers, same contents, whatever the order.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use proptest::prelude::*;
use redb::{ReadableDatabase as _, ReadableTable as _};

use super::{
    CommitSnapshot, CreateSnapshot, Durability, Filter, Info, Kind, Labels, SNAPSHOT_REF,
    SnapshotId, SnapshotKey, Store, StoreError,
    schema::{CHILDREN, IDS, REFS, Record, SNAPSHOTS},
};

/// What a test does to a store.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Create(Kind, SnapshotKey, Option<Arc<str>>, Labels),
    Commit(SnapshotKey, Arc<str>, Option<Arc<str>>, Labels),
    Remove(SnapshotKey),
    Update(SnapshotKey, Labels, Vec<String>),
    /// Writes, then fails: must leave nothing.
    FailHalfWay(SnapshotKey),
}

/// The state machine of containerd's metastore, without a database.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    pub(super) snapshots: BTreeMap<SnapshotKey, Entry>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    kind: Kind,
    parent: Option<Arc<str>>,
    labels: Labels,
}

/// The classes of answers that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    NotFound,
    Exists,
    InvalidArgument,
    Precondition,
    Other,
}

impl Outcome {
    fn of<T>(result: &Result<T, StoreError>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(StoreError::NotFound { .. } | StoreError::ParentNotFound { .. }) => Self::NotFound,
            Err(StoreError::AlreadyExists { .. }) => Self::Exists,
            Err(
                StoreError::ParentNotCommitted { .. }
                | StoreError::ParentMismatch { .. }
                | StoreError::ImmutableField { .. },
            ) => Self::InvalidArgument,
            Err(
                StoreError::RebaseParentNotCommitted { .. }
                | StoreError::WrongKind { .. }
                | StoreError::HasChildren { .. },
            ) => Self::Precondition,
            Err(_) => Self::Other,
        }
    }
}

impl Model {
    pub(super) fn apply(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Create(kind, key, parent, labels) => {
                match parent.as_ref().map(|name| self.kind(&key.sibling(name))) {
                    Some(None) => return Outcome::NotFound,
                    Some(Some(kind)) if kind != Kind::Committed => return Outcome::InvalidArgument,
                    _ => {}
                }
                if self.snapshots.contains_key(key) {
                    return Outcome::Exists;
                }
                let entry = Entry {
                    kind: *kind,
                    parent: parent.clone(),
                    labels: filled(labels),
                };
                self.snapshots.insert(key.clone(), entry);
            }
            Step::Commit(key, name, parent, labels) => {
                let name = key.sibling(name);
                if self.snapshots.contains_key(&name) {
                    return Outcome::Exists;
                }
                let Some(active) = self.snapshots.get(key).cloned() else {
                    return Outcome::NotFound;
                };
                if active.kind != Kind::Active {
                    return Outcome::Precondition;
                }
                let parent = match (&active.parent, parent) {
                    (current, None) => current.clone(),
                    (Some(current), Some(asked)) if current == asked => Some(asked.clone()),
                    (Some(_), Some(_)) => return Outcome::InvalidArgument,
                    (None, Some(asked)) => match self.kind(&key.sibling(asked)) {
                        None => return Outcome::NotFound,
                        Some(Kind::Committed) => Some(asked.clone()),
                        Some(_) => return Outcome::Precondition,
                    },
                };
                self.snapshots.remove(key);
                let entry = Entry {
                    kind: Kind::Committed,
                    parent,
                    labels: filled(labels),
                };
                self.snapshots.insert(name, entry);
            }
            Step::Remove(key) => {
                if !self.snapshots.contains_key(key) {
                    return Outcome::NotFound;
                }
                let is_parent = self.snapshots.iter().any(|(other, entry)| {
                    other.snapshotter == key.snapshotter
                        && entry.parent.as_deref() == Some(&*key.key)
                });
                if is_parent {
                    return Outcome::Precondition;
                }
                self.snapshots.remove(key);
            }
            Step::Update(key, labels, mask) => {
                let Some(entry) = self.snapshots.get(key) else {
                    return Outcome::NotFound;
                };
                let mut updated = entry.labels.clone();
                if mask.is_empty() {
                    updated.clone_from(labels);
                }
                for path in mask {
                    match path.strip_prefix("labels.") {
                        Some(label) => {
                            let value = labels.get(label).cloned().unwrap_or_default();
                            updated.insert(label.to_owned(), value);
                        }
                        None if path == "labels" => updated.clone_from(labels),
                        None => return Outcome::InvalidArgument,
                    }
                }
                if let Some(entry) = self.snapshots.get_mut(key) {
                    entry.labels = filled(&updated);
                }
            }
            Step::FailHalfWay(_) => return Outcome::Other,
        }
        Outcome::Done
    }

    fn kind(&self, key: &SnapshotKey) -> Option<Kind> {
        self.snapshots.get(key).map(|entry| entry.kind)
    }
}

fn filled(labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    labels.retain(|_, value| !value.is_empty());
    labels
}

pub(super) fn apply(store: &Store, step: &Step, durability: Durability, id: SnapshotId) -> Outcome {
    match step.clone() {
        Step::Create(kind, key, parent, labels) => {
            let new = CreateSnapshot {
                key,
                kind,
                parent,
                labels,
                id,
            };
            Outcome::of(&store.write_blocking(durability, move |writer| writer.create(&new)))
        }
        Step::Commit(key, name, parent, labels) => {
            let commit = CommitSnapshot {
                key,
                name,
                parent,
                labels,
                usage: None,
            };
            Outcome::of(&store.write_blocking(durability, move |writer| writer.commit(&commit)))
        }
        Step::Remove(key) => {
            Outcome::of(&store.write_blocking(durability, move |writer| writer.remove(&key)))
        }
        Step::Update(key, labels, mask) => {
            Outcome::of(&store.write_blocking(durability, move |writer| {
                writer.update(&key, &labels, &mask)
            }))
        }
        Step::FailHalfWay(key) => Outcome::of(&store.write_blocking(durability, move |writer| {
            let new = CreateSnapshot {
                key: key.sibling("half"),
                kind: Kind::Active,
                parent: None,
                labels: Labels::new(),
                id,
            };
            writer.create(&new)?;
            Err::<(), _>(StoreError::corrupt("on purpose"))
        })),
    }
}

/// The whole store as a model, after checking that every index agrees with the records.
pub(super) fn contents(store: &Store) -> Result<Model, StoreError> {
    let mut model = Model::default();
    let (mut ids, mut children, mut refs) = (Vec::new(), Vec::new(), Vec::new());
    let transaction = store.inner.database.load().begin_read()?;
    for entry in transaction.open_table(SNAPSHOTS)?.iter()? {
        let (key, value) = entry?;
        let (snapshotter, key) = key.value();
        let record = Record::parse(value.value(), key)?;
        let key = SnapshotKey::new(snapshotter, key);
        ids.push((record.id, key.clone(), record.parent_id));
        if record.parent_id != 0 {
            children.push((record.parent_id, record.id));
        }
        if let Some(reference) = record.labels.get(SNAPSHOT_REF) {
            refs.push((snapshotter.to_owned(), reference.clone(), record.id));
        }
        let entry = Entry {
            kind: record.kind(&key.key)?,
            parent: (record.parent_id != 0).then(|| record.parent.as_str().into()),
            labels: record.labels,
        };
        model.snapshots.insert(key, entry);
    }
    ids.sort();
    children.sort_unstable();
    refs.sort();
    let mut found = Vec::new();
    for entry in transaction.open_table(IDS)?.iter()? {
        let (id, value) = entry?;
        let (snapshotter, key, parent) = value.value();
        found.push((id.value(), SnapshotKey::new(snapshotter, key), parent));
    }
    assert_eq!(found, ids, "ids");
    let mut found = Vec::new();
    for entry in transaction.open_table(CHILDREN)?.iter()? {
        found.push(entry?.0.value());
    }
    assert_eq!(found, children, "children");
    let mut found = Vec::new();
    for entry in transaction.open_table(REFS)?.iter()? {
        let (key, _) = entry?;
        let (snapshotter, reference, id) = key.value();
        found.push((snapshotter.to_owned(), reference.to_owned(), id));
    }
    assert_eq!(found, refs, "references");
    Ok(model)
}

pub(super) fn any_step() -> impl Strategy<Value = Step> {
    let plugin = prop_oneof![Just("lazy"), Just("fast")];
    let name = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d"), Just("e")];
    let key = (plugin, name.clone()).prop_map(|(plugin, name)| SnapshotKey::new(plugin, name));
    let parent = proptest::option::of(name.clone().prop_map(Arc::from));
    let label = prop_oneof![Just("l1"), Just("l2"), Just(SNAPSHOT_REF)];
    let labels = proptest::collection::btree_map(
        label.prop_map(str::to_owned),
        prop_oneof![Just(""), Just("x"), Just("y")].prop_map(str::to_owned),
        0..3,
    );
    let mask = proptest::collection::vec(
        prop_oneof![
            Just("labels".to_owned()),
            Just("labels.l1".to_owned()),
            Just(format!("labels.{SNAPSHOT_REF}")),
            Just("parent".to_owned()),
        ],
        0..3,
    );
    let kind = prop_oneof![Just(Kind::Active), Just(Kind::View), Just(Kind::Committed)];
    prop_oneof![
        4 => (kind, key.clone(), parent.clone(), labels.clone())
            .prop_map(|(kind, key, parent, labels)| Step::Create(kind, key, parent, labels)),
        3 => (key.clone(), name.prop_map(Arc::from), parent, labels.clone())
            .prop_map(|(key, name, parent, labels)| Step::Commit(key, name, parent, labels)),
        2 => key.clone().prop_map(Step::Remove),
        1 => (key.clone(), labels, mask)
            .prop_map(|(key, labels, mask)| Step::Update(key, labels, mask)),
        1 => key.prop_map(Step::FailHalfWay),
    ]
}

fn listed(store: &Store, plugin: &str, filter: &Filter) -> Result<Vec<Info>, StoreError> {
    let reader = store.read()?;
    let mut all: Vec<Info> = Vec::new();
    loop {
        let after = all.last().map(|info| info.name.clone());
        let page = reader.page(plugin, filter, after.as_deref(), 2)?;
        let last = page.len() < 2;
        all.extend(page);
        if last {
            return Ok(all);
        }
    }
}

fn open(path: &Path) -> Result<Store, StoreError> {
    Store::open(&path.join("metadata.redb"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn answers_and_contents_are_the_models(
        steps in proptest::collection::vec(any_step(), 1..60),
        reopen_at in 0..60_usize,
    ) {
        let temp = tempfile::tempdir()?;
        let mut store = open(temp.path())?;
        let mut model = Model::default();
        let mut used = 0;
        for (index, step) in steps.iter().enumerate() {
            if index == reopen_at {
                drop(store);
                store = open(temp.path())?;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build()?;
            let id = runtime.block_on(store.reserve_id())?;
            prop_assert!(id.id().0 > used, "ids only grow");
            used = id.id().0;
            let durability = if index % 2 == 0 { Durability::Soon } else { Durability::Now };
            let expected = model.apply(step);
            prop_assert_eq!(apply(&store, step, durability, id.id()), expected, "{:?}", step);
            prop_assert_eq!(&contents(&store)?, &model, "after {:?}", step);
        }
        // Index look-ups and scans agree.
        for plugin in ["lazy", "fast"] {
            for filter in [
                "",
                r#"labels."containerd.io/snapshot.ref"==x"#,
                r#"labels."containerd.io/snapshot.ref"==x,kind==committed"#,
                "name==a",
                r#"parent!="""#,
            ] {
                let filter = Filter::parse(&[filter])?;
                let all = listed(&store, plugin, &Filter::default())?;
                let expected: Vec<_> =
                    all.into_iter().filter(|info| filter.matches(info)).collect();
                prop_assert_eq!(listed(&store, plugin, &filter)?, expected);
            }
        }
    }
}

#[test]
fn many_writers_at_once_share_commits_and_lose_nothing() -> Result<(), Box<dyn std::error::Error>> {
    let temp = tempfile::tempdir()?;
    let store = open(temp.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .build()?;
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..16 {
            let store = store.clone();
            tasks.spawn(async move {
                for number in 0..20 {
                    let id = store.reserve_id().await?;
                    let new = CreateSnapshot {
                        key: SnapshotKey::new("lazy", format!("{writer}/{number}")),
                        kind: Kind::Active,
                        parent: None,
                        labels: Labels::new(),
                        id: id.id(),
                    };
                    let half = Step::FailHalfWay(new.key.clone());
                    let other = store.clone();
                    let failing = tokio::task::spawn_blocking(move || {
                        apply(&other, &half, Durability::Now, SnapshotId(u64::MAX))
                    });
                    store
                        .write(Durability::Now, move |writer| writer.create(&new))
                        .await?;
                    assert_eq!(failing.await.ok(), Some(Outcome::Other));
                }
                Ok::<_, StoreError>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok::<_, Box<dyn std::error::Error>>(())
    })?;
    assert_eq!(contents(&store)?.snapshots.len(), 320);
    Ok(())
}

#[test]
fn a_panic_is_the_callers_and_leaves_nothing() -> Result<(), StoreError> {
    let temp = tempfile::tempdir().map_err(|source| StoreError::File {
        path: "temporary directory".into(),
        source,
    })?;
    let store = open(temp.path())?;
    let result = store.write_blocking(Durability::Now, |writer| {
        writer.create(&CreateSnapshot {
            key: SnapshotKey::new("lazy", "a"),
            kind: Kind::Active,
            parent: None,
            labels: Labels::new(),
            id: SnapshotId(7),
        })?;
        assert!(
            writer.find_snapshot(&SnapshotKey::new("lazy", "b")).is_ok(),
            "on purpose"
        );
        Ok(())
    });
    assert!(matches!(result, Err(StoreError::Panicked { message }) if message == "on purpose"));
    assert_eq!(contents(&store)?, Model::default());
    Ok(())
}
