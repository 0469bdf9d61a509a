//! Where each blob is really served: redirects that may be used again until they expire.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use formats::digest::Digest;
use http::Uri;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::redirect;

const MAX_ROUTES: usize = 8192;
/// For how long the first reply for a blob is waited for before others ask on their own.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);

/// All known routes.
#[derive(Default)]
pub(super) struct Routes {
    routes: Mutex<HashMap<RouteKey, Arc<Route>>>,
}

/// A blob at a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RouteKey {
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) digest: Digest,
}

/// The way to one blob at one host.
#[derive(Default)]
pub(super) struct Route {
    known: Mutex<Known>,
    finding: Arc<AsyncMutex<()>>,
}

#[derive(Clone, Debug, Default)]
enum Known {
    #[default]
    Nothing,
    /// The host serves the blob itself.
    Direct,
    Redirect {
        url: Uri,
        until: Instant,
    },
}

/// What to do now.
pub(super) enum Way {
    /// Ask this URL; if it refuses, [`Route::forget`] it.
    Redirect(Uri),
    /// Ask the host. While the guard is held, others wait for what it will say.
    Host(#[expect(dead_code, reason = "it is held, not looked at")] Option<OwnedMutexGuard<()>>),
}

impl Routes {
    pub(super) fn of(&self, key: RouteKey) -> Arc<Route> {
        let mut routes = self.routes.lock();
        if routes.len() >= MAX_ROUTES && !routes.contains_key(&key) {
            // Those in use live on in the requests that use them.
            routes.retain(|_, route| Arc::strong_count(route) > 1);
        }
        Arc::clone(routes.entry(key).or_default())
    }
}

impl Route {
    /// The way to take. One request finds it, the others wait a moment for what it finds.
    pub(super) async fn way(&self) -> Way {
        if let Some(way) = self.known_way() {
            return way;
        }
        let finding = Arc::clone(&self.finding).lock_owned();
        let Ok(guard) = tokio::time::timeout(FIRST_PATIENCE, finding).await else {
            return Way::Host(None);
        };
        self.known_way().unwrap_or(Way::Host(Some(guard)))
    }

    fn known_way(&self) -> Option<Way> {
        match &*self.known.lock() {
            Known::Redirect { url, until } if Instant::now() < *until => {
                Some(Way::Redirect(url.clone()))
            }
            Known::Direct => Some(Way::Host(None)),
            _ => None,
        }
    }

    /// The host answered itself, or pointed to `url`.
    pub(super) fn learn(&self, redirected_to: Option<&Uri>) {
        *self.known.lock() = match redirected_to {
            None => Known::Direct,
            Some(url) => Known::Redirect {
                url: url.clone(),
                until: Instant::now() + redirect::lifetime(url, SystemTime::now()),
            },
        };
    }

    /// `url` does not work any more; `None`: the host itself does not.
    pub(super) fn forget(&self, url: Option<&Uri>) {
        let mut known = self.known.lock();
        let is_same = match (&*known, url) {
            (Known::Redirect { url: known, .. }, Some(url)) => known == url,
            (Known::Direct, None) => true,
            _ => false,
        };
        if is_same {
            *known = Known::Nothing;
        }
    }
}
