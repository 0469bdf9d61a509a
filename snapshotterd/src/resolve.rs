//! Resolving images: from the labels of the first extraction Prepare to every layer of the image
//! being known on this node, all layers at once.
//!
//! One [`Resolver`] serves all images and namespaces. The layers that the first Prepare lists get a
//! fixed time together from then on; those that only a later one lists (a label holds about 56) get
//! the same from when they are first heard of, unless the image has run out of time before. What is
//! not resolved by then is unpacked ordinarily. Layers are resolved once per identity, whoever asks.

pub mod labels;
pub mod plan;
pub mod reason;
pub mod registry;
pub mod remote;

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use formats::{digest::Digest, oci::chain_ids};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use tracing::{Instrument as _, info_span};

use self::{
    labels::Announced,
    plan::{Documents, Plan},
    reason::NotLazy,
};
use crate::layers::{
    Layers, Wanted,
    record::{Format, Identity, LayerRecord, Origin},
};

/// A resolution that nobody asked for this long is forgotten.
const KEEP_IDLE: Duration = Duration::from_secs(60);

type Outcome<T> = Shared<BoxFuture<'static, Result<T, NotLazy>>>;

/// A layer that is known on this node, and the DiffID that this image claims for it.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The layer.
    pub record: Arc<LayerRecord>,
    /// The claim, if it is known.
    pub diff_id: Option<Digest>,
}

/// A layer above the announced one, resolved before containerd asks for it.
#[derive(Clone, Debug)]
pub struct Following {
    /// The chain ID its answer will be committed for.
    pub chain: Digest,
    /// The chain ID below.
    pub below: Digest,
    /// The layers from this one on.
    pub layers: Vec<Digest>,
    /// The layer.
    pub resolved: Resolved,
}

/// Resolves images.
pub struct Resolver {
    documents: Documents,
    layers: Arc<Layers>,
    limit: Duration,
    images: Mutex<HashMap<ImageKey, Arc<Image>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ImageKey {
    namespace: String,
    image: String,
    manifest: Option<Digest>,
}

impl ImageKey {
    fn of(namespace: &str, announced: &Announced) -> Self {
        Self {
            namespace: namespace.to_owned(),
            image: announced.image.clone(),
            manifest: announced.manifest,
        }
    }
}

/// One image being pulled.
struct Image {
    key: ImageKey,
    deadline: tokio::time::Instant,
    plan: Outcome<Arc<Plan>>,
    state: Mutex<ImageState>,
}

struct ImageState {
    layers: HashMap<(Digest, Option<Digest>), Begun>,
    asked: HashMap<Digest, usize>,
    failed: bool,
    /// A layer was not resolved in time: the others get no time of their own any more.
    late: bool,
    last_used: Instant,
}

/// A layer that is being resolved for an image.
#[derive(Clone)]
struct Begun {
    outcome: Outcome<Resolved>,
    at: tokio::time::Instant,
}

impl Resolver {
    /// A resolver that allows `limit` for all layers of an image together.
    pub fn new(documents: Documents, layers: Arc<Layers>, limit: Duration) -> Self {
        Self {
            documents,
            layers,
            limit,
            images: Mutex::default(),
        }
    }

    /// The layer that `announced` names, as soon as it is known here, or why it is not lazy.
    pub async fn resolve(
        &self,
        namespace: &str,
        announced: &Announced,
    ) -> Result<Resolved, NotLazy> {
        let image = self.image(namespace, announced);
        self.start_all(&image, announced);
        let begun = self.start(&image, announced.layer, announced.toc);
        let deadline = if image.state.lock().late {
            image.deadline
        } else {
            image.deadline.max(begun.at + self.limit)
        };
        let answer = tokio::time::timeout_at(deadline, begun.outcome)
            .await
            .unwrap_or_else(|_| Err(self.too_late(&image, announced)));
        let mut state = image.state.lock();
        state.last_used = Instant::now();
        state.failed |= answer.is_err();
        state.late |= matches!(answer, Err(NotLazy::Deadline { .. }));
        drop(state);
        // Without a manifest digest nothing but the label binds the index.
        if announced.manifest.is_none() && announced.toc.is_none() {
            return Err(answer.err().unwrap_or_else(|| NotLazy::NoTocDigest {
                image: announced.image.clone(),
                layer: announced.layer,
                media_type: "no TOC digest label, no manifest digest label".to_owned(),
            }));
        }
        let mut resolved = answer?;
        // containerd 2.3 and later say it themselves.
        resolved.diff_id = announced.diff_id.or(resolved.diff_id);
        Ok(resolved)
    }

    /// Says where a layer was when its time was up.
    fn too_late(&self, image: &Image, announced: &Announced) -> NotLazy {
        let by_manifest = image.key.manifest;
        let planned = match image.plan.peek() {
            Some(Ok(plan)) => plan.layer(announced.layer),
            _ => None,
        };
        let label = announced.toc.filter(|_| by_manifest.is_none());
        let index = label.or_else(|| planned?.bound_index(&image.key.image).ok());
        let (step, asked) = if image.plan.peek().is_none() {
            ("reading the image's manifest and config", by_manifest)
        } else {
            let identity = index.map(|index| Identity {
                layer: announced.layer,
                format: Format::Estargz,
                index,
            });
            let step = identity.and_then(|identity| self.layers.step_of(&identity));
            (step.unwrap_or("recording it"), Some(announced.layer))
        };
        let remote = &self.documents.remote;
        NotLazy::Deadline {
            image: image.key.image.clone(),
            layer: announced.layer,
            limit: self.limit,
            step,
            trouble: asked.and_then(|digest| remote.trouble(&image.key.image, digest)),
        }
    }

    /// The layers right above the announced one that are known here by now, up to the first that
    /// is not. Asks nobody and waits for nothing.
    pub fn following(&self, namespace: &str, announced: &Announced) -> Vec<Following> {
        let key = ImageKey::of(namespace, announced);
        let Some(image) = self.images.lock().get(&key).map(Arc::clone) else {
            return Vec::new();
        };
        let Some(Ok(plan)) = image.plan.clone().now_or_never() else {
            return Vec::new();
        };
        let diff_ids: Vec<Digest> = plan
            .layers
            .iter()
            .map_while(|layer| layer.diff_id)
            .collect();
        let chains = chain_ids(&diff_ids);
        let here = chains.iter().zip(&plan.layers).position(|(chain, layer)| {
            layer.digest == announced.layer && chain.to_string() == announced.chain
        });
        let Some(here) = here else {
            return Vec::new();
        };
        let digests: Vec<Digest> = plan.layers.iter().map(|layer| layer.digest).collect();
        (here + 1..chains.len())
            .map_while(|index| {
                let known = image.state.lock();
                let coming = known.layers.get(&(digests[index], None))?.clone();
                drop(known);
                let resolved = coming.outcome.now_or_never()?.ok()?;
                Some(Following {
                    chain: chains[index],
                    below: chains[index - 1],
                    layers: digests[index..].to_vec(),
                    resolved,
                })
            })
            .collect()
    }

    /// The resolution `announced` belongs to. A layer that is asked for again after a failure
    /// belongs to a new pull, with time of its own.
    fn image(&self, namespace: &str, announced: &Announced) -> Arc<Image> {
        let key = ImageKey::of(namespace, announced);
        let mut images = self.images.lock();
        images.retain(|_, image| {
            Arc::strong_count(image) > 1 || image.state.lock().last_used.elapsed() < KEEP_IDLE
        });
        if let Some(image) = images.get(&key) {
            let image = Arc::clone(image);
            let mut state = image.state.lock();
            let times = announced.times(announced.layer);
            let asked = state.asked.entry(announced.layer).or_default();
            *asked += 1;
            let again = *asked > times;
            if !(again && state.failed) {
                drop(state);
                return image;
            }
        }
        let plan = self.plan(&key);
        let image = Arc::new(Image {
            deadline: tokio::time::Instant::now() + self.limit,
            plan,
            state: Mutex::new(ImageState {
                layers: HashMap::new(),
                asked: HashMap::from([(announced.layer, 1)]),
                failed: false,
                late: false,
                last_used: Instant::now(),
            }),
            key: key.clone(),
        });
        images.insert(key, Arc::clone(&image));
        image
    }

    fn plan(&self, key: &ImageKey) -> Outcome<Arc<Plan>> {
        let (documents, key) = (self.documents.clone(), key.clone());
        spawn(
            async move {
                documents
                    .plan(&key.namespace, &key.image, key.manifest)
                    .await
                    .map(Arc::new)
            },
            "manifest",
        )
    }

    /// Starts every layer from the announced one upwards, whether it is asked for yet or not.
    fn start_all(&self, image: &Arc<Image>, announced: &Announced) {
        for digest in &announced.layers {
            let bound = (*digest == announced.layer)
                .then_some(announced.toc)
                .flatten();
            drop(self.start(image, *digest, bound));
        }
    }

    /// Resolves a layer once per image. What binds its index is the manifest that the request
    /// named by digest; without one, the layer's own label, and the manifest that the image's name
    /// leads to only gives what can be checked: size, DiffID, and a head start for later layers.
    fn start(&self, image: &Arc<Image>, digest: Digest, label: Option<Digest>) -> Begun {
        let by_manifest = image.key.manifest.is_some();
        let label = label.filter(|_| !by_manifest);
        let mut state = image.state.lock();
        let begun = state.layers.get(&(digest, label));
        if let Some(begun) = begun.filter(|begun| !self.is_gone(begun)) {
            return begun.clone();
        }
        let (plan, layers, key) = (
            image.plan.clone(),
            Arc::clone(&self.layers),
            image.key.clone(),
        );
        let resolve = async move {
            let plan = plan.await?;
            let planned = plan.layer(digest).ok_or_else(|| NotLazy::NotInManifest {
                image: key.image.clone(),
                layer: digest,
            })?;
            let index = match label {
                Some(label) => label,
                None => planned.bound_index(&key.image)?,
            };
            // A config speaks for the layers of its own manifest only.
            let diff_id = planned
                .diff_id
                .filter(|_| planned.index.as_ref() == Ok(&index));
            let wanted = Wanted {
                identity: Identity {
                    layer: digest,
                    format: Format::Estargz,
                    index,
                },
                blob_len: planned.size,
                origin: Origin {
                    image: key.image,
                    namespace: key.namespace,
                    manifest: Some(plan.manifest).filter(|_| diff_id.is_some() || by_manifest),
                    diff_id,
                },
                diff_id,
            };
            let record = layers.obtain(wanted).await?;
            Ok(Resolved { record, diff_id })
        };
        let begun = Begun {
            outcome: spawn(resolve, "layer"),
            at: tokio::time::Instant::now(),
        };
        state.layers.insert((digest, label), begun.clone());
        begun
    }

    /// Whether a layer was resolved and has been deleted since, because nobody used it.
    fn is_gone(&self, begun: &Begun) -> bool {
        let resolved = begun.outcome.peek().and_then(|answer| answer.as_ref().ok());
        resolved.is_some_and(|resolved| self.layers.record(resolved.record.number).is_none())
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// Runs `work` to its end whether or not somebody waits, and shares its result.
fn spawn<T: Clone + Send + Sync + 'static>(
    work: impl Future<Output = Result<T, NotLazy>> + Send + 'static,
    what: &'static str,
) -> Outcome<T> {
    let task = tokio::spawn(work.instrument(info_span!("resolve", what)));
    async move {
        task.await
            .unwrap_or_else(|error| Err(NotLazy::Local(error.to_string().into())))
    }
    .boxed()
    .shared()
}
