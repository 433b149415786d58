//! One HTTP exchange: a request out, headers in, within the time limits; no retry, no redirect, no credentials.
//!
//! Blob data travels over HTTP/1.1 only. With HTTP/2 all ranges of a host would share one TCP connection: its one
//! congestion window would be the limit, and a body whose reader pauses would hold flow-control credit that a more urgent
//! one needs. Everything else may use HTTP/2. Loopback is never asked through a proxy.
//!
//! Hosts that are dialled in the same way (authorities, client certificates, time-out) share one set of clients, and so their
//! connections. What a registry redirects to is dialled in that way, too, but is not shown the client certificate.

use super::{
    HttpSettings, RegistryError,
    challenge::{self, Challenge},
    endpoint::Endpoint,
    error::{Failure, Request},
    hosts::HostsError,
    proxy::Proxies,
    retry,
    url::{authority, is_loopback},
};
use crate::tls::{self, Protocols, SystemRoots, Trust};
use ::url::Url;
use http::{HeaderMap, StatusCode, header};
use reqwest::Response;
use std::{
    error::Error,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// How much of an error's body is read: what the distribution specification's error documents need, and little enough
/// that reading it costs less than a new connection.
const ERROR_BODY_MAX: usize = 4096;
/// How long to wait for an error's body.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// Idle connections are closed before the usual server's 60 s (nginx: 75 s, S3: 20 s and a retry costs nothing).
const POOL_IDLE: Duration = Duration::from_secs(55);
/// Finds dead peers behind NATs.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Manifest,
    Referrers,
    /// A whole blob.
    Blob,
    /// A range of a blob.
    Range,
    /// Proof of who asks.
    Login,
    /// A sign of life.
    Probe,
}

/// How an exchange ended, as far as the headers of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Answered(u16),
    Failed,
}

/// Told about every exchange; for metrics. Must not block.
pub trait Observer: Send + Sync {
    /// `took` is the time until the headers of the answer, or until the failure.
    fn request(&self, kind: Kind, host: &str, took: Duration, outcome: Outcome);
}

/// Ignores everything.
pub(super) struct Unobserved;

impl Observer for Unobserved {
    fn request(&self, _: Kind, _: &str, _: Duration, _: Outcome) {}
}

/// How a host is dialled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Dialing {
    pub trust: Trust,
    /// None: that of all hosts.
    pub timeout: Option<Duration>,
}

/// Whether a proxy may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Configured,
    Direct,
}

/// HTTP clients for hosts that are dialled in the same way.
pub(super) struct Clients {
    talk: reqwest::Client,
    bulk: reqwest::Client,
    local: reqwest::Client,
    /// For bulk and local requests over new connections; made when first needed.
    anew: [OnceLock<reqwest::Client>; 2],
    dialing: Dialing,
    answer_timeout: Option<Duration>,
    /// For other hosts that one of these redirects to, if they are to be dialled differently.
    elsewhere: Option<Arc<Clients>>,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clients")
    }
}

pub(super) struct Transport {
    settings: HttpSettings,
    roots: SystemRoots,
    proxies: Proxies,
    /// Those in use.
    clients: Mutex<Vec<(Dialing, Arc<Clients>)>>,
    observer: Arc<dyn Observer>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transport")
    }
}

/// Whom a request goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum To {
    /// The endpoint, or its login service.
    Host,
    /// Whom it redirects to.
    Stranger,
}

/// Which connection a request for a blob goes over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Connection {
    #[default]
    Any,
    /// One that nothing went over before: what came over the others was wrong.
    New,
}

/// How a request is sent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Terms {
    pub limit: Option<Duration>,
    pub connection: Connection,
}

impl From<Option<Duration>> for Terms {
    fn from(limit: Option<Duration>) -> Terms {
        Terms { limit, ..Terms::default() }
    }
}

/// What came back.
pub(super) enum Reply {
    /// 2xx; the body is still to be read.
    Content(Response),
    /// 3xx with a usable target.
    Redirect(Url),
    Error(ErrorReply),
}

/// Any other status, with what its headers and the start of its body say.
pub(super) struct ErrorReply {
    pub status: StatusCode,
    pub challenges: Vec<Challenge>,
    pub retry_after: Option<Duration>,
    pub body: Vec<u8>,
    pub is_xml: bool,
    /// With which logins it was asked, all in vain.
    pub tried: Option<String>,
}

impl Transport {
    pub fn new(settings: &HttpSettings, observer: Arc<dyn Observer>) -> Result<Transport, RegistryError> {
        let (roots, proxies) = (SystemRoots::load(), Proxies::of_environment());
        let transport = Transport { settings: settings.clone(), roots, proxies, clients: Mutex::default(), observer };
        // What all hosts need that nothing is said about: better found out now than with the first image.
        let setup = |e: HostsError| RegistryError::Setup { what: e.to_string() };
        transport.clients(&Dialing::default()).map_err(setup)?;
        Ok(transport)
    }

    /// The clients for hosts that are dialled like that.
    pub fn clients(&self, dialing: &Dialing) -> Result<Arc<Clients>, HostsError> {
        let find = || {
            let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            clients.iter().find(|(known, _)| known == dialing).map(|(_, clients)| clients.clone())
        };
        if let Some(known) = find() {
            return Ok(known);
        }
        let elsewhere = match dialing.trust.identities.is_empty() {
            true => None,
            false => {
                let mut anonymous = dialing.clone();
                anonymous.trust.identities.clear();
                Some(self.clients(&anonymous)?)
            }
        };
        let made = Arc::new(self.make(dialing, elsewhere)?);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of configurations that have changed go when nothing uses them any more.
        clients.retain(|(known, clients)| *known == Dialing::default() || Arc::strong_count(clients) > 1);
        clients.push((dialing.clone(), made.clone()));
        Ok(made)
    }

    fn make(&self, dialing: &Dialing, elsewhere: Option<Arc<Clients>>) -> Result<Clients, HostsError> {
        let idle = self.settings.idle_connections;
        let header_timeout = self.settings.header_timeout.duration();
        Ok(Clients {
            talk: self.client(dialing, Protocols::Http2Or1, Way::Configured, idle)?,
            bulk: self.client(dialing, Protocols::Http1, Way::Configured, idle)?,
            local: self.client(dialing, Protocols::Http1, Way::Direct, idle)?,
            anew: [OnceLock::new(), OnceLock::new()],
            dialing: dialing.clone(),
            answer_timeout: header_timeout.map(|header| header + self.dial_timeout(dialing)),
            elsewhere,
        })
    }

    fn dial_timeout(&self, dialing: &Dialing) -> Duration {
        dialing.timeout.unwrap_or(self.settings.dial_timeout)
    }

    /// A client that keeps at most `idle` connections to a host for the next request.
    fn client(
        &self,
        dialing: &Dialing,
        protocols: Protocols,
        way: Way,
        idle: usize,
    ) -> Result<reqwest::Client, HostsError> {
        let builder = reqwest::Client::builder()
            .use_preconfigured_tls(tls::client(&dialing.trust, &self.roots, protocols)?)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("soci-snapshotter/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.dial_timeout(dialing))
            .tcp_nodelay(true)
            .tcp_keepalive(TCP_KEEPALIVE)
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(idle);
        let builder = match protocols {
            Protocols::Http1 => builder.http1_only(),
            Protocols::Http2Or1 => builder,
        };
        let builder = match way {
            Way::Direct => builder.no_proxy(),
            Way::Configured => {
                let proxies = self.proxies.clone();
                builder.proxy(reqwest::Proxy::custom(move |url| proxies.of(url)))
            }
        };
        builder.build().map_err(|e| HostsError::Client(chain(&e)))
    }

    /// What sends blobs over connections of their own, that way.
    fn anew<'a>(&self, clients: &'a Clients, way: Way) -> &'a reqwest::Client {
        let (known, usual) = match way {
            Way::Configured => (&clients.anew[0], &clients.bulk),
            Way::Direct => (&clients.anew[1], &clients.local),
        };
        match known.get() {
            Some(client) => client,
            // The same could be made before; if not now, the usual one is better than none.
            None => match self.client(&clients.dialing, Protocols::Http1, way, 0) {
                Ok(client) => known.get_or_init(|| client),
                Err(_) => usual,
            },
        }
    }

    /// Sends `http` and reads up to the headers of the answer, or through its body if it is an error.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        to: To,
        kind: Kind,
        request: &Request,
        http: reqwest::Request,
        terms: impl Into<Terms>,
    ) -> Result<Reply, Failure> {
        let Terms { limit, connection } = terms.into();
        let url = http.url().clone();
        let clients = match (to, &endpoint.clients.elsewhere) {
            (To::Stranger, Some(elsewhere)) => elsewhere,
            _ => &endpoint.clients,
        };
        let way = if is_loopback(&url) { Way::Direct } else { Way::Configured };
        let client = match kind {
            Kind::Blob | Kind::Range if connection == Connection::New => self.anew(clients, way),
            _ if way == Way::Direct => &clients.local,
            Kind::Blob | Kind::Range => &clients.bulk,
            Kind::Manifest | Kind::Referrers | Kind::Login | Kind::Probe => &clients.talk,
        };
        let limit = match (clients.answer_timeout, limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let started = Instant::now();
        let result = within(limit, client.execute(http)).await;
        let outcome = match &result {
            Some(Ok(response)) => Outcome::Answered(response.status().as_u16()),
            Some(Err(_)) | None => Outcome::Failed,
        };
        self.observer.request(kind, &authority(&url), started.elapsed(), outcome);
        match result {
            Some(Ok(response)) => self.reply(request, &url, response).await,
            Some(Err(error)) => Err(transport_failure(endpoint, request, &url, &error, &self.roots)),
            None => Err(Failure::later(request, format!("no answer from {} in time", authority(&url)), None)),
        }
    }

    async fn reply(&self, request: &Request, url: &Url, response: Response) -> Result<Reply, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(Reply::Content(response));
        }
        let headers = response.headers().clone();
        let body = drain(response).await;
        if matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
            let target = headers.get(header::LOCATION).and_then(|l| l.to_str().ok()).and_then(|l| url.join(l).ok());
            return match target {
                Some(target) if matches!(target.scheme(), "http" | "https") && target.has_host() => {
                    Ok(Reply::Redirect(target))
                }
                _ => Err(Failure::malformed(request, format!("{status} without a usable Location"))),
            };
        }
        Ok(Reply::Error(ErrorReply {
            status,
            challenges: challenges(&headers),
            retry_after: text(&headers, header::RETRY_AFTER)
                .filter(|_| matches!(status.as_u16(), 429 | 503))
                .and_then(|value| retry::retry_after(value, jiff::Timestamp::now())),
            is_xml: text(&headers, header::CONTENT_TYPE).is_some_and(|t| t.starts_with("application/xml")),
            body,
            tried: None,
        }))
    }
}

impl ErrorReply {
    /// What this status means for the request, challenges aside.
    pub fn failure(&self, request: &Request) -> Failure {
        let tried = self.tried.as_ref().map(|tried| format!("; {tried}")).unwrap_or_default();
        let what = match self.code() {
            Some(code) => format!("{} ({code}){tried}", self.status),
            None => format!("{}{tried}", self.status),
        };
        let request = request.clone();
        match self.status.as_u16() {
            401 | 403 => Failure::elsewhere(RegistryError::Unauthorized { request, what }),
            400 if self.is_expired_signature() => Failure::elsewhere(RegistryError::Unauthorized { request, what }),
            404 | 410 => Failure::elsewhere(RegistryError::NotFound { request }),
            // 408 and 425: the other side asks for the same once more.
            408 | 425 | 429 | 500 | 502..=599 => Failure::later(&request, what, self.retry_after),
            status => {
                let what = self.code().map(|code| format!(" ({code})")).unwrap_or_default();
                Failure::elsewhere(RegistryError::Refused { request, status, what })
            }
        }
    }

    /// The error code of the distribution specification, if it is one: free text is not repeated, it may hold anything.
    pub fn code(&self) -> Option<&'static str> {
        const CODES: [&str; 14] = [
            "BLOB_UNKNOWN",
            "BLOB_UPLOAD_INVALID",
            "BLOB_UPLOAD_UNKNOWN",
            "DIGEST_INVALID",
            "MANIFEST_BLOB_UNKNOWN",
            "MANIFEST_INVALID",
            "MANIFEST_UNKNOWN",
            "NAME_INVALID",
            "NAME_UNKNOWN",
            "SIZE_INVALID",
            "UNAUTHORIZED",
            "DENIED",
            "UNSUPPORTED",
            "TOOMANYREQUESTS",
        ];
        let code = self.error_field("code")?;
        CODES.into_iter().find(|known| *known == code)
    }

    /// ECR's way of asking for new credentials: a 403 with this text.
    pub fn is_expired_login(&self) -> bool {
        self.status == StatusCode::FORBIDDEN
            && self
                .error_field("message")
                .is_some_and(|message| message == "Your authorization token has expired. Reauthenticate and try again.")
    }

    /// S3's way of saying that a signed URL is too old: a 400 with this code.
    pub fn is_expired_signature(&self) -> bool {
        let code = b"<Code>ExpiredToken</Code>";
        self.status == StatusCode::BAD_REQUEST && self.is_xml && self.body.windows(code.len()).any(|w| w == code)
    }

    fn error_field(&self, name: &str) -> Option<String> {
        let document: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(document.get("errors")?.get(0)?.get(name)?.as_str()?.to_owned())
    }
}

/// `future`, or nothing if it takes longer than `limit`.
pub(super) async fn within<T>(limit: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, future).await.ok(),
        None => Some(future.await),
    }
}

/// A header's value, if it is text.
pub(super) fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let mut out: Vec<_> = headers
        .get_all(header::WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(challenge::parse)
        .collect();
    out.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
    out
}

async fn drain(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk[..chunk.len().min(ERROR_BODY_MAX - body.len())]);
            if body.len() == ERROR_BODY_MAX {
                break;
            }
        }
    };
    // Late or not at all is the same: what arrived is enough to go on.
    let _ = tokio::time::timeout(ERROR_BODY_TIMEOUT, read).await;
    body
}

fn transport_failure(
    endpoint: &Endpoint,
    request: &Request,
    url: &Url,
    error: &reqwest::Error,
    roots: &SystemRoots,
) -> Failure {
    if let Some(failed) = tls::refusal(error) {
        let what = tls_words(endpoint, &authority(url), &failed, roots);
        return Failure::elsewhere(RegistryError::Untrusted { request: request.clone(), what });
    }
    let what = chain(error);
    if error.is_builder() {
        return Failure::elsewhere(RegistryError::Malformed { request: request.clone(), what });
    }
    Failure::later(request, what, None)
}

/// What went wrong with TLS at `host`, and what to do about it.
fn tls_words(endpoint: &Endpoint, host: &str, failed: &tls::Failed, roots: &SystemRoots) -> String {
    use tls::{Failed, Trouble};
    let here = &endpoint.trust_here;
    let bundle = match roots.is_empty() {
        true => {
            "; this machine has no certificate authorities of its own: install ca-certificates and restart the daemon"
        }
        false => "",
    };
    match failed {
        Failed::Refused(refusal) => {
            let advice = match &refusal.trouble {
                Trouble::Expired { .. } => "the registry needs a new certificate".to_owned(),
                Trouble::NotYetValid { .. } => "set the clock of this machine or of the registry".to_owned(),
                Trouble::WrongHost { .. } => format!(
                    "ask for the images under one of these names, or give the registry a certificate for {host}"
                ),
                Trouble::SelfSigned => format!("to trust this certificate, {here}{bundle}"),
                Trouble::UnknownIssuer { .. } => {
                    format!("to trust that authority, get its certificate and {here}{bundle}")
                }
                Trouble::NoAuthorities => format!(
                    "install ca-certificates (or name a file in SSL_CERT_FILE) and restart the daemon; or get the certificate of the registry's authority and {here}"
                ),
                Trouble::Other(_) => "the registry needs another certificate".to_owned(),
            };
            format!("{host} is not trusted: {refusal}; {advice}")
        }
        Failed::WantsCertificate => {
            let how = match endpoint.clients.elsewhere {
                Some(_) => "does not accept the client certificate that is configured for it",
                None => "wants a client certificate, and none is configured for it",
            };
            format!(
                "{host} {how}: put client.cert and client.key beside ca.crt into the directory of this host, or name them as client in its hosts.toml"
            )
        }
        Failed::NotTls => format!(
            "{host} does not speak TLS; if it is to be asked in plain HTTP, say so with a http:// URL in its hosts.toml, or with insecure = true in [resolver.host]"
        ),
    }
}

/// An error and its causes in one line, without the URL that reqwest would print.
pub(super) fn chain(error: &reqwest::Error) -> String {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes.dedup();
    match causes.is_empty() {
        false => causes.join(": "),
        true if error.is_timeout() => "timed out".into(),
        true if error.is_connect() => "cannot connect".into(),
        true => "the exchange failed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, body: &str) -> ErrorReply {
        ErrorReply {
            status: StatusCode::from_u16(status).unwrap(),
            challenges: Vec::new(),
            retry_after: None,
            body: body.into(),
            is_xml: true,
            tried: None,
        }
    }

    #[test]
    fn expired_logins_and_signatures_are_recognised() {
        let text = r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}"#;
        assert!(reply(403, text).is_expired_login());
        assert!(!reply(401, text).is_expired_login());
        assert!(reply(400, "<Error><Code>ExpiredToken</Code></Error>").is_expired_signature());
        assert!(!reply(400, "<Error><Code>Other</Code></Error>").is_expired_signature());
    }

    #[test]
    fn a_registrys_free_text_is_not_repeated() {
        let url = Url::parse("https://h/v2/a").unwrap();
        let request = Request::new("GET", &url);
        let text = r#"{"errors":[{"code":"DENIED","message":"your password hunter2"}]}"#;
        let shown = reply(403, text).failure(&request).error.to_string();
        assert_eq!(shown, r#"GET "https://h/v2/a": access denied: 403 Forbidden (DENIED)"#);
        assert!(
            !reply(418, r#"{"errors":[{"code":"hunter2"}]}"#).failure(&request).error.to_string().contains("hunter2")
        );
    }
}
