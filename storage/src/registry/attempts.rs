//! Which host is asked next: all that can do it, in order; then, after a pause, once more those
//! whose failure may pass.

use std::{collections::VecDeque, sync::Arc};

use super::{
    Inner,
    backoff::{RetryPolicy, jitter},
    endpoint::{Endpoint, Need},
    error::{RegistryError, Target},
    troubles::Troubles,
};

/// The tries of one request.
pub(super) struct Attempts {
    policy: RetryPolicy,
    all: Vec<Arc<Endpoint>>,
    queue: VecDeque<Arc<Endpoint>>,
    later: VecDeque<Arc<Endpoint>>,
    retry: u32,
    errors: Vec<(Arc<Endpoint>, RegistryError)>,
    target: Arc<Target>,
    need: Need,
    troubles: Arc<Troubles>,
}

impl Inner {
    /// The tries of a request about `target`. With `Need::Push` only the first host is asked: a
    /// push that is spread over hosts is none.
    pub(super) async fn attempts(
        &self,
        target: &Arc<Target>,
        need: Need,
    ) -> Result<Attempts, RegistryError> {
        let registry = target.repository.registry();
        let mut all =
            self.endpoints
                .of(registry, need)
                .await
                .map_err(|source| RegistryError::Hosts {
                    registry: registry.to_owned(),
                    source,
                })?;
        if need == Need::Push {
            all.truncate(1);
        }
        Ok(Attempts {
            policy: self.policy,
            queue: all.iter().cloned().collect(),
            all,
            later: VecDeque::new(),
            retry: 0,
            errors: Vec::new(),
            target: Arc::clone(target),
            need,
            troubles: Arc::clone(&self.troubles),
        })
    }
}

impl Attempts {
    /// The host to ask now, after whatever pause is due; `None` when there is none left.
    pub(super) async fn next(&mut self) -> Option<Arc<Endpoint>> {
        loop {
            while let Some(endpoint) = self.queue.pop_front() {
                let busy = endpoint.busy_for();
                if busy.is_zero() {
                    return Some(endpoint);
                }
                if self.queue.is_empty() && self.later.is_empty() {
                    // Nobody else could do it. Those who wait together do not come together.
                    tokio::time::sleep(busy + jitter(busy / 4)).await;
                    return Some(endpoint);
                }
                self.later.push_back(endpoint);
            }
            if self.later.is_empty() || self.retry >= self.policy.retries {
                return None;
            }
            tokio::time::sleep(self.policy.pause(self.retry)).await;
            self.retry += 1;
            self.queue = std::mem::take(&mut self.later);
        }
    }

    /// The host has failed.
    pub(super) fn failed(&mut self, endpoint: &Arc<Endpoint>, error: RegistryError) {
        endpoint.note_failure(&error, self.policy.longest_retry_after);
        let is_transient = error.is_transient();
        if self.all.len() > 1 || is_transient {
            tracing::debug!(
                host = endpoint.authority(),
                error = %error.report(),
                is_transient,
                "a host of a registry failed"
            );
        }
        if is_transient {
            self.troubles.note(&self.target, &error);
        }
        if is_transient && !self.is_waiting(endpoint) {
            self.later.push_back(Arc::clone(endpoint));
        }
        self.errors.retain(|(host, _)| !Arc::ptr_eq(host, endpoint));
        self.errors.push((Arc::clone(endpoint), error));
    }

    /// Part of the work is done: the patience for the rest starts anew, and `endpoint` may go on.
    pub(super) fn progressed(&mut self, endpoint: &Arc<Endpoint>) {
        self.retry = 0;
        if !self.is_waiting(endpoint) {
            self.queue.push_front(Arc::clone(endpoint));
        }
    }

    fn is_waiting(&self, endpoint: &Arc<Endpoint>) -> bool {
        let mut waiting = self.queue.iter().chain(&self.later);
        waiting.any(|other| Arc::ptr_eq(other, endpoint))
    }

    /// Why nobody could do it: the error of the registry itself, which comes last in its list of
    /// hosts, rather than that of a mirror.
    pub(super) fn into_error(mut self) -> RegistryError {
        let order = |host: &Arc<Endpoint>| {
            let position = self.all.iter().position(|other| Arc::ptr_eq(other, host));
            position.unwrap_or(0)
        };
        let last = (0..self.errors.len()).max_by_key(|index| order(&self.errors[*index].0));
        match last {
            Some(index) => self.errors.swap_remove(index).1,
            None => RegistryError::NoEndpoint {
                target: self.target,
                capability: self.need.name(),
            },
        }
    }
}
