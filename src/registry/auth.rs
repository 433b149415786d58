//! Proving who asks. One grant per host and repository: found by being challenged, remembered, renewed before it ends.
//!
//! Invariant: a grant is only ever sent to the origin (scheme, host, port) that it was made for.
//! At most one request for a grant is under way per host and repository; those who wait for it share its result, also
//! when it fails, so that a login service that does not answer costs each of them one time-out and not a queue of them.

use super::{
    RegistryError,
    bounded::Bounded,
    challenge::Challenge,
    error::{Failure, Request},
    hosts::Endpoint,
    transport::{Kind, Reply, Transport},
    url::{is_loopback, same_origin},
};
use crate::{
    keychain::{Credential, Keychain, Query},
    oci::Reference,
};
use ::url::Url;
use base64::Engine;
use http::{HeaderValue, Method, header};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Grants remembered: one per host and repository in use.
const CAPACITY: usize = 4096;
/// How long a grant is valid when its giver does not say (distribution specification).
const DEFAULT_VALIDITY: Duration = Duration::from_secs(60);
/// Largest answer of a login service. Real ones are below 20 kB.
const MAX_ANSWER: u64 = 256 << 10;
/// A login service may move, for instance to https.
const MAX_REDIRECTS: usize = 5;
/// What containerd calls itself towards login services.
const CLIENT_ID: &str = "containerd-client";

/// The grants of all hosts and repositories.
pub(super) struct Auth {
    keychain: Arc<Keychain>,
    doors: Mutex<Bounded<DoorKey, Arc<Door>>>,
}

/// A host, and the name of a repository on it.
type DoorKey = (super::HostId, Arc<str>);

/// One host and repository.
#[derive(Default)]
pub(super) struct Door {
    /// What is shown with each request. Held briefly, never across an await.
    grant: Mutex<Option<Grant>>,
    /// Held while a grant is asked for; its value is how that failed last time. Taken before `grant`.
    flight: tokio::sync::Mutex<Option<(Instant, Failure)>>,
}

#[derive(Clone)]
struct Grant {
    header: HeaderValue,
    challenge: Challenge,
    /// From when on to renew it, and from when on it is worthless.
    times: Option<(Instant, Instant)>,
}

/// For whom a grant is asked.
pub(super) struct Visitor<'a> {
    pub transport: &'a Transport,
    pub endpoint: &'a Endpoint,
    pub reference: &'a Reference,
    pub request: &'a Request,
    pub timeout: Option<Duration>,
    pub idle: Duration,
}

impl Auth {
    pub fn new(keychain: Arc<Keychain>) -> Auth {
        Auth { keychain, doors: Mutex::new(Bounded::new(CAPACITY)) }
    }

    /// Where logins come from.
    pub fn keychain(&self) -> Arc<Keychain> {
        self.keychain.clone()
    }

    pub fn door(&self, endpoint: &Endpoint, repository: &Arc<str>) -> Arc<Door> {
        let key = (endpoint.id.clone(), repository.clone());
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(door) = doors.get(&key) {
            return door.clone();
        }
        let door = Arc::new(Door::default());
        doors.insert(key, door.clone());
        door
    }

    /// What to send along, if anything is known; renewed when its end is near.
    pub async fn present(&self, door: &Door, visitor: &Visitor<'_>) -> Option<HeaderValue> {
        let grant = door.grant()?;
        let Some((renew, end)) = grant.times else { return Some(grant.header) };
        let now = Instant::now();
        if now < renew {
            return Some(grant.header);
        }
        let flight = if now < end {
            // Still good: let one renew it and the others go on.
            let Ok(flight) = door.flight.try_lock() else { return Some(grant.header) };
            flight
        } else {
            door.flight.lock().await
        };
        let challenges = [grant.challenge.clone()];
        match self.renew(door, flight, visitor, &challenges, Some(&grant.header), now).await {
            Ok(header) => header,
            // The registry will challenge and the failure comes to light then.
            Err(_) => (Instant::now() < end).then_some(grant.header),
        }
    }

    /// An answer to `challenges`, which followed from showing `shown`. None if there is none that could help.
    pub async fn answer(
        &self,
        door: &Door,
        visitor: &Visitor<'_>,
        challenges: &[Challenge],
        shown: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let began = Instant::now();
        let flight = door.flight.lock().await;
        self.renew(door, flight, visitor, challenges, shown, began).await
    }

    async fn renew(
        &self,
        door: &Door,
        mut flight: tokio::sync::MutexGuard<'_, Option<(Instant, Failure)>>,
        visitor: &Visitor<'_>,
        challenges: &[Challenge],
        shown: Option<&HeaderValue>,
        began: Instant,
    ) -> Result<Option<HeaderValue>, Failure> {
        if let Some(grant) = door.grant()
            && Some(&grant.header) != shown
        {
            return Ok(Some(grant.header));
        }
        if let Some((at, failure)) = &*flight
            && *at > began
        {
            return Err(failure.clone());
        }
        let query = Query { host: &visitor.endpoint.login_host, reference: visitor.reference };
        let credential = self.keychain.lookup(&query).await;
        let mut last = Ok(None);
        for challenge in challenges {
            let grant = match challenge {
                Challenge::Basic => Ok(basic(credential.as_ref())),
                Challenge::Bearer { .. } => bearer(visitor, challenge, credential.as_ref()).await,
            };
            match grant {
                Ok(Some(grant)) => {
                    *flight = None;
                    let header = grant.header.clone();
                    *door.grant.lock().unwrap_or_else(PoisonError::into_inner) = Some(grant);
                    return Ok(Some(header));
                }
                Ok(None) => {}
                Err(failure) => last = Err(failure),
            }
        }
        if let Err(failure) = &last {
            *flight = Some((Instant::now(), failure.clone()));
        }
        last
    }
}

impl Door {
    fn grant(&self) -> Option<Grant> {
        self.grant.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn basic(credential: Option<&Credential>) -> Option<Grant> {
    match credential {
        Some(Credential::Password { user, password }) if !user.is_empty() && !password.expose().is_empty() => {
            Some(Grant { header: basic_header(user, password.expose())?, challenge: Challenge::Basic, times: None })
        }
        _ => None,
    }
}

fn basic_header(user: &str, password: &str) -> Option<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    sensitive(&format!("Basic {pair}"))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// A grant from the login service that `challenge` names.
async fn bearer(
    visitor: &Visitor<'_>,
    challenge: &Challenge,
    credential: Option<&Credential>,
) -> Result<Option<Grant>, Failure> {
    let Challenge::Bearer { realm, service, scope } = challenge else { return Ok(None) };
    let realm = Url::parse(realm)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| Failure::malformed(visitor.request, "the registry names a login service that is not a URL"))?;
    let secure = visitor.endpoint.is_tls();
    if credential.is_some() && secure && realm.scheme() == "http" && !is_loopback(&realm) {
        return Err(Failure::elsewhere(RegistryError::Untrusted {
            request: visitor.request.clone(),
            what: "the registry names a login service without TLS, which is not told who asks".into(),
        }));
    }
    let scope =
        if scope.is_empty() { format!("repository:{}:pull", visitor.reference.repository) } else { scope.clone() };
    if let Some(credential) = credential {
        match post(visitor, &realm, service, &scope, credential).await? {
            Posted::Answer(body) => return grant(visitor, challenge, &body).map(Some),
            Posted::UseGet => {}
        }
    }
    let body = get(visitor, &realm, service, &scope, credential).await?;
    grant(visitor, challenge, &body).map(Some)
}

enum Posted {
    Answer(bytes::Bytes),
    /// The service knows only the older way.
    UseGet,
}

/// OAuth 2 (distribution specification, "token authentication with OAuth 2").
async fn post(
    visitor: &Visitor<'_>,
    realm: &Url,
    service: &str,
    scope: &str,
    credential: &Credential,
) -> Result<Posted, Failure> {
    let (form, has_user) = login_form(service, scope, credential);
    let mut http = reqwest::Request::new(Method::POST, realm.clone());
    http.headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded; charset=utf-8"));
    *http.body_mut() = Some(form.into());
    let request = login_request(realm);
    match visitor.transport.send(Kind::Login, &request, http, visitor.timeout).await? {
        Reply::Content(response) => {
            let body = super::body::Body::new(response, request, visitor.idle, visitor.timeout);
            Ok(Posted::Answer(body.read(MAX_ANSWER).await?))
        }
        Reply::Error(reply) => match reply.status.as_u16() {
            400 | 401 | 404 => Ok(Posted::UseGet),
            405 if has_user => Ok(Posted::UseGet),
            _ => Err(refused(reply.failure(&request))),
        },
        Reply::Redirect(_) => Ok(Posted::UseGet),
    }
}

fn login_form(service: &str, scope: &str, credential: &Credential) -> (String, bool) {
    let mut form = ::url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("client_id", CLIENT_ID).append_pair("service", service).append_pair("scope", scope);
    let has_user = match credential {
        Credential::Password { user, password } => {
            form.append_pair("grant_type", "password").append_pair("username", user);
            form.append_pair("password", password.expose());
            !user.is_empty()
        }
        Credential::Identity(identity) => {
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", identity.expose());
            false
        }
    };
    (form.finish(), has_user)
}

async fn get(
    visitor: &Visitor<'_>,
    realm: &Url,
    service: &str,
    scope: &str,
    credential: Option<&Credential>,
) -> Result<bytes::Bytes, Failure> {
    let mut url = realm.clone();
    {
        let mut query = url.query_pairs_mut();
        if !service.is_empty() {
            query.append_pair("service", service);
        }
        for scope in scope.split_ascii_whitespace() {
            query.append_pair("scope", scope);
        }
    }
    let proof = credential.and_then(|credential| match credential {
        Credential::Password { user, password } => basic_header(user, password.expose()),
        Credential::Identity(identity) => basic_header("", identity.expose()),
    });
    let first = url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let request = login_request(&url);
        let mut http = reqwest::Request::new(Method::GET, url.clone());
        if let Some(proof) = &proof
            && (same_origin(&first, &url) || is_upgrade(&first, &url))
        {
            http.headers_mut().insert(header::AUTHORIZATION, proof.clone());
        }
        match visitor.transport.send(Kind::Login, &request, http, visitor.timeout).await? {
            Reply::Content(response) => {
                let body = super::body::Body::new(response, request, visitor.idle, visitor.timeout);
                return body.read(MAX_ANSWER).await;
            }
            Reply::Redirect(target) => url = target,
            Reply::Error(reply) => return Err(refused(reply.failure(&request))),
        }
    }
    Err(Failure::malformed(visitor.request, "the login service redirects without end"))
}

/// The same host, now with TLS.
fn is_upgrade(from: &Url, to: &Url) -> bool {
    from.scheme() == "http" && to.scheme() == "https" && from.host() == to.host() && to.port().is_none()
}

/// The request as it may be shown: only where the login service is.
fn login_request(url: &Url) -> Request {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_path("");
    Request::new("LOGIN", &shown)
}

/// A login service that says no in any way leaves us without access; that a path is missing there says nothing about
/// the image.
fn refused(failure: Failure) -> Failure {
    match failure.error {
        RegistryError::NotFound { request } => {
            Failure::elsewhere(RegistryError::Unauthorized { request, what: "404 Not Found".into() })
        }
        _ => failure,
    }
}

#[derive(serde::Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    expires_in: Option<i64>,
}

fn grant(visitor: &Visitor<'_>, challenge: &Challenge, body: &[u8]) -> Result<Grant, Failure> {
    // What serde says about the text could quote it.
    let malformed =
        || Failure::malformed(visitor.request, "the login service gave an answer that cannot be understood");
    let answer: Answer = serde_json::from_slice(body).map_err(|_| malformed())?;
    let text = if answer.access_token.is_empty() { answer.token } else { answer.access_token };
    if text.is_empty() {
        return Err(malformed());
    }
    let header = sensitive(&format!("Bearer {text}")).ok_or_else(malformed)?;
    let validity = match answer.expires_in {
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds.unsigned_abs().min(86_400)),
        _ => DEFAULT_VALIDITY,
    };
    let now = Instant::now();
    Ok(Grant { header, challenge: challenge.clone(), times: Some((now + validity * 9 / 10, now + validity)) })
}
