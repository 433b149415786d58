//! A registry with faults: an HTTP proxy in front of a real one that does to each request what the first matching [`Rule`] says, and
//! writes down what it saw.
//!
//! Threads and blocking sockets, HTTP/1.1 with keep-alive towards the client, one connection per request towards the registry.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// With nothing in flight worth keeping, closing resets; here the peer must not mistake it for an orderly end.
fn reset(connection: &TcpStream) {
    let linger = rustix::net::sockopt::set_socket_linger(connection, Some(Duration::ZERO));
    let _ = (linger, connection.shutdown(Shutdown::Both));
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for connection in listener.incoming() {
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok(connection) = connection else { continue };
        if shared.down.load(Ordering::SeqCst) {
            reset(&connection);
            continue;
        }
        let key = shared.next.fetch_add(1, Ordering::Relaxed);
        shared.connections.lock().unwrap().insert(key, connection.try_clone().unwrap());
        let shared = shared.clone();
        std::thread::spawn(move || {
            let _ = serve(key, &connection, &shared);
            let _ = connection.shutdown(Shutdown::Both);
            shared.connections.lock().unwrap().remove(&key);
        });
    }
}

/// The head of a request or response: first line, headers with lower-case names.
struct Head {
    line: String,
    headers: Vec<(String, String)>,
}

impl Head {
    fn read(from: &mut impl BufRead) -> io::Result<Option<Head>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end().to_string();
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let headers = lines
            .iter()
            .skip(1)
            .filter_map(|l| l.split_once(':'))
            .map(|(k, v)| (k.to_ascii_lowercase(), v.trim().to_string()));
        Ok(Some(Head { headers: headers.collect(), line: lines.first().cloned().unwrap_or_default() }))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    fn set(&mut self, name: &str, value: Option<String>) {
        self.headers.retain(|(k, _)| k != name);
        self.headers.extend(value.map(|v| (name.to_string(), v)));
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut out = format!("{}\r\n", self.line);
        self.headers.iter().for_each(|(k, v)| out += &format!("{k}: {v}\r\n"));
        to.write_all((out + "\r\n").as_bytes())
    }

    fn length(&self) -> u64 {
        self.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0)
    }
}

/// `bytes=a-b`, the only form a snapshotter sends.
fn range_of(head: &Head) -> Option<Range<u64>> {
    let (from, to) = head.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some(from.parse().ok()?..to.parse::<u64>().map_or(u64::MAX, |to| to + 1))
}

fn serve(key: u64, connection: &TcpStream, shared: &Shared) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut writer = connection.try_clone()?;
    while let Some(request) = Head::read(&mut reader)? {
        let mut body = vec![0; request.length() as usize];
        reader.read_exact(&mut body)?;
        let mut words = request.line.split(' ');
        let (method, path) = (words.next().unwrap_or("").to_string(), words.next().unwrap_or("").to_string());
        let mut seen = Seen {
            range: range_of(&request),
            authorization: request.get("authorization").map(String::from),
            status: 0,
            bytes: 0,
            received: body.len() as u64,
            connection: key,
            method,
            path,
        };
        let is_blob = seen.method == "GET" && seen.path.contains("/blobs/");
        let result = match is_blob {
            true => {
                let at_work = shared.at_work.fetch_add(1, Ordering::SeqCst) + 1;
                let result = if at_work > shared.most_allowed.load(Ordering::Relaxed) {
                    say(&mut writer, &mut seen, 429, &[], "")
                } else {
                    shared.most_at_work.fetch_max(at_work, Ordering::SeqCst);
                    answer(shared, connection, &mut writer, request, &body, &mut seen)
                };
                shared.at_work.fetch_sub(1, Ordering::SeqCst);
                result
            }
            false => answer(shared, connection, &mut writer, request, &body, &mut seen),
        };
        shared.seen.lock().unwrap().push(seen);
        result?;
    }
    Ok(())
}

/// An answer of our own.
fn say(writer: &mut TcpStream, seen: &mut Seen, status: u16, headers: &[(&str, String)], body: &str) -> io::Result<()> {
    seen.status = status;
    let mut head = Head { line: format!("HTTP/1.1 {status} -"), headers: Vec::new() };
    headers.iter().for_each(|(k, v)| head.set(k, Some(v.clone())));
    head.set("content-length", Some(body.len().to_string()));
    head.write(writer)?;
    if seen.method == "HEAD" { Ok(()) } else { writer.write_all(body.as_bytes()) }
}

fn answer(
    shared: &Shared,
    connection: &TcpStream,
    writer: &mut TcpStream,
    mut request: Head,
    body: &[u8],
    seen: &mut Seen,
) -> io::Result<()> {
    std::thread::sleep(Duration::from_micros(shared.delay_us.load(Ordering::Relaxed)));
    if seen.path.starts_with("/token") {
        let token = format!("token-{}", shared.next.fetch_add(1, Ordering::Relaxed));
        let valid = shared.tokens.lock().unwrap().map_or(Duration::from_secs(300), |t| t.valid_for);
        let form =
            if seen.method == "POST" { body } else { seen.path.split_once('?').map_or("", |(_, q)| q).as_bytes() };
        let asked: Vec<String> = url::form_urlencoded::parse(form)
            .filter(|(name, _)| name == "scope")
            .flat_map(|(_, scopes)| scopes.split_whitespace().map(String::from).collect::<Vec<_>>())
            .collect();
        shared.scopes.lock().unwrap().extend(asked.iter().cloned());
        let forbidden = shared.forbidden.lock().unwrap().clone();
        let granted =
            asked.into_iter().filter(|s| !forbidden.iter().any(|f| s.starts_with(&format!("repository:{f}:"))));
        let granted = granted.collect();
        shared.issued.lock().unwrap().insert(token.clone(), (Instant::now() + valid, granted));
        let json = format!(r#"{{"token":"{token}","expires_in":{}}}"#, valid.as_secs().max(1));
        return say(writer, seen, 200, &[("content-type", "application/json".into())], &json);
    }
    if let Some(ticket) = seen.path.strip_prefix("/elsewhere/") {
        let place = shared.redirects.lock().unwrap().get(ticket).cloned();
        match place {
            Some((path, until)) if Instant::now() < until => request.line = format!("{} {path} HTTP/1.1", seen.method),
            _ => return say(writer, seen, 403, &[], "expired"),
        }
    } else if shared.tokens.lock().unwrap().is_some() {
        let issued = shared.issued.lock().unwrap();
        let token = seen.authorization.as_deref().and_then(|a| a.strip_prefix("Bearer "));
        let needed = needed(&seen.method, &seen.path);
        let granted = token.and_then(|t| issued.get(t)).filter(|(until, _)| Instant::now() < *until);
        let valid = granted.is_some_and(|(_, granted)| needed.iter().all(|need| covers(granted, need)));
        drop(issued);
        if !valid {
            let challenge = shared.challenge(&needed).unwrap_or_default();
            return say(
                writer,
                seen,
                401,
                &[("www-authenticate", challenge)],
                r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#,
            );
        }
    }
    let line = request.line.clone();
    let fault = shared.fault(&line, &seen.range);
    match &fault {
        Some(Fault::Status(status)) => return say(writer, seen, *status, &[], ""),
        Some(Fault::RetryAfter(status, seconds)) => {
            return say(writer, seen, *status, &[("retry-after", seconds.to_string())], "");
        }
        Some(Fault::Redirect(valid)) if !seen.path.starts_with("/elsewhere/") => {
            let ticket = format!("{}-{}", shared.next.fetch_add(1, Ordering::Relaxed), "s".repeat(20));
            shared.redirects.lock().unwrap().insert(ticket.clone(), (seen.path.clone(), Instant::now() + *valid));
            return say(writer, seen, 307, &[("location", format!("http://{}/elsewhere/{ticket}", shared.host))], "");
        }
        Some(Fault::Stall(time)) => std::thread::sleep(*time),
        Some(Fault::Refuse) => {
            reset(connection);
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Some(Fault::Revoke) => {
            shared.issued.lock().unwrap().clear();
            return match shared.challenge(&needed(&seen.method, &seen.path)) {
                Some(challenge) => say(writer, seen, 401, &[("www-authenticate", challenge)], ""),
                None => say(writer, seen, 401, &[], ""),
            };
        }
        Some(Fault::Hang) => {
            let mine = shared.hanging.fetch_add(1, Ordering::SeqCst) + 1;
            while shared.released.load(Ordering::SeqCst) < mine && !shared.stopped.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Some(Fault::WholeBlob) => request.set("range", None),
        _ => (),
    }

    let mut _condition = None;
    if let (true, Some(wanted)) = (shared.conditional.load(Ordering::SeqCst), request.get("if-match")) {
        _condition = Some(shared.condition.lock().unwrap());
        if shared.entity_tag(&seen.path)?.as_deref() != Some(wanted) {
            return say(writer, seen, 412, &[], "");
        }
    }
    // The registry must see itself as the host, or its upload locations lead past us; and it must end the connection when it is done.
    let upstream = TcpStream::connect(&shared.upstream)?;
    upstream.set_nodelay(true)?;
    request.set("connection", Some("close".into()));
    request.set("authorization", None);
    request.write(&mut &upstream)?;
    (&upstream).write_all(body)?;
    let mut from = BufReader::with_capacity(1 << 16, upstream);
    let mut response = Head::read(&mut from)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    seen.status = response.line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    response.set("connection", None);
    let whole = response.length();
    let chunked = response.get("transfer-encoding").is_some();
    if let Some(Fault::WrongRange(shift)) = fault
        && let Some(range) = &seen.range
    {
        response.set("content-range", Some(format!("bytes {}-{}/*", range.start + shift, range.end - 1 + shift)));
    }
    if chunked {
        // Only small answers (errors, tag lists) are chunked; passing the chunks on as they are ends with the connection.
        response.set("connection", Some("close".into()));
    }
    response.write(writer)?;
    if seen.method == "HEAD" || matches!(seen.status, 204 | 304) {
        return Ok(());
    }
    let _counted = (seen.path.contains("/blobs/") && whole > 1 << 20).then(|| Counted::new(&shared.downloads));
    let mut left = if chunked { u64::MAX } else { whole };
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let want = (buffer.len() as u64).min(left) as usize;
        let got = from.read(&mut buffer[..want])?;
        if got == 0 {
            break;
        }
        let (start, end) = (seen.bytes, seen.bytes + got as u64);
        let mut send = got;
        match fault {
            Some(Fault::Corrupt(at)) if (start..end).contains(&at) => buffer[(at - start) as usize] ^= 0x55,
            Some(Fault::Truncate(after) | Fault::Reset(after) | Fault::Freeze(after)) if after < end => {
                send = (after - start) as usize
            }
            _ => (),
        }
        shared.pace(send, if let Some(Fault::Slow(rate)) = fault { rate } else { 0 });
        writer.write_all(&buffer[..send])?;
        seen.bytes += send as u64;
        if send < got {
            if matches!(fault, Some(Fault::Reset(_))) {
                reset(connection);
            }
            if matches!(fault, Some(Fault::Freeze(_))) {
                // Until the client gives up.
                let _ = (&*connection).read(&mut [0]);
            }
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        left -= got as u64;
    }
    if chunked { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
}
