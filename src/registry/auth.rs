//! Proving who asks. One grant per host and repository: found by being challenged, remembered, renewed before it ends.
//!
//! Logins come from the keychain. One that is refused, by the registry or by its login service, is followed by the next: a [`Trial`]
//! has what one request has tried so far, each login once, and at last nobody, that is anonymously. What was tried is in the error.
//!
//! Invariant: a grant is only ever sent to the origin (scheme, host, port) that it was made for. It is asked for as little as the
//! request needs: to pull from this repository.
//! At most one request for a grant is under way per host and repository; those who wait for it share its result, also
//! when it fails, so that a login service that does not answer costs each of them one time-out and not a queue of them.

use super::{
    RegistryError,
    bounded::Bounded,
    challenge::Challenge,
    endpoint::{Endpoint, HostId, Need},
    error::{Failure, Request},
    transport::{Kind, Reply, To, Transport},
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
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use zeroize::Zeroizing;

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

/// A host, the name of a repository on it, whether it is to be written to, and which other repository is read by that.
type DoorKey = (HostId, Arc<str>, bool, Option<String>);

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
    /// Which source of the keychain; one past the last is nobody.
    source: usize,
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
    pub need: Need,
    /// Another repository of the host that is to be read by the same request.
    pub also: Option<&'a str>,
}

/// What one request has tried to prove who asks.
#[derive(Default)]
pub(super) struct Trial {
    /// Logins of the source being tried that are still to be tried.
    queue: VecDeque<Credential>,
    /// The source being tried, and the next one.
    source: usize,
    next: usize,
    /// Where it began, which was not at the first source.
    first: Option<usize>,
    /// The source has been asked once more after it forgot what was refused.
    again: bool,
    /// Grants that other requests got meanwhile, used by this one.
    borrowed: u32,
    /// What became of each source, in order.
    told: Vec<(String, Fate)>,
}

enum Fate {
    Nothing,
    Failed(String),
    Refused,
}

/// Logins tried for one request.
const MAX_TRIED: usize = 16;
/// Grants of other requests tried for one request.
const MAX_BORROWED: u32 = 2;

impl Trial {
    /// As a new one, but the source that worked last is tried first.
    fn beginning_with(source: usize) -> Trial {
        Trial { next: source, first: Some(source), ..Trial::default() }
    }

    /// The next login to try; None within for nobody, None at the end.
    async fn next(&mut self, keychain: &Keychain, query: &Query<'_>) -> Option<Option<Credential>> {
        loop {
            if let Some(credential) = self.queue.pop_front() {
                return Some(Some(credential));
            }
            if self.told.len() > MAX_TRIED {
                return None;
            }
            let sources = keychain.sources();
            let index = self.next;
            self.next += 1;
            self.again = false;
            if index > sources.len() {
                return None;
            }
            self.source = index;
            let Some(source) = sources.get(index) else {
                self.told.push(("no login at all".to_owned(), Fate::Nothing));
                return Some(None);
            };
            let found = keychain.ask(source.as_ref(), query).await;
            if self.first.is_some() && index == self.first.unwrap_or(index) {
                // From here on in order; this one comes round once more, if at all, as one of many.
                (self.next, self.first) = (0, None);
            }
            let fate = match &found {
                Ok(_) => Fate::Nothing,
                Err(error) => Fate::Failed(error.clone()),
            };
            self.told.push((source.name().to_owned(), fate));
            self.queue.extend(found.unwrap_or_default().into_iter().take(MAX_TRIED));
        }
    }

    /// What was tried last was refused.
    async fn refused(&mut self, keychain: &Keychain, query: &Query<'_>) {
        if let Some((_, fate)) = self.told.last_mut() {
            *fate = Fate::Refused;
        }
        if let Some(source) = keychain.sources().get(self.source)
            && !self.told.is_empty()
            && !self.again
            && source.refused(query)
        {
            self.again = true;
            self.queue = keychain.ask(source.as_ref(), query).await.unwrap_or_default().into();
        }
    }

    /// What was tried, for an error.
    pub fn words(&self) -> Option<String> {
        let word = |(name, fate): &(String, Fate)| match fate {
            Fate::Nothing if name == "no login at all" => name.clone(),
            Fate::Nothing => format!("{name}: knows nothing"),
            Fate::Failed(error) => format!("{name}: {error}"),
            Fate::Refused => format!("{name}: refused"),
        };
        (!self.told.is_empty()).then(|| format!("tried {}", self.told.iter().map(word).collect::<Vec<_>>().join("; ")))
    }
}

impl Auth {
    pub fn new(keychain: Arc<Keychain>) -> Auth {
        Auth { keychain, doors: Mutex::new(Bounded::new(CAPACITY)) }
    }

    /// Where logins come from.
    pub fn keychain(&self) -> Arc<Keychain> {
        self.keychain.clone()
    }

    pub fn door(&self, endpoint: &Endpoint, repository: &Arc<str>, need: Need, also: Option<&str>) -> Arc<Door> {
        // What may pull may not push; what a tag means takes no more than pulling.
        let key = (endpoint.id.clone(), repository.clone(), need == Need::Push, also.map(str::to_owned));
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
        let mut trial = Trial::beginning_with(grant.source);
        match self.renew(door, flight, visitor, &challenges, Some(&grant.header), now, &mut trial).await {
            Ok(header) => header,
            // The registry will challenge and the failure comes to light then.
            Err(_) => (Instant::now() < end).then_some(grant.header),
        }
    }

    /// An answer to `challenges`, which followed from showing `shown`. None if there is none left that could help.
    pub async fn answer(
        &self,
        door: &Door,
        visitor: &Visitor<'_>,
        challenges: &[Challenge],
        shown: Option<&HeaderValue>,
        trial: &mut Trial,
    ) -> Result<Option<HeaderValue>, Failure> {
        let began = Instant::now();
        let flight = door.flight.lock().await;
        let answer = self.renew(door, flight, visitor, challenges, shown, began, trial).await;
        match answer {
            Ok(None) => {
                door.forget(shown);
                Ok(None)
            }
            Err(mut failure) => {
                if let (RegistryError::Unauthorized { what, .. }, Some(words)) = (&mut failure.error, trial.words())
                    && !what.contains("; tried ")
                {
                    *what = format!("{what}; {words}");
                }
                Err(failure)
            }
            found => found,
        }
    }

    #[allow(clippy::too_many_arguments, reason = "all of one request, used up here")]
    async fn renew(
        &self,
        door: &Door,
        mut flight: tokio::sync::MutexGuard<'_, Option<(Instant, Failure)>>,
        visitor: &Visitor<'_>,
        challenges: &[Challenge],
        shown: Option<&HeaderValue>,
        began: Instant,
        trial: &mut Trial,
    ) -> Result<Option<HeaderValue>, Failure> {
        if let Some(grant) = door.grant()
            && Some(&grant.header) != shown
            && trial.borrowed < MAX_BORROWED
        {
            trial.borrowed += 1;
            return Ok(Some(grant.header));
        }
        if let Some((at, failure)) = &*flight
            && *at > began
        {
            return Err(failure.clone());
        }
        let query = Query { host: &visitor.endpoint.login_host, reference: visitor.reference };
        if shown.is_some() {
            trial.refused(&self.keychain, &query).await;
        }
        let mut denied = None;
        while let Some(credential) = trial.next(&self.keychain, &query).await {
            for challenge in challenges {
                let grant = match challenge {
                    Challenge::Basic => Ok(basic(credential.as_ref())),
                    Challenge::Bearer { .. } => bearer(visitor, challenge, credential.as_ref()).await,
                };
                match grant {
                    Ok(Some(grant)) if Some(&grant.header) == shown => trial.refused(&self.keychain, &query).await,
                    Ok(Some(grant)) => {
                        *flight = None;
                        let header = grant.header.clone();
                        let grant = Grant { source: trial.source, ..grant };
                        *door.grant.lock().unwrap_or_else(PoisonError::into_inner) = Some(grant);
                        return Ok(Some(header));
                    }
                    Ok(None) => {}
                    Err(failure) if matches!(failure.error, RegistryError::Unauthorized { .. }) => {
                        trial.refused(&self.keychain, &query).await;
                        denied = Some(failure);
                    }
                    // The login service has trouble: another login would find the same.
                    Err(failure) => {
                        *flight = Some((Instant::now(), failure.clone()));
                        return Err(failure);
                    }
                }
            }
        }
        match denied {
            Some(failure) => {
                *flight = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
            None => Ok(None),
        }
    }
}

impl Door {
    fn grant(&self) -> Option<Grant> {
        self.grant.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How the registry wanted to be answered last time.
    pub fn challenge(&self) -> Option<Challenge> {
        self.grant().map(|grant| grant.challenge)
    }

    /// Forgets the grant that is shown as `shown`: it is worth nothing.
    fn forget(&self, shown: Option<&HeaderValue>) {
        let mut grant = self.grant.lock().unwrap_or_else(PoisonError::into_inner);
        if grant.as_ref().is_some_and(|grant| Some(&grant.header) == shown) {
            *grant = None;
        }
    }
}

fn basic(credential: Option<&Credential>) -> Option<Grant> {
    let header = match credential? {
        Credential::Password { user, password } if !user.is_empty() && !password.expose().is_empty() => {
            basic_header(user, password.expose())?
        }
        Credential::Registry(token) => sensitive(&format!("Bearer {}", token.expose()))?,
        _ => return None,
    };
    Some(Grant { header, challenge: Challenge::Basic, source: 0, times: None })
}

fn basic_header(user: &str, password: &str) -> Option<HeaderValue> {
    let pair = Zeroizing::new(format!("{user}:{password}"));
    let pair = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(pair.as_bytes()));
    sensitive(&Zeroizing::new(format!("Basic {}", *pair)))
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
    if let Some(Credential::Registry(token)) = credential {
        let header = sensitive(&format!("Bearer {}", token.expose()));
        return Ok(header.map(|header| Grant { header, challenge: challenge.clone(), source: 0, times: None }));
    }
    let realm = Url::parse(realm)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| Failure::malformed(visitor.request, "the registry names a login service that is not a URL"))?;
    let secure = visitor.endpoint.is_tls;
    if credential.is_some() && secure && realm.scheme() == "http" && !is_loopback(&realm) {
        return Err(Failure::elsewhere(RegistryError::Untrusted {
            request: visitor.request.clone(),
            what: "the registry names a login service without TLS, which is not told who asks".into(),
        }));
    }
    let scope = minimal(scope, &visitor.reference.repository, visitor.need, visitor.also);
    if let Some(credential) = credential {
        match post(visitor, &realm, service, &scope, credential).await? {
            Posted::Answer(body) => return grant(visitor, challenge, &body).map(Some),
            Posted::UseGet => {}
        }
    }
    let body = get(visitor, &realm, service, &scope, credential).await?;
    grant(visitor, challenge, &body).map(Some)
}

/// What of the scopes a registry asks for is needed. A registry knows best what it calls the repository (mirrors call it differently);
/// we know best what we want to do with it.
fn minimal(asked: &str, repository: &str, need: Need, also: Option<&str>) -> String {
    let actions: &[&str] = if need == Need::Push { &["pull", "push"] } else { &["pull"] };
    let mut out: Vec<String> = Vec::new();
    for scope in asked.split_ascii_whitespace() {
        // The name may have a port in it: the type is before the first colon, the actions are behind the last.
        let Some((kind, rest)) = scope.split_once(':') else { continue };
        let Some((name, wanted)) = rest.rsplit_once(':') else { continue };
        let is_repository = kind == "repository" || kind.starts_with("repository(");
        let kept: Vec<_> =
            actions.iter().filter(|a| wanted.split(',').any(|w| w == **a || w == "*")).copied().collect();
        if is_repository && !kept.is_empty() && out.len() < 8 {
            out.push(format!("{kind}:{name}:{}", kept.join(",")));
        }
    }
    if out.is_empty() {
        out.push(format!("repository:{repository}:{}", actions.join(",")));
    }
    if let Some(also) = also.map(|name| format!("repository:{name}:pull"))
        && !out.contains(&also)
    {
        out.push(also);
    }
    out.join(" ")
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
    match visitor.transport.send(visitor.endpoint, To::Host, Kind::Login, &request, http, visitor.timeout).await? {
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
        // Shown to the registry itself; it never comes here.
        Credential::Registry(_) => false,
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
        Credential::Registry(_) => None,
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
        match visitor.transport.send(visitor.endpoint, To::Host, Kind::Login, &request, http, visitor.timeout).await? {
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
    Ok(Grant {
        header,
        challenge: challenge.clone(),
        source: 0,
        times: Some((now + validity * 9 / 10, now + validity)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_asked_for_than_is_needed() {
        for (asked, need, expected) in [
            ("", Need::Pull, "repository:a/b:pull"),
            ("repository:a/b:pull,push", Need::Pull, "repository:a/b:pull"),
            ("repository:a/b:pull,push", Need::Push, "repository:a/b:pull,push"),
            ("repository:a/b:*", Need::Pull, "repository:a/b:pull"),
            ("repository:hub/a/b:pull", Need::Resolve, "repository:hub/a/b:pull"),
            ("registry:catalog:* repository:a/b:delete,pull", Need::Pull, "repository:a/b:pull"),
            ("registry:catalog:*", Need::Pull, "repository:a/b:pull"),
            ("nonsense repository: repository:x", Need::Pull, "repository:a/b:pull"),
        ] {
            assert_eq!(minimal(asked, "a/b", need, None), expected, "{asked}");
        }
        let both = "repository:a/b:pull,push repository:c:pull";
        for asked in ["repository:a/b:pull,push", both, ""] {
            assert_eq!(minimal(asked, "a/b", Need::Push, Some("c")), both, "what is mounted is read, too");
        }
    }
}
