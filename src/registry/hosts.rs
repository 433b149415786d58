//! Which hosts may answer for an image: the mirrors of its registry in their order, then the registry itself.
//!
//! A mirror that fails is left alone for a while (one second, doubling to thirty), so that a dead one costs one
//! time-out and not one per request; when the while is over a single request tries it and the others keep avoiding it
//! until that one came back. The last host of a list is never left alone: there is nobody else to ask.

use super::{
    Limit,
    settings::{HostSettings, Mirror, MirrorTimeout, Security},
    url::is_loopback,
};
use crate::telemetry::catalog::say;
use ::url::Url;
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// First time a failing mirror is left alone.
const PENALTY_MIN: Duration = Duration::from_secs(1);
/// Longest time a failing mirror is left alone: how late its recovery may be noticed.
const PENALTY_MAX: Duration = Duration::from_secs(30);
/// How long the others wait for the one request that tries a mirror again: about a dial and a header time-out.
const PROBE: Duration = Duration::from_secs(6);
/// Image hosts remembered; each costs a few hundred bytes and there are few in any cluster.
const MAX_IMAGE_HOSTS: usize = 1024;

/// A host that serves images, as part of a [`super::Repository`]'s list: its base URL.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostId(Arc<str>);

impl HostId {
    /// The host with that base URL.
    pub fn new(base: &str) -> HostId {
        HostId(base.into())
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One host, how to address it, and how it fares.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub id: HostId,
    /// With the path prefix, no trailing slash: `https://host/v2`.
    base: Url,
    /// Host under which its credentials are looked up.
    pub login_host: String,
    /// Image host to name in `ns=`, for mirrors that serve several registries. containerd sends the same.
    namespace: Option<String>,
    pub timeout: MirrorTimeout,
    penalty: Mutex<Penalty>,
}

#[derive(Debug, Default)]
struct Penalty {
    failures: u32,
    until: Option<Instant>,
}

/// Whether a mirror may be asked now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Good,
    Penalised,
}

impl Penalty {
    fn standing(&mut self, now: Instant) -> Standing {
        match self.until {
            Some(until) if now < until => Standing::Penalised,
            Some(_) => {
                self.until = Some(now + PROBE);
                Standing::Good
            }
            None => Standing::Good,
        }
    }

    fn failed(&mut self, now: Instant, asked: Option<Duration>) {
        let doubled = 1u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let wait = PENALTY_MIN.saturating_mul(doubled).max(asked.unwrap_or_default()).min(PENALTY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + wait);
    }
}

impl Endpoint {
    /// `<base>/<repository>/<rest>`. `rest` may have a query.
    pub fn url(&self, repository: &str, rest: &str) -> Result<Url, ::url::ParseError> {
        let mut url = Url::parse(&format!("{}/{repository}/{rest}", self.base))?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    pub fn is_tls(&self) -> bool {
        self.base.scheme() == "https"
    }

    pub fn standing(&self) -> Standing {
        self.penalty.lock().unwrap_or_else(PoisonError::into_inner).standing(Instant::now())
    }

    pub fn succeeded(&self) {
        *self.penalty.lock().unwrap_or_else(PoisonError::into_inner) = Penalty::default();
    }

    pub fn failed(&self, asked: Option<Duration>) {
        self.penalty.lock().unwrap_or_else(PoisonError::into_inner).failed(Instant::now(), asked);
    }

    /// The time limit of one attempt, where `inherited` is that of all hosts.
    pub fn request_timeout(&self, inherited: Limit) -> Option<Duration> {
        match self.timeout {
            MirrorTimeout::Inherit => inherited.duration(),
            MirrorTimeout::Own(limit) => limit.duration(),
        }
    }
}

/// Hosts of one image, in the order to ask them. Never empty.
pub(super) type Endpoints = Arc<[Arc<Endpoint>]>;

/// All hosts in use. Lists are made when first asked for.
#[derive(Debug)]
pub(super) struct Hosts {
    settings: HostSettings,
    lists: Mutex<HashMap<String, Endpoints>>,
}

/// A host that cannot be made into a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a host or URL")]
pub(super) struct InvalidHost {
    text: String,
}

impl Hosts {
    pub fn new(settings: HostSettings) -> Hosts {
        Hosts { settings, lists: Mutex::default() }
    }

    /// Hosts for images of `image_host`. A mirror that cannot be understood is named in the log and left out.
    pub fn of(&self, image_host: &str) -> Result<Endpoints, InvalidHost> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists.get(image_host) {
            return Ok(list.clone());
        }
        let mirrors = self.settings.mirrors.get(image_host).map(Vec::as_slice).unwrap_or_default();
        let list = list(image_host, mirrors)?;
        if lists.len() >= MAX_IMAGE_HOSTS {
            lists.clear();
        }
        lists.insert(image_host.to_owned(), list.clone());
        Ok(list)
    }
}

fn list(image_host: &str, mirrors: &[Mirror]) -> Result<Endpoints, InvalidHost> {
    let origin = origin(image_host)?;
    let mut out: Vec<Endpoint> = Vec::new();
    let mut origin_is_mirror = false;
    for mirror in mirrors {
        let base = match mirror_base(mirror) {
            Ok(base) => base,
            Err(error) => {
                say!(MirrorIgnored, error = %error, image_host, "ignoring a mirror");
                continue;
            }
        };
        // An entry for the registry itself says how to talk to it; it is then not asked a second time in another way.
        let same = super::url::authority(&base) == super::url::authority(&origin);
        origin_is_mirror |= same;
        out.push(endpoint(base, (!same).then_some(image_host), mirror.timeout));
    }
    if !origin_is_mirror {
        out.push(endpoint(origin, None, MirrorTimeout::Inherit));
    }
    Ok(out.into_iter().map(Arc::new).collect())
}

fn endpoint(base: Url, namespace: Option<&str>, timeout: MirrorTimeout) -> Endpoint {
    let text = base.as_str().trim_end_matches('/');
    Endpoint {
        id: HostId(text.into()),
        login_host: super::url::authority(&base),
        base,
        namespace: namespace.map(str::to_owned),
        timeout,
        penalty: Mutex::default(),
    }
}

/// The registry itself: https, plain HTTP on loopback. No mirror's settings have a say in it.
fn origin(image_host: &str) -> Result<Url, InvalidHost> {
    let host = if image_host == "docker.io" { "registry-1.docker.io" } else { image_host };
    base(host, "/v2", Security::Tls)
}

fn mirror_base(mirror: &Mirror) -> Result<Url, InvalidHost> {
    let invalid = || InvalidHost { text: mirror.host.chars().take(300).collect() };
    let rest = match mirror.host.split_once("://") {
        Some((_, rest)) => rest,
        None => &mirror.host,
    };
    let (host, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    if host.is_empty() || host.contains('@') || path.contains(['?', '#']) {
        return Err(invalid());
    }
    let path = match path.trim_end_matches('/') {
        "" => "/v2",
        path => path,
    };
    base(host, path, mirror.security)
}

fn base(host: &str, path: &str, security: Security) -> Result<Url, InvalidHost> {
    let invalid = || InvalidHost { text: host.chars().take(300).collect() };
    let tls = Url::parse(&format!("https://{host}{path}")).map_err(|_| invalid())?;
    if tls.host_str().is_none_or(str::is_empty) {
        return Err(invalid());
    }
    match security {
        Security::Tls if !is_loopback(&tls) => Ok(tls),
        // Parsed anew, because the default port differs.
        Security::Tls | Security::PlainHttp => Url::parse(&format!("http://{host}{path}")).map_err(|_| invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(image_host: &str, mirrors: &[(&str, Security)]) -> Vec<String> {
        let mirrors: Vec<Mirror> = mirrors
            .iter()
            .map(|(host, security)| Mirror { host: (*host).into(), security: *security, ..Mirror::default() })
            .collect();
        list(image_host, &mirrors).unwrap().iter().map(|e| e.url("r", "x").unwrap().to_string()).collect()
    }

    #[test]
    fn mirrors_come_first_and_may_be_bare_hosts() {
        use Security::*;
        assert_eq!(
            bases(
                "docker.io",
                &[
                    ("https://m.example", Tls),
                    ("m.example:5000", Tls),
                    ("http://m.example/proxy/hub/", Tls),
                    ("10.0.0.1:5000", PlainHttp),
                    ("127.0.0.1:5000", Tls),
                    ("", Tls),
                    ("a b", Tls),
                ]
            ),
            [
                "https://m.example/v2/r/x?ns=docker.io",
                "https://m.example:5000/v2/r/x?ns=docker.io",
                "https://m.example/proxy/hub/r/x?ns=docker.io",
                "http://10.0.0.1:5000/v2/r/x?ns=docker.io",
                "http://127.0.0.1:5000/v2/r/x?ns=docker.io",
                "https://registry-1.docker.io/v2/r/x",
            ]
        );
        assert_eq!(bases("localhost:5000", &[]), ["http://localhost:5000/v2/r/x"]);
        assert_eq!(bases("[::1]:5000", &[]), ["http://[::1]:5000/v2/r/x"]);
    }

    #[test]
    fn an_insecure_mirror_leaves_the_origin_secure_unless_it_is_the_origin() {
        use Security::*;
        assert_eq!(
            bases("r.example", &[("m.example", PlainHttp)]),
            ["http://m.example/v2/r/x?ns=r.example", "https://r.example/v2/r/x"]
        );
        assert_eq!(bases("r.example:5000", &[("http://r.example:5000", PlainHttp)]), ["http://r.example:5000/v2/r/x"]);
    }

    #[test]
    fn a_failing_mirror_is_left_alone_ever_longer_and_then_tried_by_one() {
        let mut penalty = Penalty::default();
        let start = Instant::now();
        assert_eq!(penalty.standing(start), Standing::Good);
        penalty.failed(start, None);
        assert_eq!(penalty.standing(start), Standing::Penalised);
        let later = start + PENALTY_MIN;
        assert_eq!(penalty.standing(later), Standing::Good, "one tries");
        assert_eq!(penalty.standing(later), Standing::Penalised, "the others wait for it");
        penalty.failed(later, None);
        assert_eq!(penalty.standing(later + PENALTY_MIN), Standing::Penalised, "the second penalty is longer");
        for _ in 0..100 {
            penalty.failed(later, None);
        }
        assert_eq!(penalty.standing(later + PENALTY_MAX), Standing::Good);
    }
}
