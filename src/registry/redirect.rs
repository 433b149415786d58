//! Where blobs really are: registries answer a request for a blob with a redirect to signed storage, and asking them
//! again for every range would double the round trips.
//!
//! Invariant: a remembered URL is of another origin than the registry, so it is used without credentials.
//! A URL that stops working (expired signature, moved object) is forgotten by whoever notices, who then asks the registry.

use super::{HostId, bounded::Bounded};
use crate::oci::Digest;
use ::url::Url;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a URL is believed in when it does not say itself how long it is valid.
const DEFAULT_TTL: Duration = Duration::from_secs(600);
/// URLs remembered: a few kB each, one per layer and host.
const CAPACITY: usize = 4096;

/// A blob of a repository on one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BlobKey {
    pub host: HostId,
    pub repository: Arc<str>,
    pub digest: Digest,
}

#[derive(Debug)]
pub(super) struct RedirectCache(Mutex<Bounded<BlobKey, (Instant, Arc<Url>)>>);

impl RedirectCache {
    pub fn new() -> RedirectCache {
        RedirectCache(Mutex::new(Bounded::new(CAPACITY)))
    }

    pub fn get(&self, key: &BlobKey) -> Option<Arc<Url>> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, url) = map.get(key)?.clone();
        if Instant::now() < until {
            return Some(url);
        }
        map.remove(key);
        None
    }

    pub fn insert(&self, key: BlobKey, url: Url) {
        let until = Instant::now() + time_to_live(&url);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, (until, Arc::new(url)));
    }

    /// Forgets `url`, unless somebody else has already put a newer one in its place.
    pub fn forget(&self, key: &BlobKey, url: &Arc<Url>) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if map.get(key).is_some_and(|(_, known)| Arc::ptr_eq(known, url)) {
            map.remove(key);
        }
    }

    /// Forgets whatever is known of `key`.
    pub fn forget_any(&self, key: &BlobKey) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

/// Nine tenths of the validity that signed URLs of S3 and Google storage carry.
fn time_to_live(url: &Url) -> Duration {
    let stated = url
        .query_pairs()
        .find(|(key, _)| key.eq_ignore_ascii_case("X-Amz-Expires") || key.eq_ignore_ascii_case("X-Goog-Expires"))
        .and_then(|(_, value)| value.parse::<u32>().ok());
    match stated {
        Some(seconds) => (Duration::from_secs(seconds.into()) * 9 / 10).min(DEFAULT_TTL * 6),
        None => DEFAULT_TTL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_url_is_used_only_while_its_signature_holds() {
        let ttl = |text| time_to_live(&Url::parse(text).unwrap());
        assert_eq!(ttl("https://s3/x?X-Amz-Expires=1200&X-Amz-Signature=a"), Duration::from_secs(1080));
        assert_eq!(ttl("https://s3/x?X-Amz-Expires=4294967295"), Duration::from_secs(3600));
        assert_eq!(ttl("https://cdn/x"), DEFAULT_TTL);
    }
}
