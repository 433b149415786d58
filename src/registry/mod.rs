//! Registries: manifests, referrers and ranges of blobs, from mirrors and origin, over whatever trouble can be waited out.
//!
//! Invariants:
//! * Every request asks the mirrors in order, then the registry; a host that is down costs one time-out (`hosts`, `client`).
//! * Credentials are sent to the origin they belong to and to nobody else; redirects are followed here (`client`, `auth`).
//! * Everything a peer sends is bounded: headers by the HTTP library, bodies by a size that the caller gives (`body`).
//! * Manifests and whole blobs come out only when they match their digest. Ranges come out as they arrive, exactly as
//!   long as asked for but *not* verified: only the zTOC knows the digest of a span.
//! * No text made here (error, log) holds a query value or a secret (`url`, `error`).
//!
//! ```text
//! Repository ── client: hosts × attempts ── one attempt: remembered place, or registry + auth + redirects ── transport
//! ```
//!
//! [`Throttle`] is the count of requests for layers that are in flight, shared by all who download them.
//!
//! Absent on purpose: which bytes to fetch when (`layers`), what to do with an index (`index`).
#![forbid(unsafe_code)]

mod auth;
mod body;
pub(crate) mod bounded;
mod challenge;
mod client;
mod directory;
mod endpoint;
mod error;
mod hosts;
mod hosts_file;
mod proving;
mod proxy;
mod push;
mod redirect;
mod referrers;
mod retry;
mod settings;
mod throttle;
mod transport;
mod url;

pub use body::RangeBody;
pub use endpoint::HostId;
pub use error::{Class, RegistryError, Request};
pub use hosts::{DecidedBy, HostReport};
pub use hosts_file::Capabilities;
pub use proxy::unusable_proxies;
pub use push::{Pushed, Upload};
pub use retry::RetrySettings;
pub use settings::{DEFAULT_DIRECTORIES, HostSettings, HttpSettings, Limit, Mirror, MirrorTimeout, Security, TlsFlags};
pub use throttle::{Reading, Slot, Throttle};
pub use transport::{Kind, Observer, Outcome};

use crate::{
    keychain::Keychain,
    oci::{Descriptor, Digest, Reference},
};
use body::{Excess, content_range};
use bytes::Bytes;
use client::{Ask, Client, Site};
use endpoint::{Endpoint, Need};
use error::Failure;
use hosts::Hosts;
use http::{StatusCode, header};
use std::{
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
};
use transport::{Transport, Unobserved, text};

/// What may come as a manifest, as containerd lists it.
const MANIFEST_TYPES: &str = "application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, application/vnd.oci.artifact.manifest.v1+json, */*;q=0.1";

/// The way to all registries. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    /// What repositories are made with from now on; those that exist keep theirs.
    client: Arc<RwLock<Arc<Client>>>,
    observer: Arc<dyn Observer>,
}

/// One repository. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    site: Site,
}

/// A manifest or index as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    pub bytes: Bytes,
    pub media_type: String,
    /// Of `bytes`.
    pub digest: Digest,
}

impl Registry {
    pub fn new(http: HttpSettings, hosts: HostSettings, keychain: Arc<Keychain>) -> Result<Registry, RegistryError> {
        Registry::observed(http, hosts, keychain, Arc::new(Unobserved))
    }

    /// As [`Registry::new`]; `observer` is told about every exchange.
    pub fn observed(
        http: HttpSettings,
        hosts: HostSettings,
        keychain: Arc<Keychain>,
        observer: Arc<dyn Observer>,
    ) -> Result<Registry, RegistryError> {
        let transport = Arc::new(Transport::new(&http, observer.clone())?);
        let client = Client {
            transport: transport.clone(),
            hosts: Hosts::new(hosts, transport, http.recovery()),
            settings: http,
            auth: auth::Auth::new(keychain),
            redirects: redirect::RedirectCache::new(),
        };
        Ok(Registry { client: Arc::new(RwLock::new(Arc::new(client))), observer })
    }

    /// Other settings for the repositories that are made from now on, here and in every clone. An error changes nothing.
    pub fn reconfigure(&self, http: HttpSettings, hosts: HostSettings) -> Result<(), RegistryError> {
        let transport = Arc::new(Transport::new(&http, self.observer.clone())?);
        let mut client = self.client.write().unwrap_or_else(PoisonError::into_inner);
        *client = Arc::new(Client {
            transport: transport.clone(),
            hosts: Hosts::new(hosts, transport, http.recovery()),
            settings: http,
            auth: auth::Auth::new(client.auth.keychain()),
            redirects: redirect::RedirectCache::new(),
        });
        Ok(())
    }

    fn client(&self) -> Arc<Client> {
        self.client.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The repository that `reference` names. Asks nobody; an error says what is wrong with the configuration of its host.
    pub fn repository(&self, reference: &Reference) -> Result<Repository, RegistryError> {
        let site = Site {
            client: self.client(),
            name: reference.repository.as_str().into(),
            reference: Arc::new(reference.clone()),
        };
        site.endpoints()?;
        Ok(Repository { site })
    }

    /// What is in force for every image host that something is configured for.
    pub fn hosts_report(&self) -> Vec<HostReport> {
        self.client().hosts.report()
    }
}

impl Repository {
    /// The reference this repository was made from.
    pub fn reference(&self) -> &Reference {
        &self.site.reference
    }

    /// The manifest or index under a tag or digest. Its digest is checked where there is one to check against.
    pub async fn manifest(&self, target: &str) -> Result<Fetched, RegistryError> {
        let site = &self.site;
        let expected: Option<Digest> = target.parse().ok();
        let path = format!("manifests/{target}");
        let path = path.as_str();
        let settings = &site.client.settings;
        let need = if expected.is_some() { Need::Pull } else { Need::Resolve };
        site.ask(need, &settings.retry, &[], |endpoint, places| async move {
            let ask = Ask { kind: Kind::Manifest, path, accept: Some(MANIFEST_TYPES), range: None, blob: None, places };
            let body = site.open(&endpoint, &ask).await?;
            let headers = body.response().headers();
            let media_type = text(headers, header::CONTENT_TYPE).unwrap_or_default();
            let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
            let stated: Option<Digest> =
                headers.get("docker-content-digest").and_then(|d| d.to_str().ok()).and_then(|d| d.parse().ok());
            let request = body.request().clone();
            let bytes = body.read(settings.manifest_max).await?;
            let digest = Digest::of(&bytes);
            match expected.or(stated) {
                Some(expected) if expected != digest => {
                    Err(Failure::corrupt(RegistryError::DigestMismatch { request, expected, actual: digest }))
                }
                _ => Ok(Fetched { bytes, media_type, digest }),
            }
        })
        .await
    }

    /// Descriptors of what refers to `manifest` and has `artifact_type`, in the registry's order.
    pub async fn referrers(&self, manifest: Digest, artifact_type: &str) -> Result<Vec<Descriptor>, RegistryError> {
        let site = &self.site;
        let result = site
            .ask(Need::Pull, &site.client.settings.retry, &[], |endpoint, places| async move {
                let is_last = site.hosts(Need::Pull)?.last().is_some_and(|last| last.id == endpoint.id);
                let found = referrers::of_host(site, &endpoint, places, manifest, artifact_type).await?;
                if found.is_empty() && !is_last {
                    // A mirror need not know of referrers; the registry does.
                    let request = error::Request::new("GET", &site.url(&endpoint, &format!("referrers/{manifest}"))?);
                    return Err(Failure::elsewhere(RegistryError::NotFound { request }));
                }
                Ok(found)
            })
            .await;
        match result {
            Err(RegistryError::NotFound { .. }) => Ok(Vec::new()),
            other => other,
        }
    }

    /// A whole blob of at most `max` bytes, its digest checked.
    pub async fn blob(&self, digest: Digest, max: u64) -> Result<Bytes, RegistryError> {
        let site = &self.site;
        let path = format!("blobs/{digest}");
        let path = path.as_str();
        site.ask(Need::Pull, &site.client.settings.blob_retry, &[], |endpoint, places| async move {
            let ask = Ask { kind: Kind::Blob, path, accept: None, range: None, blob: Some(digest), places };
            let body = site.open(&endpoint, &ask).await?;
            refuse_encoding(&body)?;
            let request = body.request().clone();
            let bytes = body.read(max).await?;
            let actual = Digest::of(&bytes);
            if actual != digest {
                return Err(Failure::corrupt(RegistryError::DigestMismatch { request, expected: digest, actual }));
            }
            Ok(bytes)
        })
        .await
    }

    /// The size of a blob, from the headers of a request for its first byte.
    pub async fn blob_size(&self, digest: Digest) -> Result<u64, RegistryError> {
        let site = &self.site;
        let path = format!("blobs/{digest}");
        let path = path.as_str();
        let sized = site
            .ask(Need::Pull, &site.client.settings.blob_retry, &[], |endpoint, places| async move {
                let ask = Ask { kind: Kind::Range, path, accept: None, range: Some(0..1), blob: Some(digest), places };
                let body = site.open(&endpoint, &ask).await?;
                let response = body.response();
                let size = match response.status() {
                    StatusCode::PARTIAL_CONTENT => text(response.headers(), header::CONTENT_RANGE)
                        .and_then(content_range)
                        .and_then(|(_, _, total)| total),
                    _ => stated_length(&body),
                };
                size.ok_or_else(|| {
                    Failure::malformed(body.request(), "the registry does not say how large the blob is")
                })
            })
            .await;
        match sized {
            // A blob without a first byte.
            Err(RegistryError::Refused { status: 416, .. }) => Ok(0),
            other => other,
        }
    }

    /// The bytes `range` of a blob, from a host that is not in `avoid` unless no other is left.
    ///
    /// Comes back when the headers are here. `Content-Range` has been checked against what was asked. A registry that
    /// sends the whole blob instead is put up with when the range starts at 0, and is
    /// [`RegistryError::RangesUnsupported`] otherwise.
    pub async fn blob_range(
        &self,
        digest: Digest,
        range: Range<u64>,
        avoid: &[HostId],
    ) -> Result<RangeBody, RegistryError> {
        let site = &self.site;
        let path = format!("blobs/{digest}");
        let path = path.as_str();
        let range = &range;
        site.ask(Need::Pull, &site.client.settings.blob_retry, avoid, |endpoint, places| async move {
            if range.is_empty() {
                return Ok(RangeBody::new(None, 0, Excess::CutOff, endpoint, None));
            }
            let ask =
                Ask { kind: Kind::Range, path, accept: None, range: Some(range.clone()), blob: Some(digest), places };
            let body = site.open(&endpoint, &ask).await?;
            refuse_encoding(&body)?;
            range_body(endpoint, body, range)
        })
        .await
    }

    /// A whole blob of `size` bytes in one plain request, as it arrives: for registries that mishandle ranges. Otherwise like
    /// [`Repository::blob_range`], but however long it takes, as long as it goes on.
    pub async fn blob_stream(&self, digest: Digest, size: u64, avoid: &[HostId]) -> Result<RangeBody, RegistryError> {
        let site = &self.site;
        let path = format!("blobs/{digest}");
        let path = path.as_str();
        site.ask(Need::Pull, &site.client.settings.blob_retry, avoid, |endpoint, places| async move {
            let ask = Ask { kind: Kind::Blob, path, accept: None, range: None, blob: Some(digest), places };
            let body = site.open(&endpoint, &ask).await?;
            refuse_encoding(&body)?;
            range_body(endpoint, body.unhurried(), &(0..size))
        })
        .await
    }

    /// What was wrong with its hosts when they were asked last; none if they answered, or were not asked. Asks nobody.
    pub fn trouble(&self) -> Option<String> {
        let hosts = self.site.hosts(Need::Pull).ok()?;
        hosts.iter().rev().find_map(|host| host.trouble()).map(String::from)
    }

    /// Opens up to `connections` connections to where `digest` is served from, and gets whatever proof is needed, so that
    /// the first reads find them open. Failures are left for those reads to find.
    pub async fn warm(&self, digest: Digest, connections: usize) {
        let touch = || async {
            if let Ok(mut body) = self.blob_range(digest, 0..1, &[]).await {
                while let Ok(Some(_)) = body.chunk().await {}
            }
        };
        // The first finds the way; the others then take it at the same time.
        touch().await;
        futures::future::join_all((1..connections).map(|_| touch())).await;
    }
}

fn range_body(endpoint: Arc<Endpoint>, body: body::Body, range: &Range<u64>) -> Result<RangeBody, Failure> {
    let response = body.response();
    let length = range.end - range.start;
    if response.status() != StatusCode::PARTIAL_CONTENT {
        if range.start != 0 {
            let request = body.request().clone();
            return Err(Failure::elsewhere(RegistryError::RangesUnsupported { request }));
        }
        let total = stated_length(&body);
        return Ok(RangeBody::new(Some(body), length, Excess::CutOff, endpoint, total));
    }
    let stated = text(response.headers(), header::CONTENT_RANGE).and_then(content_range);
    let total = match stated {
        Some((first, last, total)) if first == range.start && last == range.end - 1 => total,
        Some((first, last, _)) => {
            let what = format!("asked for bytes {}-{}, got {first}-{last}", range.start, range.end - 1);
            return Err(Failure::malformed(body.request(), what));
        }
        None => return Err(Failure::malformed(body.request(), "the answer does not say which range it is")),
    };
    if stated_length(&body).is_some_and(|stated| stated != length) {
        return Err(Failure::malformed(body.request(), "the body is not as long as its range"));
    }
    Ok(RangeBody::new(Some(body), length, Excess::Error, endpoint, total))
}

fn stated_length(body: &body::Body) -> Option<u64> {
    text(body.response().headers(), header::CONTENT_LENGTH)?.parse().ok()
}

/// We ask for the bytes as they are; compressed ones would be other bytes.
fn refuse_encoding(body: &body::Body) -> Result<(), Failure> {
    match text(body.response().headers(), header::CONTENT_ENCODING) {
        None | Some("identity" | "") => Ok(()),
        Some(_) => Err(Failure::malformed(body.request(), "the registry encodes blobs for transport")),
    }
}
