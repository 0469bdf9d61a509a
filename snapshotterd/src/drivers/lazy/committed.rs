//! Lazy answers as they are committed: several layers of one image in one transaction.
//!
//! An answer must be on disk before it is given, because containerd records it durably as well. A
//! sync for each of forty layers, one after another, would take longer than fetching their
//! indexes side by side. So an answer takes along the layers above it that are known by then:
//! containerd asks for them next, and finds them committed. What it never asks for (the pull was
//! cancelled) is to containerd a snapshot that nobody knows, which its garbage collection removes.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use storage::ranges::report;
use tracing::debug;

use super::{
    Lazy,
    chain::{Chain, Link},
};
use crate::{
    drivers::{CreateRequest, DriverError},
    layers::{
        Layers,
        record::{LazySnapshot, MountKey, Verdict},
    },
    resolve::{
        Resolved,
        labels::{Announced, REMOTE, labels_above},
        reason::NotLazy,
    },
    store::{
        CreateSnapshot, Durability, Kind, Labels, SnapshotId, SnapshotKey, StoreError, Writer,
    },
};

/// Names of snapshots that were committed before containerd asked for them, until it does or they
/// are removed.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    names: Mutex<HashSet<SnapshotKey>>,
}

/// Names remembered; beyond that they keep the labels they were committed with.
const REMEMBERED: usize = 65_536;
/// Layers above are chosen for this long: attributes that they inherit are looked up in all layers
/// below, and the request waits.
const CHOOSING: Duration = Duration::from_millis(500);

impl Ahead {
    fn note(&self, keys: impl Iterator<Item = SnapshotKey>) {
        let mut names = self.names.lock();
        if names.len() < REMEMBERED {
            names.extend(keys);
        }
    }

    /// Whether `key` was one of them; it is not from now on.
    pub(super) fn take(&self, key: &SnapshotKey) -> bool {
        self.names.lock().remove(key)
    }
}

/// A layer that an answer is about to be committed for.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    chain: String,
    labels: Labels,
    resolved: Resolved,
}

/// The same, with what presents it.
#[derive(Clone, Debug)]
pub(super) struct Presented {
    chain: String,
    labels: Labels,
    pub(super) lazy: LazySnapshot,
}

impl Layer {
    /// The one containerd has asked for.
    pub(super) fn asked(
        request: &CreateRequest,
        announced: &Announced,
        resolved: Resolved,
    ) -> Self {
        Self {
            chain: announced.chain.clone(),
            labels: request.labels.clone(),
            resolved,
        }
    }
}

impl Lazy {
    /// The name of a snapshot that is exactly this answer already.
    pub(super) fn answered_before(
        &self,
        request: &CreateRequest,
        announced: &Announced,
        resolved: &Resolved,
    ) -> Result<Option<String>, DriverError> {
        let reader = self.store.read()?;
        for key in reader.by_reference(&request.key.snapshotter, &announced.chain)? {
            let snapshot = reader.snapshot(&key)?;
            let same = snapshot.info.kind == Kind::Committed
                && snapshot.info.parent.as_deref() == request.parent.as_deref()
                && self.layers.snapshot(snapshot.id).is_some_and(|lazy| {
                    lazy.layer == resolved.record.number && lazy.diff_id == resolved.diff_id
                });
            if same {
                return Ok(Some(snapshot.info.name));
            }
        }
        Ok(None)
    }

    /// The layers above the announced one that could be answered right now.
    pub(super) fn above(&self, request: &CreateRequest, announced: &Announced) -> Vec<Layer> {
        let namespace = request.namespace.as_deref().unwrap_or_default();
        self.resolver
            .following(namespace, announced)
            .into_iter()
            .map_while(|following| {
                let labels = labels_above(&request.labels, &following);
                let mut resolved = following.resolved;
                resolved.record = self.layers.hold(resolved.record.number)?;
                let proven = resolved.record.verdict == Verdict::Proven;
                let trusted = self
                    .layers
                    .trusted(&resolved.record, resolved.diff_id)
                    .is_ok();
                (trusted && (proven || !self.only_proven)).then(|| Layer {
                    chain: following.chain.to_string(),
                    labels,
                    resolved,
                })
            })
            .collect()
    }

    /// Chooses each layer's metadata image on top of `chain` and the ones before it, and reserves
    /// the mounts. Only the first has to succeed, and to be waited for.
    pub(super) async fn present(
        &self,
        mut chain: Chain,
        layers: Vec<Layer>,
    ) -> Result<Vec<Presented>, NotLazy> {
        let mut presented: Vec<Presented> = Vec::with_capacity(layers.len());
        let mut keys = Vec::with_capacity(layers.len());
        let begun = Instant::now();
        for layer in layers {
            if !presented.is_empty() && begun.elapsed() > CHOOSING {
                break;
            }
            let record = &layer.resolved.record;
            let below = chain.lookups(&self.layers, &self.overlayfs);
            let variant = match self.layers.variant(record, below).await {
                Ok(variant) => variant,
                Err(reason) if presented.is_empty() => return Err(reason),
                Err(reason) => {
                    debug!(layer = %record.identity.layer, error = %report(&reason), "not committed ahead");
                    break;
                }
            };
            // An empty layer needs no mount.
            keys.push((!record.empty).then(|| MountKey {
                layer: record.number,
                occurrence: chain.occurrences(record.number, &variant),
                variant: variant.clone(),
            }));
            let lazy = LazySnapshot {
                layer: record.number,
                variant,
                mount: None,
                diff_id: layer.resolved.diff_id,
            };
            chain.links.insert(0, Link::Lazy(lazy.clone()));
            presented.push(Presented {
                chain: layer.chain,
                labels: layer.labels,
                lazy,
            });
        }
        let wanted: Vec<MountKey> = keys.iter().flatten().cloned().collect();
        let numbers = self.layers.mounts_for(&wanted).await;
        let mut numbers = numbers.map_err(|error| NotLazy::local(&error))?.into_iter();
        for (layer, key) in presented.iter_mut().zip(keys) {
            layer.lazy.mount = key.and_then(|_| numbers.next());
        }
        Ok(presented)
    }

    /// Commits the first layer's answer and, as far as their names are free, those above it.
    /// Returns the first one's name: the chain ID, unless another identity has that name.
    pub(super) async fn commit_answers(
        &self,
        request: &CreateRequest,
        layers: Vec<Presented>,
    ) -> Result<String, DriverError> {
        let mut reservations = Vec::with_capacity(layers.len());
        let mut answers = Vec::with_capacity(layers.len());
        for layer in layers {
            let reservation = self.store.reserve_id().await?;
            let mut labels = layer.labels;
            labels.insert(REMOTE.to_owned(), "remote snapshot".to_owned());
            let new = CreateSnapshot {
                key: request.key.sibling(&layer.chain),
                kind: Kind::Committed,
                parent: None,
                labels,
                id: reservation.id(),
            };
            reservations.push(reservation);
            answers.push((new, layer.lazy));
        }
        let parent = request.parent.clone();
        let committed = self
            .store
            .write(Durability::Now, move |writer| {
                write(writer, parent.clone(), &answers)
            })
            .await?;
        drop(reservations);
        let mut keys = Vec::with_capacity(committed.len());
        for (key, id, lazy) in committed {
            self.layers.bound(id, lazy);
            keys.push(key);
        }
        let name = keys.first().map(|key| key.key.to_string());
        self.ahead.note(keys.into_iter().skip(1));
        name.ok_or_else(|| DriverError::Internal("an answer without a layer".to_owned()))
    }

    /// Containerd asks for a snapshot that is there already: one committed ahead gets the labels
    /// that this request brings.
    pub(super) async fn take_up(
        &self,
        request: &CreateRequest,
        name: &str,
    ) -> Result<(), DriverError> {
        let key = request.key.sibling(name);
        if !self.ahead.take(&key) {
            return Ok(());
        }
        let mut labels = request.labels.clone();
        labels.insert(REMOTE.to_owned(), "remote snapshot".to_owned());
        labels.retain(|_, value| !value.is_empty());
        if self.store.read()?.info(&key)?.labels == labels {
            return Ok(());
        }
        // containerd keeps them as well: nothing is lost with them.
        self.store
            .write(Durability::Soon, move |writer| {
                writer.update(&key, &labels, &[]).map(drop)
            })
            .await?;
        Ok(())
    }
}

type Committed = (SnapshotKey, SnapshotId, LazySnapshot);

/// Creates the answers on top of each other, up to the first after the asked one whose name is
/// taken.
fn write(
    writer: &mut Writer<'_>,
    parent: Option<Arc<str>>,
    answers: &[(CreateSnapshot, LazySnapshot)],
) -> Result<Vec<Committed>, StoreError> {
    let mut committed: Vec<Committed> = Vec::with_capacity(answers.len());
    let mut parent = parent;
    for (new, lazy) in answers {
        let mut new = CreateSnapshot {
            parent,
            ..new.clone()
        };
        match writer.create(&new) {
            Ok(_) => {}
            Err(StoreError::AlreadyExists { .. }) if committed.is_empty() => {
                new.key = new.key.sibling(&format!("{}+{}", new.key.key, new.id));
                writer.create(&new)?;
            }
            // Asked for, it gets a name of its own.
            Err(StoreError::AlreadyExists { .. }) => break,
            Err(error) => return Err(error),
        }
        Layers::bind(writer, new.id, lazy)?;
        parent = Some(Arc::clone(&new.key.key));
        committed.push((new.key, new.id, lazy.clone()));
    }
    Ok(committed)
}
