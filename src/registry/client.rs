//! One question, asked of every host that may answer it, as often as is sensible.
//!
//! ```text
//! pass:     mirror 1 ── mirror 2 ── origin ── mirrors that are left alone, if the origin had trouble too
//!              │ any failure: the next host at once
//! answer  ◀────┘            │ the origin said no, or nobody had trouble: that is the answer
//!                           └ somebody had trouble: wait, next pass
//! ```
//!
//! At one host: the remembered place of the blob, if there is one; else the registry, with what proves who we are, one
//! answer to one challenge, then up to ten redirects. Credentials stay with the origin they were made for.

use super::{
    RegistryError,
    auth::Auth,
    body::Body,
    endpoint::{Endpoint, Endpoints, Held, HostId, Need, Standing},
    error::{Advice, Failure, Request},
    hosts::Hosts,
    proving::Proving,
    redirect::{BlobKey, RedirectCache},
    retry::{self, RetrySettings},
    settings::HttpSettings,
    transport::{Connection, Kind, Reply, Terms, To, Transport},
    url::same_origin,
};
use crate::oci::{Digest, Reference};
use ::url::Url;
use http::{HeaderValue, Method, header};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// As many as other clients follow.
const MAX_REDIRECTS: usize = 10;

/// What all repositories share.
pub(super) struct Client {
    pub settings: HttpSettings,
    pub hosts: Hosts,
    pub transport: Arc<Transport>,
    pub auth: Auth,
    pub redirects: RedirectCache,
}

/// One repository as a place to send questions to.
#[derive(Clone)]
pub(super) struct Site {
    pub client: Arc<Client>,
    pub reference: Arc<Reference>,
    pub name: Arc<str>,
}

/// What is asked of one host: a path below the repository, with its headers.
pub(super) struct Ask<'a> {
    pub kind: Kind,
    /// Below `<base>/<repository>/`, with its query.
    pub path: &'a str,
    pub accept: Option<&'static str>,
    pub range: Option<std::ops::Range<u64>>,
    /// The blob whose place may be remembered.
    pub blob: Option<Digest>,
    pub places: Places,
}

/// Whether what was used before may be used again: the remembered place of a blob, and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Places {
    Remembered,
    /// Wrong bytes have come: the place, or something on the way of that connection, may have made them.
    Anew,
}

impl Site {
    /// All hosts of the repository, as they are configured now.
    pub fn endpoints(&self) -> Result<Endpoints, RegistryError> {
        self.client.hosts.of(&self.reference.host).map_err(|error| RegistryError::Setup { what: error.to_string() })
    }

    /// Those that may be asked for `need`, in order; at least one.
    pub fn hosts(&self, need: Need) -> Result<Vec<Arc<Endpoint>>, Failure> {
        let all = self.endpoints().map_err(Failure::elsewhere)?;
        let able: Vec<_> = all.iter().filter(|e| e.may(need)).cloned().collect();
        if able.is_empty() {
            let (host, word) = (&self.reference.host, need.word());
            let what = format!("no host for images of {host} has the capability {word:?} in its hosts.toml");
            return Err(Failure::elsewhere(RegistryError::Setup { what }));
        }
        Ok(able)
    }

    /// Asks `attempt` of the hosts that may serve `need` in turn, until one answers.
    pub async fn ask<T, F, A>(
        &self,
        need: Need,
        retry: &RetrySettings,
        avoid: &[HostId],
        attempt: A,
    ) -> Result<T, RegistryError>
    where
        A: Fn(Arc<Endpoint>, Places) -> F,
        F: Future<Output = Result<T, Failure>>,
    {
        let able = self.hosts(need).map_err(|failure| failure.error)?;
        let mut hosts: Vec<_> = able.iter().filter(|e| !avoid.contains(&e.id)).cloned().collect();
        let mut places = Places::Remembered;
        if hosts.is_empty() {
            hosts = able;
            places = Places::Anew;
        }
        let mut corrupt = 0;
        for number in 1.. {
            let mut pass = Pass::default();
            let mut reserve = Vec::new();
            let last = hosts.len() - 1;
            for (at, host) in hosts.iter().enumerate() {
                // The last host is asked whatever its standing: there may be nobody else.
                let standing = if at < last { host.standing() } else { Standing::Good };
                if standing == Standing::Probe {
                    self.probe(host.clone());
                }
                if standing != Standing::Good {
                    reserve.push(host);
                    continue;
                }
                match admitted(host, &attempt, places).await {
                    Ok(answer) => return Ok(answer),
                    Err(tried) => pass.failed(host, at == last, tried.within(retry.max_wait)),
                }
            }
            if pass.last_had_trouble {
                for host in reserve {
                    match admitted(host, &attempt, places).await {
                        Ok(answer) => return Ok(answer),
                        Err(tried) => pass.failed(host, false, tried.within(retry.max_wait)),
                    }
                }
            }
            corrupt += u32::from(pass.last_was_corrupt);
            if pass.was_corrupt {
                places = Places::Anew;
            }
            let (error, asked) = match pass.result() {
                Verdict::Final(error) => return Err(error),
                Verdict::Trouble(error, _) if number > retry.max_retries || corrupt > 1 => {
                    return Err(error.after_attempts(number));
                }
                Verdict::Trouble(error, asked) => (error, asked),
            };
            tracing::debug!(error = %error, "retrying request");
            // What a host that stays sick is spared is its circuit's business; whoever waits is to notice soon that it is well.
            let patience = retry.max_wait.min(self.client.settings.recovery().max(retry.min_wait));
            let spaced = RetrySettings { max_wait: if asked.is_some() { retry.max_wait } else { patience }, ..*retry };
            tokio::time::sleep(spaced.wait(number, asked, retry::random())).await;
        }
        unreachable!("attempts are counted to a limit")
    }

    /// Asks a host that has failed for a sign of life, while others answer. Whatever it says in time is one, unless it says that it
    /// has trouble.
    fn probe(&self, endpoint: Arc<Endpoint>) {
        let transport = self.client.transport.clone();
        let limit = endpoint.request_timeout(self.client.settings.request_timeout);
        tokio::spawn(async move {
            let Ok(url) = endpoint.probe_url() else { return };
            let request = Request::new("GET", &url);
            let mut http = reqwest::Request::new(Method::GET, url);
            http.headers_mut().extend(endpoint.headers.clone());
            match transport.send(&endpoint, To::Host, Kind::Probe, &request, http, limit).await {
                Ok(Reply::Error(error)) if matches!(error.failure(&request).advice, Advice::Later(_)) => {
                    endpoint.failed(error.retry_after);
                }
                Ok(_) => {
                    tracing::info!(host = %endpoint.id, "a host that had trouble answers again");
                    endpoint.lives();
                }
                Err(failure) => {
                    tracing::debug!(host = %endpoint.id, error = %failure.error, "a host still has trouble");
                    endpoint.failed(None);
                }
            }
        });
    }

    /// One attempt at one host: an answer whose body is still to be read.
    pub async fn open(&self, endpoint: &Endpoint, ask: &Ask<'_>) -> Result<Body, Failure> {
        let url = self.url(endpoint, ask.path)?;
        let request = Request::new("GET", &url);
        let key = ask.blob.map(|digest| BlobKey { host: endpoint.id.clone(), repository: self.name.clone(), digest });
        if let Some(key) = &key {
            if ask.places == Places::Anew {
                self.client.redirects.forget_any(key);
            }
            if let Some(place) = self.client.redirects.get(key)
                && let Some(body) = self.open_remembered(endpoint, ask, key, &request, &url, place).await?
            {
                return Ok(body);
            }
        }
        let started = Instant::now();
        let mut here = url.clone();
        let mut at_origin = true;
        for _ in 0..=MAX_REDIRECTS {
            let shown = if here == url { request.clone() } else { request.redirected(&here) };
            let reply = match at_origin {
                true => self.send_proven(endpoint, ask, &shown, &here).await?,
                false => {
                    self.send(endpoint, To::Stranger, ask, &shown, self.http(ask, &here, Some(&url), None)).await?
                }
            };
            match reply {
                Reply::Content(response) => {
                    if let Some(key) = key
                        && !at_origin
                    {
                        self.client.redirects.insert(key, here);
                    }
                    return Ok(self.body(endpoint, ask, response, shown, started));
                }
                Reply::Error(error) => return Err(error.failure(&shown)),
                Reply::Redirect(target) => {
                    // Once elsewhere, always elsewhere: a stranger does not lead us back with our credentials.
                    at_origin = at_origin && same_origin(&url, &target);
                    here = target;
                }
            }
        }
        Err(Failure::malformed(&request, format!("redirected more than {MAX_REDIRECTS} times")))
    }

    /// Asks where the blob was last time. None if it is not there any more; the registry knows where it is now.
    async fn open_remembered(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        key: &BlobKey,
        request: &Request,
        registry: &Url,
        place: Arc<Url>,
    ) -> Result<Option<Body>, Failure> {
        let started = Instant::now();
        let shown = request.redirected(&place);
        let http = self.http(ask, &place, Some(registry), None);
        let reply = self.send(endpoint, To::Stranger, ask, &shown, http).await;
        match reply {
            Ok(Reply::Content(response)) => Ok(Some(self.body(endpoint, ask, response, shown, started))),
            Ok(Reply::Error(error)) if !matches!(error.status.as_u16(), 400 | 401 | 403 | 404 | 410) => {
                self.client.redirects.forget(key, &place);
                Err(error.failure(&shown))
            }
            Ok(Reply::Error(error)) => {
                tracing::info!("Received status code: {}. Refreshing URL and retrying...", error.status);
                self.client.redirects.forget(key, &place);
                Ok(None)
            }
            Ok(Reply::Redirect(_)) => {
                self.client.redirects.forget(key, &place);
                Ok(None)
            }
            Err(failure) => {
                self.client.redirects.forget(key, &place);
                Err(failure)
            }
        }
    }

    /// Sends with what proves who we are, and once more if that was not enough.
    async fn send_proven(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        request: &Request,
        url: &Url,
    ) -> Result<Reply, Failure> {
        let mut proof = Proving::begin(self, endpoint, need(ask.kind), None, request).await;
        loop {
            let reply = self.send_to_host(endpoint, ask, request, url, proof.shown()).await?;
            if let Some(reply) = proof.judge(reply).await? {
                return Ok(reply);
            }
        }
    }

    /// With what is meant for this host alone: its configured headers, and proof.
    async fn send_to_host(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        request: &Request,
        url: &Url,
        proof: Option<&HeaderValue>,
    ) -> Result<Reply, Failure> {
        let mut http = self.http(ask, url, None, proof);
        let headers = http.headers_mut();
        // What we send is what we need answered; proof that was asked for beats proof that was configured.
        let ours: Vec<_> = headers.keys().filter(|name| *name != header::ACCEPT).cloned().collect();
        for (name, value) in endpoint.headers.iter().filter(|(name, _)| !ours.contains(name)) {
            headers.append(name, value.clone());
        }
        self.send(endpoint, To::Host, ask, request, http).await
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        to: To,
        ask: &Ask<'_>,
        request: &Request,
        http: reqwest::Request,
    ) -> Result<Reply, Failure> {
        let connection = match ask.places {
            Places::Remembered => Connection::Any,
            Places::Anew => Connection::New,
        };
        let terms = Terms { limit: self.time_limit(endpoint, ask.kind), connection };
        self.client.transport.send(endpoint, to, ask.kind, request, http, terms).await
    }

    fn http(&self, ask: &Ask<'_>, url: &Url, came_from: Option<&Url>, proof: Option<&HeaderValue>) -> reqwest::Request {
        let mut http = reqwest::Request::new(Method::GET, url.clone());
        let headers = http.headers_mut();
        if let Some(accept) = ask.accept {
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        }
        if let Some(range) = &ask.range {
            let text = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.insert(header::RANGE, value);
            }
        }
        if matches!(ask.kind, Kind::Blob | Kind::Range) {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        // Some storage checks it; as in Go, it is not sent from TLS to plain HTTP. It is the registry's URL, which has no secrets.
        if let Some(from) = came_from
            && (from.scheme() == "http" || url.scheme() == "https")
            && let Ok(value) = HeaderValue::from_str(from.as_str())
        {
            headers.insert(header::REFERER, value);
        }
        if let Some(proof) = proof {
            headers.insert(header::AUTHORIZATION, proof.clone());
        }
        http
    }

    fn body(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        response: reqwest::Response,
        request: Request,
        started: Instant,
    ) -> Body {
        let left = self.time_limit(endpoint, ask.kind).map(|limit| limit.saturating_sub(started.elapsed()));
        Body::new(response, request, self.client.settings.idle_timeout, left)
    }

    fn time_limit(&self, endpoint: &Endpoint, kind: Kind) -> Option<Duration> {
        let settings = &self.client.settings;
        endpoint.request_timeout(match kind {
            Kind::Blob | Kind::Range => settings.blob_timeout,
            Kind::Manifest | Kind::Referrers | Kind::Login | Kind::Probe => settings.request_timeout,
        })
    }

    pub fn url(&self, endpoint: &Endpoint, path: &str) -> Result<Url, Failure> {
        endpoint
            .url(&self.name, path)
            .map_err(|error| Failure::elsewhere(RegistryError::Setup { what: format!("{}: {error}", endpoint.id) }))
    }
}

/// One attempt at a host, unless its circuit is open.
async fn admitted<T, F, A>(host: &Arc<Endpoint>, attempt: &A, places: Places) -> Result<T, Tried>
where
    A: Fn(Arc<Endpoint>, Places) -> F,
    F: Future<Output = Result<T, Failure>>,
{
    if let Err(Held { wait, failures }) = host.admit() {
        return Err(Tried::Not(left_alone(host, wait, failures)));
    }
    match attempt(host.clone(), places).await {
        Ok(answer) => {
            host.answers();
            Ok(answer)
        }
        Err(failure) => Err(Tried::InVain(failure)),
    }
}

/// Whether a failed host was asked at all.
enum Tried {
    InVain(Failure),
    Not(Failure),
}

impl Tried {
    /// No delay that a host names is longer than the settings allow.
    fn within(mut self, max_wait: Duration) -> Tried {
        let (Tried::InVain(failure) | Tried::Not(failure)) = &mut self;
        if let Advice::Later(Some(after)) = &mut failure.advice {
            *after = (*after).min(max_wait);
        }
        self
    }
}

fn left_alone(host: &Endpoint, wait: Duration, failures: u32) -> Failure {
    let last = host.trouble().map(|trouble| format!(", the last of them: {trouble}")).unwrap_or_default();
    let what = format!("left alone for {wait:.1?} after {failures} failure(s) in a row{last}");
    match host.probe_url() {
        Ok(url) => Failure::later(&Request::new("GET", &url), what, Some(wait)),
        Err(error) => Failure::elsewhere(RegistryError::Setup { what: format!("{}: {error}", host.id) }),
    }
}

/// What a request of that kind does with the repository.
fn need(kind: Kind) -> Need {
    match kind {
        Kind::Manifest | Kind::Referrers | Kind::Blob | Kind::Range | Kind::Login | Kind::Probe => Need::Pull,
    }
}

/// How the hosts fared in one pass.
#[derive(Default)]
struct Pass {
    /// The latest "no"; that of the last host of the list wins.
    no: Option<RegistryError>,
    trouble: Option<(RegistryError, Option<Duration>)>,
    last_had_trouble: bool,
    last_was_corrupt: bool,
    was_corrupt: bool,
}

enum Verdict {
    Final(RegistryError),
    Trouble(RegistryError, Option<Duration>),
}

impl Pass {
    fn failed(&mut self, host: &Endpoint, is_last: bool, tried: Tried) {
        let Failure { error, advice } = match tried {
            Tried::InVain(failure) => {
                if failure.advice != Advice::Elsewhere {
                    host.set_trouble(failure.error.to_string());
                }
                failure
            }
            Tried::Not(failure) => {
                let Failure { error, advice } = failure;
                let after = if let Advice::Later(after) = advice { after } else { None };
                // What it said when it was asked says more.
                self.trouble.get_or_insert((error, after));
                self.last_had_trouble |= is_last;
                return;
            }
        };
        match advice {
            Advice::Elsewhere => {
                host.succeeded();
                self.no = Some(error);
                return;
            }
            Advice::Later(after) => {
                host.failed(after);
                self.trouble = Some((error, after));
            }
            Advice::Corrupt => {
                host.lied();
                self.last_was_corrupt |= is_last;
                self.was_corrupt = true;
                self.trouble = Some((error, Some(Duration::ZERO)));
            }
        }
        self.last_had_trouble |= is_last;
    }

    /// The registry's own "no such thing" is final. Any other "no" is only when no mirror had trouble: one that is
    /// allowed to serve what we may not fetch from the registry may be back soon.
    fn result(self) -> Verdict {
        match (self.no, self.trouble) {
            (Some(no), _) if !self.last_had_trouble && matches!(no, RegistryError::NotFound { .. }) => {
                Verdict::Final(no)
            }
            (_, Some((error, after))) => Verdict::Trouble(error, after),
            (Some(no), None) => Verdict::Final(no),
            (None, None) => Verdict::Final(RegistryError::Setup { what: "there is no host to ask".into() }),
        }
    }
}
