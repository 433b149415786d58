//! A registry on a real socket whose every answer is written by the test: right ones, wrong ones, and none.
//!
//! One thread per connection, HTTP/1.1 with keep-alive. The script is a function of the request; it may count, remember and
//! sleep. What was asked is kept for the test to look at.

use soci::oci::Digest;
use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With its query.
    pub path: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: String,
    /// Which connection it came on.
    pub connection: usize,
    /// How many requests came before it.
    pub number: usize,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The range asked for, end exclusive.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }
}

/// What is answered, piece by piece.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    parts: Vec<Part>,
    /// None: chunked.
    length: Option<usize>,
}

#[derive(Debug, Clone)]
enum Part {
    Bytes(Vec<u8>),
    Stall(Duration),
    /// Close without a word.
    Close,
    /// Close with a reset.
    Reset,
}

impl Reply {
    pub fn new(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), parts: Vec::new(), length: Some(0) }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn body(mut self, bytes: impl Into<Vec<u8>>) -> Reply {
        let bytes = bytes.into();
        self.length = Some(bytes.len());
        self.parts = vec![Part::Bytes(bytes)];
        self
    }

    pub fn json(self, text: impl Into<String>) -> Reply {
        self.header("Content-Type", "application/json").body(text.into())
    }

    /// Sends no Content-Length.
    pub fn chunked(mut self) -> Reply {
        self.length = None;
        self
    }

    /// A body in one chunk, and the end.
    pub fn chunked_body(self, bytes: impl Into<Vec<u8>>) -> Reply {
        self.body(bytes).chunked()
    }

    /// Sends only the first `n` bytes of the body, then does `what`.
    fn after(mut self, n: usize, what: Part) -> Reply {
        if let Some(Part::Bytes(bytes)) = self.parts.first_mut() {
            let rest = bytes.split_off(n);
            self.parts.push(what);
            self.parts.push(Part::Bytes(rest));
        }
        self
    }

    pub fn truncated(self, n: usize) -> Reply {
        self.after(n, Part::Close)
    }

    pub fn reset_after(self, n: usize) -> Reply {
        self.after(n, Part::Reset)
    }

    pub fn stalled(self, n: usize, time: Duration) -> Reply {
        self.after(n, Part::Stall(time))
    }

    /// No answer at all, and a reset.
    pub fn reset() -> Reply {
        Reply { status: 0, parts: vec![Part::Reset], ..Reply::new(0) }
    }

    /// No answer for this long, then none at all.
    pub fn silence(time: Duration) -> Reply {
        Reply { status: 0, parts: vec![Part::Stall(time), Part::Close], ..Reply::new(0) }
    }

    /// A blob, or the range of it that was asked for.
    pub fn blob(request: &Request, bytes: &[u8]) -> Reply {
        match request.range() {
            None => Reply::new(200).body(bytes),
            Some((start, _)) if start >= bytes.len() => Reply::new(416),
            Some((start, end)) => {
                let end = end.min(bytes.len());
                Reply::new(206)
                    .header("Content-Range", format!("bytes {start}-{}/{}", end - 1, bytes.len()))
                    .body(&bytes[start..end])
            }
        }
    }

    pub fn manifest(media_type: &str, bytes: &[u8]) -> Reply {
        Reply::new(200).header("Content-Type", media_type).body(bytes)
    }
}

type Script = dyn Fn(&Request) -> Reply + Send + Sync;

/// The server. It is gone when dropped.
pub struct FaultRegistry {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl FaultRegistry {
    pub fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> FaultRegistry {
        FaultRegistry::run(None, script)
    }

    /// With TLS; the name that clients ask for is the header `sni` of their requests.
    pub fn start_tls(
        tls: rustls::ServerConfig,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> FaultRegistry {
        FaultRegistry::run(Some(Arc::new(tls)), script)
    }

    fn run(
        tls: Option<Arc<rustls::ServerConfig>>,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> FaultRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let script: Arc<Script> = Arc::new(script);
        let (seen, stopped) = (requests.clone(), stop.clone());
        thread::spawn(move || {
            let connections = AtomicUsize::new(0);
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (script, seen) = (script.clone(), seen.clone());
                let connection = connections.fetch_add(1, Ordering::SeqCst);
                let Ok(stream) = stream else { continue };
                // It ends with its client; an error is what the test made happen.
                let tls = tls.clone();
                thread::spawn(move || drop(accept(stream, tls, connection, &seen, &*script)));
            }
        });
        FaultRegistry { address, requests, stop }
    }

    /// `host:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests had `text` in their path.
    pub fn count(&self, text: &str) -> usize {
        self.requests().iter().filter(|r| r.path.contains(text)).count()
    }
}

impl Drop for FaultRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

fn accept(
    mut raw: TcpStream,
    tls: Option<Arc<rustls::ServerConfig>>,
    connection: usize,
    seen: &Mutex<Vec<Request>>,
    script: &Script,
) -> std::io::Result<()> {
    raw.set_nodelay(true)?;
    let under = raw.try_clone()?;
    let Some(tls) = tls else { return serve(raw, &under, None, connection, seen, script) };
    let mut session = rustls::ServerConnection::new(tls).map_err(std::io::Error::other)?;
    session.complete_io(&mut raw)?;
    let name = session.server_name().map(str::to_owned);
    serve(rustls::StreamOwned::new(session, raw), &under, name, connection, seen, script)
}

fn serve(
    stream: impl Read + Write,
    under: &TcpStream,
    name: Option<String>,
    connection: usize,
    seen: &Mutex<Vec<Request>>,
    script: &Script,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers: HashMap<_, _> = name.iter().map(|name| ("sni".to_owned(), name.clone())).collect();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let request = {
            let mut seen = seen.lock().unwrap();
            let body = String::from_utf8_lossy(&body).into_owned();
            let request = Request { method, path, headers, body, connection, number: seen.len() };
            seen.push(request.clone());
            request
        };
        send(reader.get_mut(), under, script(&request))?;
    }
}

fn send(writer: &mut (impl Read + Write), under: &TcpStream, reply: Reply) -> std::io::Result<()> {
    if reply.status != 0 {
        let mut head = format!("HTTP/1.1 {} Scripted\r\n", reply.status);
        for (name, value) in &reply.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &match reply.length {
            Some(length) => format!("Content-Length: {length}\r\n\r\n"),
            None => "Transfer-Encoding: chunked\r\n\r\n".to_owned(),
        };
        writer.write_all(head.as_bytes())?;
    }
    for part in reply.parts {
        match part {
            Part::Bytes(bytes) if bytes.is_empty() => {}
            Part::Bytes(bytes) if reply.length.is_none() => {
                writer.write_all(format!("{:x}\r\n", bytes.len()).as_bytes())?;
                writer.write_all(&bytes)?;
                writer.write_all(b"\r\n")?;
            }
            Part::Bytes(bytes) => writer.write_all(&bytes)?,
            Part::Stall(time) => thread::sleep(time),
            Part::Close => return Err(std::io::ErrorKind::ConnectionAborted.into()),
            Part::Reset => {
                rustix::net::sockopt::set_socket_linger(under, Some(Duration::ZERO))?;
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
        }
    }
    if reply.length.is_none() {
        writer.write_all(b"0\r\n\r\n")?;
    }
    Ok(())
}

/// Bytes that look like nothing in particular, the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Content served as a registry should: blobs, manifests by digest and tag.
#[derive(Default, Clone)]
pub struct Contents {
    blobs: HashMap<Digest, Vec<u8>>,
    manifests: HashMap<String, (String, Vec<u8>)>,
}

impl Contents {
    pub fn blob(&mut self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.blobs.insert(digest, bytes.to_vec());
        digest
    }

    pub fn manifest(&mut self, media_type: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.manifests.insert(digest.to_string(), (media_type.into(), bytes.to_vec()));
        digest
    }

    pub fn tag(&mut self, tag: &str, media_type: &str, bytes: &[u8]) {
        self.manifests.insert(tag.into(), (media_type.into(), bytes.to_vec()));
    }

    /// The answer of a registry that works, for any repository.
    pub fn answer(&self, request: &Request) -> Reply {
        let path = request.path.split('?').next().unwrap_or_default();
        let not_found = || Reply::new(404).json(r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#);
        if let Some((_, digest)) = path.split_once("/blobs/") {
            let blob = digest.parse().ok().and_then(|digest: Digest| self.blobs.get(&digest));
            return blob.map_or_else(not_found, |bytes| Reply::blob(request, bytes));
        }
        match path.split_once("/manifests/").and_then(|(_, target)| self.manifests.get(target)) {
            Some((media_type, bytes)) => Reply::manifest(media_type, bytes),
            None => not_found(),
        }
    }
}
