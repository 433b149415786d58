//! A registry with faults: an HTTP proxy in front of a real one that does to each request what the first matching [`Rule`] says, and
//! writes down what it saw.
//!
//! Threads and blocking sockets, HTTP/1.1 with keep-alive towards the client, one connection per request towards the registry.

mod wire;

use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use wire::{Head, accept, reset};

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answered with this status instead.
    Status(u16),
    /// Answered with this status and `Retry-After` in seconds.
    RetryAfter(u16, u32),
    /// The body ends, and the connection with it, after so many bytes.
    Truncate(u64),
    /// The byte at this offset of the body is flipped.
    Corrupt(u64),
    /// The connection is reset after so many bytes of the body.
    Reset(u64),
    /// The body comes at so many bytes per second.
    Slow(u64),
    /// Nothing happens for this long, then all goes well.
    Stall(Duration),
    /// No answer until [`Proxy::release`] or the proxy's end.
    Hang,
    /// The connection is reset instead of an answer.
    Refuse,
    /// The body stops after so many bytes, and the connection stays open as long as the client keeps it.
    Freeze(u64),
    /// 401, and every token that was handed out is worth nothing from now on.
    Revoke,
    /// The range is ignored: 200 and all of the blob.
    WholeBlob,
    /// A `Content-Range` that is a lie: shifted by so many bytes.
    WrongRange(u64),
    /// 307 to a place on this proxy that serves the blob to whoever comes within the time, and 403 afterwards.
    Redirect(Duration),
}

/// Which requests it happens to.
#[derive(Clone, Debug)]
pub struct Rule {
    pub fault: Fault,
    /// Only requests whose line (`GET /v2/…`) contains this; all if empty.
    pub containing: String,
    /// Only requests for a range that overlaps this.
    pub overlapping: Option<Range<u64>>,
    /// How often; then the rule is gone.
    pub times: u64,
    /// Not the first so many that match.
    pub after: u64,
}

impl Rule {
    /// On every request for (part of) a blob, for ever.
    pub fn blobs(fault: Fault) -> Rule {
        Rule { fault, containing: "/blobs/".into(), overlapping: None, times: u64::MAX, after: 0 }
    }
    /// On every request.
    pub fn all(fault: Fault) -> Rule {
        Rule { containing: String::new(), ..Rule::blobs(fault) }
    }
    pub fn containing(mut self, text: &str) -> Rule {
        self.containing = text.into();
        self
    }
    pub fn overlapping(mut self, range: Range<u64>) -> Rule {
        self.overlapping = Some(range);
        self
    }
    pub fn times(mut self, times: u64) -> Rule {
        self.times = times;
        self
    }
    pub fn after(mut self, requests: u64) -> Rule {
        self.after = requests;
        self
    }
}

/// One request that came by.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub range: Option<Range<u64>>,
    pub authorization: Option<String>,
    pub status: u16,
    /// Body bytes sent to the client.
    pub bytes: u64,
    /// Body bytes that came from the client.
    pub received: u64,
    /// Which of the client's connections it came over.
    pub connection: u64,
}

/// Faults at random. The same seed gives the same faults for the same requests in the same order.
#[derive(Clone, Debug)]
pub struct Chaos {
    pub seed: u64,
    /// Only requests whose line contains one of these.
    pub containing: Vec<String>,
    /// One request in so many.
    pub one_in: u64,
}

impl Chaos {
    /// What happens to request `number`, if anything. Slow faults are rarer: each costs its reader seconds.
    fn fault(&self, number: u64) -> Option<Fault> {
        let mut state = (self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
        let mut random = |bound: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) % bound
        };
        // The first numbers of neighbouring seeds are alike.
        for _ in 0..4 {
            random(2);
        }
        if random(self.one_in) != 0 {
            return None;
        }
        let at = random(60_000);
        Some(match random(60) {
            0..12 => Fault::Status([500, 502, 503, 504, 408, 429][random(6) as usize]),
            12..14 => Fault::RetryAfter(503, random(2) as u32),
            14..23 => Fault::Reset(at),
            23..31 => Fault::Truncate(at),
            31..39 => Fault::Corrupt(at),
            39..44 => Fault::Refuse,
            44..47 => Fault::WrongRange(1 + at),
            47..50 => Fault::Redirect(Duration::from_millis(random(200))),
            50..53 => Fault::Revoke,
            53..55 => Fault::Slow(200_000 + at * 10),
            55..57 => Fault::Stall(Duration::from_millis(random(1500))),
            57..59 => Fault::WholeBlob,
            _ => Fault::Freeze(at),
        })
    }
}

impl Fault {
    fn name(&self) -> &'static str {
        match self {
            Fault::Status(_) | Fault::RetryAfter(..) => "5xx or 429",
            Fault::Truncate(_) => "truncated",
            Fault::Corrupt(_) => "corrupted",
            Fault::Reset(_) | Fault::Refuse => "reset",
            Fault::Slow(_) => "slow",
            Fault::Stall(_) | Fault::Hang | Fault::Freeze(_) => "stalled",
            Fault::WholeBlob | Fault::WrongRange(_) => "wrong range",
            Fault::Redirect(_) => "expiring URL",
            Fault::Revoke => "revoked token",
        }
    }
}

/// Demands bearer tokens that this proxy hands out itself.
#[derive(Clone, Copy)]
pub struct Tokens {
    pub valid_for: Duration,
}

pub struct Proxy {
    /// `host:port` to use in references.
    pub host: String,
    shared: Arc<Shared>,
}

struct Shared {
    host: String,
    upstream: String,
    rules: Mutex<Vec<Rule>>,
    chaos: Mutex<Option<Chaos>>,
    /// Requests that chaos might have struck.
    struck: AtomicU64,
    /// Faults that happened, by name.
    faults: Mutex<std::collections::BTreeMap<&'static str, u64>>,
    seen: Mutex<Vec<Seen>>,
    tokens: Mutex<Option<Tokens>>,
    /// Tokens: until when they are good, and what for.
    issued: Mutex<HashMap<String, (Instant, Vec<String>)>>,
    /// The scopes that were asked for.
    scopes: Mutex<Vec<String>>,
    /// Repositories that nobody gets the right to read.
    forbidden: Mutex<Vec<String>>,
    /// Downloads of large blobs that are under way.
    downloads: AtomicU64,
    conditional: AtomicBool,
    /// Held by a conditional request until it has been answered.
    condition: Mutex<()>,
    redirects: Mutex<HashMap<String, (String, Instant)>>,
    connections: Mutex<HashMap<u64, TcpStream>>,
    next: AtomicU64,
    down: AtomicBool,
    hanging: AtomicU64,
    released: AtomicU64,
    stopped: AtomicBool,
    rate: AtomicU64,
    /// Bytes per second of all bodies together, and when the line is free again.
    line_rate: AtomicU64,
    line: Mutex<Option<Instant>>,
    /// Requests for blobs: how many at a time are answered, how many are being answered, and the most that were.
    most_allowed: AtomicU64,
    at_work: AtomicU64,
    most_at_work: AtomicU64,
    delay_us: AtomicU64,
}

impl Proxy {
    /// In front of the registry at `upstream` (`host:port`).
    pub fn start(upstream: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            host: host.clone(),
            upstream: upstream.into(),
            rules: Mutex::default(),
            chaos: Mutex::default(),
            struck: AtomicU64::new(0),
            faults: Mutex::default(),
            seen: Mutex::default(),
            tokens: Mutex::default(),
            issued: Mutex::default(),
            scopes: Mutex::default(),
            forbidden: Mutex::default(),
            downloads: AtomicU64::new(0),
            conditional: AtomicBool::new(false),
            condition: Mutex::default(),
            redirects: Mutex::default(),
            connections: Mutex::default(),
            next: AtomicU64::new(0),
            down: AtomicBool::new(false),
            hanging: AtomicU64::new(0),
            released: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            rate: AtomicU64::new(0),
            line_rate: AtomicU64::new(0),
            line: Mutex::default(),
            most_allowed: AtomicU64::new(u64::MAX),
            at_work: AtomicU64::new(0),
            most_at_work: AtomicU64::new(0),
            delay_us: AtomicU64::new(0),
        });
        std::thread::spawn({
            let shared = shared.clone();
            move || accept(&listener, &shared)
        });
        Proxy { host, shared }
    }

    /// `host:port/name:tag`
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.host)
    }

    /// Adds a rule. The first that matches a request applies to it.
    pub fn rule(&self, rule: Rule) {
        self.shared.rules.lock().unwrap().push(rule);
    }

    /// Faults at random, for requests that no rule is about.
    pub fn chaos(&self, chaos: Chaos) {
        *self.shared.chaos.lock().unwrap() = Some(chaos);
    }

    /// Faults that have happened, by kind.
    pub fn faults(&self) -> std::collections::BTreeMap<&'static str, u64> {
        self.shared.faults.lock().unwrap().clone()
    }

    /// No faults any more; what hangs goes on.
    pub fn heal(&self) {
        self.shared.rules.lock().unwrap().clear();
        *self.shared.chaos.lock().unwrap() = None;
        self.release();
        self.up();
    }

    /// How many requests hang, or have hung.
    pub fn hangs(&self) -> u64 {
        self.shared.hanging.load(Ordering::SeqCst)
    }

    /// What hangs now goes on.
    pub fn release(&self) {
        self.shared.released.store(self.shared.hanging.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// The machine is gone: connections are reset, and new ones too.
    pub fn down(&self) {
        self.shared.down.store(true, Ordering::SeqCst);
        self.shared.drop_connections();
    }

    pub fn up(&self) {
        self.shared.down.store(false, Ordering::SeqCst);
    }

    /// All bodies share a line of so many bytes per second, in the order in which they have something to send. 0: no such line.
    pub fn share_line(&self, bytes_per_second: u64) {
        self.shared.line_rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Of requests for blobs, more than so many at a time are answered with 429.
    pub fn allow_at_once(&self, requests: u64) {
        self.shared.most_allowed.store(requests, Ordering::Relaxed);
    }

    /// The most requests for blobs that were being answered at the same time since the last call of this.
    pub fn take_most_at_once(&self) -> u64 {
        self.shared.most_at_work.swap(0, Ordering::SeqCst)
    }

    /// Requests for blobs that are being answered now.
    pub fn at_once(&self) -> u64 {
        self.shared.at_work.load(Ordering::SeqCst)
    }

    /// Shapes each body to so many bytes per second (0: not at all) and delays each answer.
    pub fn shape(&self, bytes_per_second: u64, delay: Duration) {
        self.shared.rate.store(bytes_per_second, Ordering::Relaxed);
        self.shared.delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// Demands tokens, or (`None`) stops.
    pub fn tokens(&self, tokens: Option<Tokens>) {
        *self.shared.tokens.lock().unwrap() = tokens;
    }

    /// Tokens issued until now are worth nothing any more.
    pub fn revoke_tokens(&self) {
        self.shared.issued.lock().unwrap().clear();
    }

    /// Nobody is given the right to read this repository.
    pub fn forbid(&self, repository: &str) {
        self.shared.forbidden.lock().unwrap().push(repository.into());
    }

    /// The scopes that tokens were asked for since the last call of this.
    pub fn take_scopes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.scopes.lock().unwrap())
    }

    /// How many blobs of more than a megabyte are on their way now.
    pub fn downloads(&self) -> u64 {
        self.shared.downloads.load(Ordering::SeqCst)
    }

    /// `If-Match` is obeyed from now on: the registries that tests have give entity tags and ignore them.
    pub fn obey_conditions(&self) {
        self.shared.conditional.store(true, Ordering::SeqCst);
    }

    /// What came by since the last call of this.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.seen.lock().unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.host); // wakes the accepting thread
        self.shared.drop_connections();
    }
}

impl Shared {
    fn drop_connections(&self) {
        for (_, connection) in self.connections.lock().unwrap().drain() {
            reset(&connection);
        }
    }

    fn fault(&self, line: &str, range: &Option<Range<u64>>) -> Option<Fault> {
        let fault = self.by_rule(line, range).or_else(|| self.at_random(line))?;
        *self.faults.lock().unwrap().entry(fault.name()).or_default() += 1;
        Some(fault)
    }

    fn at_random(&self, line: &str) -> Option<Fault> {
        let chaos = self.chaos.lock().unwrap();
        let chaos = chaos.as_ref().filter(|chaos| chaos.containing.iter().any(|text| line.contains(text)))?;
        chaos.fault(self.struck.fetch_add(1, Ordering::Relaxed))
    }

    /// The fault for a request, counted down.
    fn by_rule(&self, line: &str, range: &Option<Range<u64>>) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let overlaps = |want: &Range<u64>| range.as_ref().is_some_and(|r| r.start < want.end && want.start < r.end);
        let matches = |r: &Rule| line.contains(&r.containing) && r.overlapping.as_ref().is_none_or(overlaps);
        for at in 0..rules.len() {
            if matches(&rules[at]) {
                if rules[at].after > 0 {
                    rules[at].after -= 1;
                    continue;
                }
                let fault = rules[at].fault.clone();
                rules[at].times -= 1;
                if rules[at].times == 0 {
                    rules.remove(at);
                }
                return Some(fault);
            }
        }
        None
    }

    /// What the registry gives as the entity tag of a manifest.
    fn entity_tag(&self, path: &str) -> io::Result<Option<String>> {
        let mut upstream = TcpStream::connect(&self.upstream)?;
        write!(
            upstream,
            "HEAD {path} HTTP/1.1\r\nhost: {}\r\naccept: {}\r\nconnection: close\r\n\r\n",
            self.upstream,
            soci::oci::media_type::OCI_INDEX
        )?;
        Ok(Head::read(&mut BufReader::new(upstream))?.and_then(|head| head.get("etag").map(String::from)))
    }

    /// How a client is told to get a token, where tokens are demanded.
    fn challenge(&self, scopes: &[String]) -> Option<String> {
        self.tokens.lock().unwrap().as_ref()?;
        Some(format!("Bearer realm=\"http://{}/token\",service=\"lab\",scope=\"{}\"", self.host, scopes.join(" ")))
    }

    /// Sleeps as long as `bytes` take at the shaped rate, and until the shared line has carried them.
    fn pace(&self, bytes: usize, own_rate: u64) {
        let rate = match (self.rate.load(Ordering::Relaxed), own_rate) {
            (0, rate) | (rate, 0) => rate,
            (a, b) => a.min(b),
        };
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64));
        }
        let line_rate = self.line_rate.load(Ordering::Relaxed);
        if line_rate > 0 {
            let until = {
                let mut line = self.line.lock().unwrap();
                let free = line.filter(|at| *at > Instant::now()).unwrap_or_else(Instant::now);
                *line.insert(free + Duration::from_secs_f64(bytes as f64 / line_rate as f64))
            };
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
    }
}

/// Counts while it lives.
struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicU64) -> Counted<'a> {
        counter.fetch_add(1, Ordering::SeqCst);
        Counted(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The scopes that a registry demands for a request, as distribution has them.
fn needed(method: &str, path: &str) -> Vec<String> {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let Some(rest) = path.strip_prefix("/v2/").filter(|rest| !rest.is_empty()) else { return Vec::new() };
    let end = ["/blobs/", "/manifests/", "/referrers/"].iter().filter_map(|part| rest.find(part)).min();
    let name = &rest[..end.unwrap_or(rest.len())];
    let actions = if matches!(method, "GET" | "HEAD") && !path.contains("/uploads/") { "pull" } else { "pull,push" };
    let mut out = vec![format!("repository:{name}:{actions}")];
    if let Some((_, from)) = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "from") {
        out.push(format!("repository:{from}:pull"));
    }
    out
}

/// Whether one of the scopes granted has all that a scope needs.
fn covers(granted: &[String], need: &str) -> bool {
    let (name, actions) = need.rsplit_once(':').unwrap();
    granted
        .iter()
        .filter_map(|scope| scope.rsplit_once(':'))
        .any(|(of, has)| of == name && actions.split(',').all(|action| has.split(',').any(|a| a == action)))
}
