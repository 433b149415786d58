//! Putting things into a registry: blobs in pieces that can be taken up again, manifests, and the list of referrers.
//!
//! * Only the registry itself is pushed to, never a mirror.
//! * A blob that is there is not sent; one that another repository of the registry has is mounted from there, if we may read it there.
//! * A blob goes up in pieces of [`PIECE`]; a piece that was lost is sent again from where the registry says it got to, so that no more
//!   than one piece has to be in memory.
//! * Where the registry has no referrers API, the tag `sha256-<hex>` stands in for it, and is everybody's: it is read, extended and
//!   written conditionally, and read again, until it holds our entry and still does a moment later (see [`Repository::refer`]).

use super::{
    RegistryError, Repository,
    body::Body,
    client::Site,
    endpoint::{Endpoint, Need},
    error::{Advice, Failure, Request},
    proving::Proving,
    referrers::fallback_tag,
    retry,
    transport::{Kind, Reply, To, text},
    url::same_origin,
};
use crate::oci::{Descriptor, Digest, Index, media_type};
use ::url::Url;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use std::{sync::Arc, time::Duration};

/// One request's worth of a blob. ECR takes no pieces below 5 MiB but the last.
pub const PIECE: usize = 8 << 20;
/// As many as other clients follow.
const MAX_REDIRECTS: usize = 5;
/// How often the fallback tag is written before we give up: each time, somebody else's entry got in between.
const TAG_ATTEMPTS: u32 = 20;
/// How long after writing the tag somebody who had read it before may still write what he made of it: about the time between a read and
/// a write of a slow client, and some more to spread those who do the same.
const TAG_SETTLES: Duration = Duration::from_millis(250);

/// How a manifest with a subject was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// The registry lists it among the referrers of its subject.
    Listed,
    /// It did not say so.
    Stored,
}

/// A request, but for where it goes and who sends it.
struct Sending<'a> {
    kind: Kind,
    method: Method,
    headers: &'a [(HeaderName, &'a str)],
    body: Bytes,
    /// Another repository of the registry that is read by it.
    also: Option<&'a str>,
}

impl<'a> Sending<'a> {
    fn new(kind: Kind, method: Method) -> Sending<'a> {
        Sending { kind, method, headers: &[], body: Bytes::new(), also: None }
    }

    fn http(&self, url: &Url, proof: Option<&HeaderValue>) -> reqwest::Request {
        let mut http = reqwest::Request::new(self.method.clone(), url.clone());
        let headers = http.headers_mut();
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name.clone(), value);
            }
        }
        if let Some(proof) = proof {
            headers.insert(header::AUTHORIZATION, proof.clone());
        }
        if matches!(self.method, Method::POST | Method::PUT | Method::PATCH) {
            headers.insert(header::CONTENT_LENGTH, self.body.len().into());
            *http.body_mut() = Some(self.body.clone().into());
        }
        http
    }
}

/// A blob on its way up.
pub struct Upload {
    repository: Repository,
    /// Where the next piece goes.
    place: Url,
    /// Bytes that the registry has taken.
    taken: u64,
    piece: BytesMut,
}

/// What became of asking for an upload.
enum Begun {
    Mounted,
    At(Url),
}

impl Repository {
    /// Whether the registry has the blob.
    pub async fn has_blob(&self, digest: Digest) -> Result<bool, RegistryError> {
        self.has(Kind::Blob, &format!("blobs/{digest}"), &[]).await
    }

    /// Whether the registry has the manifest.
    pub async fn has_manifest(&self, digest: Digest) -> Result<bool, RegistryError> {
        let accept = [(header::ACCEPT, super::MANIFEST_TYPES)];
        self.has(Kind::Manifest, &format!("manifests/{digest}"), &accept).await
    }

    async fn has(&self, kind: Kind, path: &str, headers: &[(HeaderName, &str)]) -> Result<bool, RegistryError> {
        let site = &self.site;
        let sending = Sending { headers, ..Sending::new(kind, Method::HEAD) };
        let sending = &sending;
        let found = patiently(site, |endpoint| async move {
            let url = site.url(&endpoint, path)?;
            send(site, &endpoint, sending, &url, &url).await.map(drop)
        });
        match found.await {
            Ok(()) => Ok(true),
            Err(RegistryError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the blob could be taken over from the repository `from` of the same registry.
    pub async fn mount(&self, digest: Digest, from: &str) -> Result<bool, RegistryError> {
        use RegistryError::{NotFound, Refused, Unauthorized};
        match self.begin(Some((digest, from))).await {
            Ok(Begun::Mounted) => Ok(true),
            // Who may not read it there, or where mounting is not known, may still upload it.
            Err(NotFound { .. } | Refused { .. } | Unauthorized { .. }) => Ok(false),
            Err(error) => Err(error),
            // We did not ask for an upload.
            Ok(Begun::At(place)) => {
                self.upload_at(place).cancel().await;
                Ok(false)
            }
        }
    }

    fn upload_at(&self, place: Url) -> Upload {
        Upload { repository: self.clone(), place, taken: 0, piece: BytesMut::new() }
    }

    async fn begin(&self, mount: Option<(Digest, &str)>) -> Result<Begun, RegistryError> {
        let site = &self.site;
        let path = match mount {
            None => "blobs/uploads/".to_owned(),
            Some((digest, from)) => {
                let mut query = ::url::form_urlencoded::Serializer::new(String::new());
                query.append_pair("mount", &digest.to_string()).append_pair("from", from);
                format!("blobs/uploads/?{}", query.finish())
            }
        };
        let path = path.as_str();
        patiently(site, |endpoint| async move {
            let url = site.url(&endpoint, path)?;
            let also = mount.map(|(_, from)| from);
            let sending = Sending { also, ..Sending::new(Kind::Blob, Method::POST) };
            let answer = send(site, &endpoint, &sending, &url, &url).await?;
            if mount.is_some() && answer.status == StatusCode::CREATED {
                return Ok(Begun::Mounted);
            }
            match answer.location(&url) {
                Some(place) => Ok(Begun::At(place)),
                None => Err(Failure::malformed(&answer.request, "the registry does not say where to upload to")),
            }
        })
        .await
    }

    /// Begins to upload a blob.
    pub async fn upload(&self) -> Result<Upload, RegistryError> {
        match self.begin(None).await? {
            Begun::At(place) => Ok(self.upload_at(place)),
            // Nothing was to be mounted.
            Begun::Mounted => {
                Err(RegistryError::Setup { what: "the registry mounted what it was not asked to".into() })
            }
        }
    }

    /// Uploads a blob that is in memory, unless it is there; says whether it was sent.
    pub async fn push_blob(&self, digest: Digest, bytes: Bytes) -> Result<bool, RegistryError> {
        if self.has_blob(digest).await? {
            return Ok(false);
        }
        let mut upload = self.upload().await?;
        upload.write(bytes).await?;
        upload.finish(digest).await?;
        Ok(true)
    }

    /// Stores a manifest or index under a tag or its digest.
    pub async fn push_manifest(&self, target: &str, media_type: &str, bytes: Bytes) -> Result<Pushed, RegistryError> {
        self.put_manifest(target, media_type, bytes, None).await
    }

    async fn put_manifest(
        &self,
        target: &str,
        media_type: &str,
        bytes: Bytes,
        only_if: Option<&str>,
    ) -> Result<Pushed, RegistryError> {
        let site = &self.site;
        let path = format!("manifests/{target}");
        let mut headers = vec![(header::CONTENT_TYPE, media_type)];
        headers.extend(only_if.map(|etag| (header::IF_MATCH, etag)));
        let (path, headers, bytes) = (path.as_str(), headers.as_slice(), &bytes);
        patiently(site, |endpoint| async move {
            let url = site.url(&endpoint, path)?;
            let sending = Sending { headers, body: bytes.clone(), ..Sending::new(Kind::Manifest, Method::PUT) };
            let answer = send(site, &endpoint, &sending, &url, &url).await?;
            Ok(if answer.headers.contains_key("oci-subject") { Pushed::Listed } else { Pushed::Stored })
        })
        .await
    }

    /// Sees to it that `referrer`, which was pushed, is found as one that refers to `subject`, where the registry does not do that by
    /// itself: by an entry in the index under the tag `sha256-<hex>`.
    ///
    /// Others extend that index, too, and most registries take whatever was written last. So: read, add, write (with `If-Match` where
    /// the registry gives tags of entities), and after a moment read again. Whoever had read before our write has written by then; if
    /// that lost our entry we add it again, to what is there now, and since everybody's entry is looked after by who made it, all stay.
    pub async fn refer(&self, subject: Digest, referrer: &Descriptor) -> Result<(), RegistryError> {
        for _ in 0..TAG_ATTEMPTS {
            let (current, etag) = self.fallback_index(subject).await?;
            let Some(extended) = extended(&current, referrer) else { return Ok(()) };
            let bytes = extended.map_err(|what| RegistryError::Setup {
                what: format!("the list of what refers to {subject} {what}"),
            })?;
            let put = self.put_manifest(&fallback_tag(subject), media_type::OCI_INDEX, bytes, etag.as_deref()).await;
            match put {
                Ok(_) => {}
                // Somebody was quicker.
                Err(RegistryError::Refused { status: 412 | 409, .. }) => {}
                Err(error) => return Err(error),
            }
            let jitter = Duration::from_millis(retry::random() % 250);
            tokio::time::sleep(TAG_SETTLES + jitter).await;
        }
        let what = format!("the list of what refers to {subject} is changed by others faster than we can; push again");
        Err(RegistryError::Setup { what })
    }

    /// The index under the fallback tag, and its entity tag; an empty one if there is none.
    async fn fallback_index(&self, subject: Digest) -> Result<(serde_json::Value, Option<String>), RegistryError> {
        let site = &self.site;
        let path = format!("manifests/{}", fallback_tag(subject));
        let path = path.as_str();
        let max = site.client.settings.manifest_max;
        let read = patiently(site, |endpoint| async move {
            let url = site.url(&endpoint, path)?;
            let headers = [(header::ACCEPT, media_type::OCI_INDEX)];
            let sending = Sending { headers: &headers, ..Sending::new(Kind::Referrers, Method::GET) };
            let answer = send(site, &endpoint, &sending, &url, &url).await?;
            let etag = text(&answer.headers, header::ETAG).map(str::to_owned);
            let request = answer.request.clone();
            let bytes = answer.body(site).read(max).await?;
            let index = serde_json::from_slice(&bytes)
                .map_err(|_| Failure::malformed(&request, "the fallback tag is not an index"))?;
            Ok((index, etag))
        });
        match read.await {
            Err(RegistryError::NotFound { .. }) => {
                let empty = serde_json::json!({
                    "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [],
                });
                Ok((empty, None))
            }
            other => other,
        }
    }
}

/// `index` with one more entry; none if it has it. Pure.
fn extended(index: &serde_json::Value, referrer: &Descriptor) -> Option<Result<Bytes, &'static str>> {
    let digest = referrer.digest.to_string();
    let entries = index.get("manifests").and_then(|m| m.as_array()).cloned().unwrap_or_default();
    if entries.iter().any(|entry| entry.get("digest").and_then(|d| d.as_str()) == Some(&digest)) {
        return None;
    }
    let mut entries = entries;
    entries.push(serde_json::to_value(referrer).ok()?);
    let mut index = index.clone();
    let Some(fields) = index.as_object_mut() else { return Some(Err("is not an index")) };
    fields.insert("manifests".into(), entries.into());
    // In canonical form where nothing is lost by it, as the Go tools write it.
    let canonical = serde_json::from_value::<Index>(index.clone()).ok();
    let canonical = canonical.filter(|i| serde_json::to_value(i).is_ok_and(|again| again == index));
    let bytes = canonical.map_or_else(|| index.to_string().into_bytes(), |index| index.to_canonical_json());
    Some(if bytes.len() > 4 << 20 { Err("is as large as registries take") } else { Ok(bytes.into()) })
}

impl Upload {
    /// Adds bytes. They are sent when there is a piece of them.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), RegistryError> {
        while !bytes.is_empty() {
            if self.piece.capacity() == 0 {
                // At once: growing would hold two of them for a moment, and copy it all several times.
                self.piece.reserve(PIECE);
            }
            let room = PIECE - self.piece.len();
            self.piece.extend_from_slice(&bytes.split_to(room.min(bytes.len())));
            // The last piece goes up with the end of the upload.
            if self.piece.len() == PIECE && !bytes.is_empty() {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), RegistryError> {
        let piece = std::mem::take(&mut self.piece).freeze();
        let site = &self.repository.site;
        let end = self.taken + piece.len() as u64;
        let settings = &site.client.settings.blob_retry;
        for number in 1.. {
            let error = match patch(site, &self.place, self.taken, piece.slice(from(end, &piece, self.taken)..)).await {
                Ok(next) => {
                    (self.place, self.taken) = (next, end);
                    return Ok(());
                }
                Err(failure) if matches!(failure.advice, Advice::Elsewhere) && !is_range(&failure.error) => {
                    return Err(failure.error);
                }
                Err(failure) => failure,
            };
            if number > settings.max_retries {
                return Err(error.error.after_attempts(number));
            }
            tracing::debug!(error = %error.error, "taking up an upload again");
            tokio::time::sleep(settings.wait(number, None, retry::random())).await;
            let (place, has) = self.status().await?;
            if !(end - piece.len() as u64..=end).contains(&has) {
                return Err(error.error);
            }
            (self.place, self.taken) = (place, has);
            if has == end {
                return Ok(());
            }
        }
        unreachable!("attempts are counted to a limit")
    }

    /// Where the upload is, and how far it got.
    async fn status(&self) -> Result<(Url, u64), RegistryError> {
        let site = &self.repository.site;
        let place = &self.place;
        patiently(site, |endpoint| async move {
            let origin = site.url(&endpoint, "")?;
            let answer = send(site, &endpoint, &Sending::new(Kind::Blob, Method::GET), &origin, place).await?;
            let last = text(&answer.headers, header::RANGE)
                .and_then(|range| range.trim_start_matches("bytes=").split_once('-'));
            let last: Option<u64> = last.and_then(|(_, last)| last.trim().parse().ok());
            // `0-0` is how registries say "nothing yet"; our pieces are never of one byte.
            let has = last.map_or(0, |last| if last == 0 { 0 } else { last + 1 });
            Ok((answer.location(place).unwrap_or_else(|| place.clone()), has))
        })
        .await
    }

    /// Gives it up. A registry that does not hear of it forgets it by itself.
    pub async fn cancel(self) {
        let site = &self.repository.site;
        let Ok(endpoint) = host(site) else { return };
        let Ok(origin) = site.url(&endpoint, "") else { return };
        let _ = send(site, &endpoint, &Sending::new(Kind::Blob, Method::DELETE), &origin, &self.place).await;
    }

    /// Sends what is left; the registry checks that all of it has this digest.
    pub async fn finish(mut self, digest: Digest) -> Result<(), RegistryError> {
        let site = self.repository.site.clone();
        if self.taken > 0 && !self.piece.is_empty() {
            // Some registries take no bytes with the end of an upload in pieces.
            self.flush().await?;
        }
        let body = std::mem::take(&mut self.piece).freeze();
        let mut place = self.place.clone();
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let headers = [(header::CONTENT_TYPE, "application/octet-stream")];
        let (place, body, headers, site) = (&place, &body, &headers[..], &site);
        let finished = patiently(site, |endpoint| async move {
            let origin = site.url(&endpoint, "")?;
            let sending = Sending { headers, body: body.clone(), ..Sending::new(Kind::Blob, Method::PUT) };
            send(site, &endpoint, &sending, &origin, place).await.map(drop)
        });
        match finished.await {
            Ok(()) => Ok(()),
            // An answer that was lost: the second attempt finds the upload gone, because the first one had ended it.
            Err(error) => match self.repository.has_blob(digest).await {
                Ok(true) => Ok(()),
                _ => Err(error),
            },
        }
    }
}

/// Where in the piece that ends at `end` the byte `at` of the blob is.
fn from(end: u64, piece: &Bytes, at: u64) -> usize {
    usize::try_from(at + piece.len() as u64 - end).unwrap_or(piece.len())
}

fn is_range(error: &RegistryError) -> bool {
    matches!(error, RegistryError::Refused { status: 416, .. })
}

async fn patch(site: &Site, place: &Url, at: u64, piece: Bytes) -> Result<Url, Failure> {
    let endpoint = host(site)?;
    let origin = site.url(&endpoint, "")?;
    let range = format!("{at}-{}", at + piece.len() as u64 - 1);
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CONTENT_RANGE, range.as_str())];
    let sending = Sending { headers: &headers, body: piece, ..Sending::new(Kind::Blob, Method::PATCH) };
    let answer = send(site, &endpoint, &sending, &origin, place).await?;
    Ok(answer.location(place).unwrap_or_else(|| place.clone()))
}

/// The first host that may be pushed to: the registry itself, unless its `hosts.toml` says otherwise.
fn host(site: &Site) -> Result<Arc<Endpoint>, Failure> {
    let able = site.hosts(Need::Push)?;
    // Mirrors of `[resolver.host]` stand in front of the registry, and are not pushed to.
    let own = able.iter().rfind(|endpoint| endpoint.namespace.is_none()).or(able.last()).cloned();
    own.ok_or_else(|| Failure::elsewhere(RegistryError::Setup { what: "there is no host to push to".into() }))
}

/// `attempt` at the registry, again while it has trouble.
async fn patiently<T, F, A>(site: &Site, attempt: A) -> Result<T, RegistryError>
where
    A: Fn(Arc<Endpoint>) -> F,
    F: Future<Output = Result<T, Failure>>,
{
    let settings = &site.client.settings.retry;
    let endpoint = host(site).map_err(|failure| failure.error)?;
    let mut number = 1;
    loop {
        let failure = match attempt(endpoint.clone()).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        let asked = match failure.advice {
            Advice::Later(after) => after,
            Advice::Corrupt if number == 1 => Some(Duration::ZERO),
            Advice::Corrupt | Advice::Elsewhere => return Err(failure.error),
        };
        if number > settings.max_retries {
            return Err(failure.error.after_attempts(number));
        }
        tracing::debug!(error = %failure.error, "retrying request");
        tokio::time::sleep(settings.wait(number, asked, retry::random())).await;
        number += 1;
    }
}

/// A 2xx answer.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    request: Request,
    response: reqwest::Response,
}

impl Answer {
    /// Where the registry says to go on.
    fn location(&self, asked: &Url) -> Option<Url> {
        let target = asked.join(text(&self.headers, header::LOCATION)?).ok()?;
        (matches!(target.scheme(), "http" | "https") && target.has_host()).then_some(target)
    }

    fn body(self, site: &Site) -> Body {
        Body::new(self.response, self.request, site.client.settings.idle_timeout, None)
    }
}

/// Sends to `url`, following redirects; with proof of who we are as long as it goes to where `registry` is.
async fn send(
    site: &Site,
    endpoint: &Endpoint,
    sending: &Sending<'_>,
    registry: &Url,
    url: &Url,
) -> Result<Answer, Failure> {
    let first = Request::new(sending.method.as_str(), url);
    let mut here = url.clone();
    let mut at_origin = same_origin(registry, url);
    for _ in 0..=MAX_REDIRECTS {
        let shown = if here == *url { first.clone() } else { first.redirected(&here) };
        let reply = match at_origin {
            true => send_proven(site, endpoint, sending, &shown, &here).await?,
            false => transmit(site, endpoint, To::Stranger, sending, &shown, &here, None).await?,
        };
        match reply {
            Reply::Content(response) => {
                let (status, headers) = (response.status(), response.headers().clone());
                return Ok(Answer { status, headers, request: shown, response });
            }
            Reply::Error(error) => return Err(error.failure(&shown)),
            Reply::Redirect(target) => {
                // Once elsewhere, always elsewhere: a stranger does not lead us back with our credentials.
                at_origin = at_origin && same_origin(registry, &target);
                here = target;
            }
        }
    }
    Err(Failure::malformed(&first, format!("redirected more than {MAX_REDIRECTS} times")))
}

/// As `client`: each login is tried once, and what was tried is in the error.
async fn send_proven(
    site: &Site,
    endpoint: &Endpoint,
    sending: &Sending<'_>,
    request: &Request,
    url: &Url,
) -> Result<Reply, Failure> {
    let mut proof = Proving::begin(site, endpoint, Need::Push, sending.also, request).await;
    loop {
        let reply = transmit(site, endpoint, To::Host, sending, request, url, proof.shown()).await?;
        if let Some(reply) = proof.judge(reply).await? {
            return Ok(reply);
        }
    }
}

async fn transmit(
    site: &Site,
    endpoint: &Endpoint,
    to: To,
    sending: &Sending<'_>,
    request: &Request,
    url: &Url,
    proof: Option<&HeaderValue>,
) -> Result<Reply, Failure> {
    let settings = &site.client.settings;
    let limit = match sending.kind {
        Kind::Blob | Kind::Range => settings.blob_timeout,
        Kind::Manifest | Kind::Referrers | Kind::Login | Kind::Probe => settings.request_timeout,
    };
    let limit = endpoint.request_timeout(limit);
    let mut http = sending.http(url, proof);
    if let To::Host = to {
        let headers = http.headers_mut();
        // What we send is what we need answered; what is configured for this host comes beside it.
        let ours: Vec<_> = headers.keys().cloned().collect();
        for (name, value) in endpoint.headers.iter().filter(|(name, _)| !ours.contains(name)) {
            headers.append(name, value.clone());
        }
    }
    site.client.transport.send(endpoint, to, sending.kind, request, http, limit).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn referrer(name: &str) -> Descriptor {
        Descriptor { artifact_type: "a".into(), ..Descriptor::of("m", name.as_bytes()) }
    }

    #[test]
    fn an_entry_is_added_once_and_nothing_of_others_is_lost() {
        let empty = serde_json::json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": []});
        let one = extended(&empty, &referrer("one")).unwrap().unwrap();
        assert!(one.starts_with(br#"{"schemaVersion":2,"mediaType":"#), "canonical");
        let one: serde_json::Value = serde_json::from_slice(&one).unwrap();
        assert!(extended(&one, &referrer("one")).is_none());
        let mut odd = one.clone();
        odd["manifests"][0]["x"] = 7.into();
        odd["manifests"].as_array_mut().unwrap().push(serde_json::json!({"digest": "sha512:00"}));
        let two = extended(&odd, &referrer("two")).unwrap().unwrap();
        let two: serde_json::Value = serde_json::from_slice(&two).unwrap();
        assert_eq!(two["manifests"].as_array().unwrap().len(), 3);
        assert_eq!((&two["manifests"][0]["x"], &two["manifests"][1]["digest"]), (&7.into(), &"sha512:00".into()));
        assert!(extended(&serde_json::json!([]), &referrer("two")).unwrap().is_err());
    }

    #[test]
    fn a_piece_is_sent_from_where_the_registry_got_to() {
        let piece = Bytes::from_static(b"0123456789");
        assert_eq!((from(110, &piece, 100), from(110, &piece, 104), from(110, &piece, 110)), (0, 4, 10));
    }
}
