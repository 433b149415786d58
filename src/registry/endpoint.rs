//! One host of a list: how to address it, what it may be asked for, and how it fares.
//!
//! A host that fails is left alone for a while (one second, doubling to thirty). When the while is over, it is asked for nothing but a
//! sign of life, in the background: requests go to it again when it has given one. So a dead mirror costs those that find it dead one
//! time-out, and nobody after them.

use super::{Limit, hosts_file::Capabilities, settings::MirrorTimeout, transport::Clients};
use ::url::Url;
use http::HeaderMap;
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// First time a failing mirror is left alone.
const PENALTY_MIN: Duration = Duration::from_secs(1);
/// Longest time a failing mirror is left alone: how late its recovery may be noticed.
const PENALTY_MAX: Duration = Duration::from_secs(30);
/// How long a sign of life may take: about a dial and a header time-out. Then another is asked for.
const PROBE: Duration = Duration::from_secs(6);
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

/// What a host is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Need {
    /// Something named by its digest.
    Pull,
    /// What a tag means.
    Resolve,
    /// An upload.
    Push,
}

impl Need {
    pub fn word(self) -> &'static str {
        match self {
            Need::Pull => "pull",
            Need::Resolve => "resolve",
            Need::Push => "push",
        }
    }
}

/// One host, how to address it, and how it fares.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub id: HostId,
    /// With the path prefix, no trailing slash: `https://host/v2`.
    pub base: String,
    pub is_tls: bool,
    /// Host under which its credentials are looked up.
    pub login_host: String,
    /// Image host to name in `ns=`, for mirrors that serve several registries. containerd sends the same.
    pub namespace: Option<String>,
    pub timeout: MirrorTimeout,
    pub capabilities: Capabilities,
    /// Sent to this host and to no other.
    pub headers: HeaderMap,
    pub clients: Arc<Clients>,
    /// Where its certificate's authority would be configured, for errors.
    pub trust_here: String,
    pub health: Arc<Health>,
}

/// How a host fares, whichever images it is asked for.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<Penalty>);

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
    /// As penalised; and whoever is told so asks it for a sign of life, in the background.
    Probe,
}

impl Penalty {
    fn standing(&mut self, now: Instant) -> Standing {
        match self.until {
            Some(until) if now < until => Standing::Penalised,
            Some(_) => {
                self.until = Some(now + PROBE);
                Standing::Probe
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

    /// What answers everybody who may ask at all, or says who may.
    pub fn probe_url(&self) -> Result<Url, ::url::ParseError> {
        Url::parse(&format!("{}/", self.base))
    }

    pub fn may(&self, need: Need) -> bool {
        match need {
            Need::Pull => self.capabilities.pull,
            Need::Resolve => self.capabilities.resolve,
            Need::Push => self.capabilities.push,
        }
    }

    fn penalty(&self) -> std::sync::MutexGuard<'_, Penalty> {
        self.health.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn standing(&self) -> Standing {
        self.penalty().standing(Instant::now())
    }

    pub fn succeeded(&self) {
        *self.penalty() = Penalty::default();
    }

    /// It has given a sign of life; that it also serves what is asked for, a request has to show.
    pub fn lives(&self) {
        self.penalty().until = None;
    }

    pub fn failed(&self, asked: Option<Duration>) {
        self.penalty().failed(Instant::now(), asked);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_mirror_is_left_alone_ever_longer_and_then_looked_at_by_one() {
        let mut penalty = Penalty::default();
        let start = Instant::now();
        assert_eq!(penalty.standing(start), Standing::Good);
        penalty.failed(start, None);
        assert_eq!(penalty.standing(start), Standing::Penalised);
        let later = start + PENALTY_MIN;
        assert_eq!(penalty.standing(later), Standing::Probe, "one looks");
        assert_eq!(penalty.standing(later), Standing::Penalised, "the others wait for it");
        penalty.failed(later, None);
        assert_eq!(penalty.standing(later + PENALTY_MIN), Standing::Penalised, "the second penalty is longer");
        for _ in 0..100 {
            penalty.failed(later, None);
        }
        assert_eq!(penalty.standing(later + PENALTY_MAX), Standing::Probe);
    }
}
