//! One host of a list: how to address it, what it may be asked for, and how it fares.
//!
//! A host that fails is left alone for a while (one second, doubling to thirty). When the while is over, it is asked for nothing but a
//! sign of life, in the background: requests go to it again when it has given one. So a dead mirror costs those that find it dead one
//! time-out, and nobody after them.
//!
//! The last host of a list has nobody to take over from it. It has a circuit breaker: after some failures in a row one request at a time
//! is let through to see, ever more rarely, and the others fail here. So a sick registry gets [`TRIAL_MIN`]⁻¹ requests a second at most,
//! however many readers wait for it, and is found well again within [`TRIAL_MAX`], or sooner where readers are given
//! little time (`HttpSettings::recovery`).

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
/// So many failures in a row, without one answer that came to its end, open the circuit: what a busy registry produces now and then
/// stays below.
const FAILURES: u32 = 5;
/// Between two requests to a host whose circuit is open, at first.
const TRIAL_MIN: Duration = Duration::from_millis(500);
/// The same in the end.
pub(super) const TRIAL_MAX: Duration = Duration::from_secs(5);
/// Failures longer ago than this were another trouble.
const FORGET: Duration = Duration::from_secs(60);
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
#[derive(Debug)]
pub(super) struct Health {
    /// As one of several. Leaf lock.
    penalty: Mutex<Penalty>,
    /// As the only one left. Leaf lock.
    circuit: Mutex<Circuit>,
    /// What was wrong the last time, until it answers. Leaf lock.
    trouble: Mutex<Option<Box<str>>>,
}

impl Health {
    /// Nothing is known of the host. That it is well again is to be noticed within `recovery`.
    pub fn unknown(recovery: Duration) -> Health {
        Health { penalty: Mutex::default(), circuit: Mutex::new(Circuit::closed(recovery)), trouble: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct Penalty {
    failures: u32,
    until: Option<Instant>,
}

/// The circuit breaker of a host.
#[derive(Debug)]
struct Circuit {
    /// Between two requests while it is open, at most: how late a recovery may be noticed.
    longest: Duration,
    /// In a row; those of requests that were on their way together when it opened count once.
    failures: u32,
    latest: Option<Instant>,
    /// When the next request may go, while it is open.
    next: Option<Instant>,
    /// One was let through while it was open; what becomes of it counts.
    trial: bool,
}

/// A request that is not sent, because the host has trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    /// Until when, from now.
    pub wait: Duration,
    /// Failures in a row.
    pub failures: u32,
}

impl Circuit {
    fn closed(longest: Duration) -> Circuit {
        Circuit { longest, failures: 0, latest: None, next: None, trial: false }
    }

    /// Whether a request may be sent now.
    fn admit(&mut self, now: Instant) -> Result<(), Held> {
        match self.next {
            Some(next) if now < next => Err(Held { wait: next - now, failures: self.failures }),
            Some(_) => {
                // This one goes; the next one not before it had its time.
                self.next = Some(now + self.interval());
                self.trial = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn interval(&self) -> Duration {
        let doubled = 1u32.checked_shl(self.failures.saturating_sub(FAILURES)).unwrap_or(u32::MAX);
        TRIAL_MIN.saturating_mul(doubled).min(self.longest)
    }

    fn failed(&mut self, now: Instant, asked: Option<Duration>) {
        if self.latest.is_some_and(|latest| now.saturating_duration_since(latest) > FORGET) {
            *self = Circuit::closed(self.longest);
        }
        self.latest = Some(now);
        let asked = asked.unwrap_or_default().min(PENALTY_MAX);
        if !std::mem::take(&mut self.trial) && self.next.is_some_and(|next| now < next) {
            // It was on its way when the circuit opened.
            self.next = self.next.max(Some(now + asked));
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let own = if self.failures >= FAILURES { self.interval() } else { Duration::ZERO };
        let wait = own.max(asked);
        self.next = (!wait.is_zero()).then(|| now + wait);
    }

    /// An answer has begun. If it does not come to its end, that is one failure too many.
    fn answers(&mut self) {
        (self.next, self.trial) = (None, false);
        self.failures = self.failures.min(FAILURES - 1);
    }
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
        self.health.penalty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn circuit(&self) -> std::sync::MutexGuard<'_, Circuit> {
        self.health.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request may be sent to it now, whatever others there are to ask.
    pub fn admit(&self) -> Result<(), Held> {
        self.circuit().admit(Instant::now())
    }

    pub fn standing(&self) -> Standing {
        self.penalty().standing(Instant::now())
    }

    /// It has answered; the body may be still to come.
    pub fn answers(&self) {
        *self.penalty() = Penalty::default();
        self.circuit().answers();
        *self.trouble_said() = None;
    }

    /// What was wrong the last time it was asked; none if it answered.
    pub fn trouble(&self) -> Option<Box<str>> {
        self.trouble_said().clone()
    }

    pub fn set_trouble(&self, text: String) {
        *self.trouble_said() = Some(text.into());
    }

    fn trouble_said(&self) -> std::sync::MutexGuard<'_, Option<Box<str>>> {
        self.health.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer has come to its end.
    pub fn succeeded(&self) {
        *self.penalty() = Penalty::default();
        let mut circuit = self.circuit();
        *circuit = Circuit::closed(circuit.longest);
    }

    /// It has given a sign of life; that it also serves what is asked for, a request has to show.
    pub fn lives(&self) {
        self.penalty().until = None;
    }

    pub fn failed(&self, asked: Option<Duration>) {
        let now = Instant::now();
        self.penalty().failed(now, asked);
        self.circuit().failed(now, asked);
    }

    /// It has sent what it should not have: others come first. It is not overloaded, so it may be asked again at once.
    pub fn lied(&self) {
        self.penalty().failed(Instant::now(), None);
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

    #[test]
    fn an_open_circuit_lets_one_request_through_at_a_time_ever_more_rarely() {
        let mut circuit = Circuit::closed(TRIAL_MAX);
        let start = Instant::now();
        for _ in 0..FAILURES {
            assert_eq!(circuit.admit(start), Ok(()));
            circuit.failed(start, None);
        }
        assert_eq!(circuit.admit(start), Err(Held { wait: TRIAL_MIN, failures: FAILURES }));
        for _ in 0..100 {
            circuit.failed(start, None);
        }
        assert_eq!(circuit.failures, FAILURES, "those were sent before it opened");
        // A minute of readers that ask every hundredth of a second, and a host that fails each time.
        let (mut sent, step) = (0, Duration::from_millis(10));
        for tick in 1..6000 {
            let now = start + step * tick;
            if circuit.admit(now).is_ok() {
                sent += 1;
                circuit.failed(now, None);
            }
        }
        assert!((12..=16).contains(&sent), "{sent} requests in a minute");
        let later = start + Duration::from_secs(70);
        assert_eq!(circuit.admit(later), Ok(()));
        circuit.answers();
        assert_eq!((circuit.admit(later), circuit.admit(later)), (Ok(()), Ok(())));
        circuit.failed(later, None);
        assert!(circuit.admit(later).is_err(), "an answer that breaks off opens it again");
    }

    #[test]
    fn who_is_given_little_time_does_not_find_the_circuit_open_for_longer() {
        let short = crate::registry::HttpSettings {
            blob_timeout: Limit::After(Duration::from_secs(4)),
            ..crate::registry::HttpSettings::default()
        };
        let (mut circuit, start) = (Circuit::closed(short.recovery()), Instant::now());
        for second in 0..20 {
            let _ = circuit.admit(start + Duration::from_secs(second));
            circuit.failed(start + Duration::from_secs(second), None);
        }
        assert_eq!(circuit.admit(start + Duration::from_secs(20)), Ok(()));
    }

    #[test]
    fn a_registry_that_names_a_delay_gets_it_within_reason() {
        let mut circuit = Circuit::closed(TRIAL_MAX);
        let start = Instant::now();
        circuit.failed(start, Some(Duration::from_secs(3)));
        assert_eq!(circuit.admit(start), Err(Held { wait: Duration::from_secs(3), failures: 1 }));
        assert_eq!(circuit.admit(start + Duration::from_secs(3)), Ok(()));
        circuit.failed(start, Some(Duration::from_secs(86_400)));
        assert_eq!(circuit.admit(start + PENALTY_MAX), Ok(()));
    }
}
