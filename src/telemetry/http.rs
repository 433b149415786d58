//! The smallest HTTP server that Prometheus and curl are happy with.
//!
//! It answers one GET per connection and closes it. Everything a peer can make it hold is bounded: connections, header bytes, time.
#![forbid(unsafe_code)]

use super::{metrics::Metrics, status};
use std::{
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, FileTypeExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, UnixListener},
    sync::Semaphore,
};

/// Connections served at once; the rest wait in the kernel's backlog. A handful of scrapers, each for milliseconds.
const CONNECTIONS: usize = 16;
/// Pending connections the kernel keeps.
const BACKLOG: u32 = 64;
/// Longest request head. Prometheus sends about 300 bytes.
const HEAD: usize = 8 * 1024;
/// For the whole exchange.
const PATIENCE: Duration = if cfg!(test) { Duration::from_millis(500) } else { Duration::from_secs(10) };

/// Where to listen: `metrics_network` and `metrics_address`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Tcp { address: String, family: Family },
    Unix(PathBuf),
}

/// Which addresses of a name count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Any,
    V4,
    V6,
}

/// A network name that we do not listen on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown network {0:?}: one of tcp, tcp4, tcp6, unix")]
pub struct UnknownNetwork(String);

impl Endpoint {
    pub fn new(network: &str, address: &str) -> Result<Endpoint, UnknownNetwork> {
        let tcp = |family| Ok(Endpoint::Tcp { address: address.to_owned(), family });
        match network {
            "" | "tcp" => tcp(Family::Any),
            "tcp4" => tcp(Family::V4),
            "tcp6" => tcp(Family::V6),
            "unix" => Ok(Endpoint::Unix(address.into())),
            other => Err(UnknownNetwork(other.to_owned())),
        }
    }

    /// Starts listening. For a Unix socket a missing parent directory is made (0700) and an old socket removed.
    pub async fn bind(&self) -> io::Result<Listener> {
        match self {
            Endpoint::Tcp { address, family } => bind_tcp(address, *family).await.map(Listener::Tcp),
            Endpoint::Unix(path) => {
                if let Some(parent) = path.parent()
                    && let Err(error) = std::fs::DirBuilder::new().mode(0o700).create(parent)
                    && error.kind() != io::ErrorKind::AlreadyExists
                {
                    return Err(error);
                }
                match std::fs::symlink_metadata(path) {
                    Ok(old) if old.file_type().is_socket() => std::fs::remove_file(path)?,
                    _ => {}
                }
                UnixListener::bind(path).map(Listener::Unix)
            }
        }
    }
}

async fn bind_tcp(address: &str, family: Family) -> io::Result<TcpListener> {
    // ":1338" is every address of this machine, as in Go.
    let everywhere = match family {
        Family::V4 => "0.0.0.0",
        Family::Any | Family::V6 => "[::]",
    };
    let name = if address.starts_with(':') { format!("{everywhere}{address}") } else { address.to_owned() };
    let fits = |address: &SocketAddr| match family {
        Family::Any => true,
        Family::V4 => address.is_ipv4(),
        Family::V6 => address.is_ipv6(),
    };
    // Go prefers IPv4 where a name has both.
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host(name).await?.filter(fits).collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, format!("{address} has no address of that family"));
    for candidate in addresses {
        let listening = match candidate {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }
        .and_then(|socket| {
            socket.set_reuseaddr(true)?;
            socket.bind(candidate)?;
            socket.listen(BACKLOG)
        });
        match listening {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A socket that connections arrive at.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// What is served.
#[derive(Clone)]
pub enum Content {
    /// `/metrics`.
    Metrics(Metrics),
    /// [`status::PATH`]: whatever this gives, as JSON.
    Status(Arc<dyn Fn() -> String + Send + Sync>),
    /// The Go runtime's profiles, which this program does not have: 501 with a hint.
    Debug,
}

struct Response {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

const JSON: &str = "application/json";
const PLAIN: &str = "text/plain; charset=utf-8";
/// The exposition format's own type.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Content {
    fn answer(&self, request: &Request<'_>) -> Response {
        let plain = |status, body: &str| Response { status, content_type: PLAIN, body: body.to_owned() };
        if !matches!(request.method, "GET" | "HEAD") {
            return plain("405 Method Not Allowed", "only GET\n");
        }
        match self {
            Content::Metrics(metrics) if request.path == "/metrics" => {
                Response { status: "200 OK", content_type: EXPOSITION, body: metrics.render() }
            }
            Content::Status(document) if request.path == status::PATH => {
                Response { status: "200 OK", content_type: JSON, body: document() }
            }
            Content::Debug if request.path.starts_with("/debug/pprof") => {
                plain("501 Not Implemented", "this snapshotter is not written in Go and has no pprof; use perf\n")
            }
            Content::Metrics(_) | Content::Status(_) | Content::Debug => plain("404 Not Found", "404 page not found\n"),
        }
    }
}

/// Serves until dropped.
pub async fn serve(listener: Listener, content: Content) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let content = content.clone();
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    converse(stream, &content).await;
                    drop(slot);
                })
            }),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    converse(stream, &content).await;
                    drop(slot);
                })
            }),
        };
        if accepted.is_err() {
            // Out of descriptors, most likely: trying again at once would only burn time.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, content: &Content) {
    // A peer that is slow, or gone, or talks nonsense, is its own problem.
    let _ = tokio::time::timeout(PATIENCE, exchange(&mut stream, content)).await;
}

async fn exchange(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), content: &Content) -> io::Result<()> {
    let mut head = Vec::with_capacity(1024);
    let complete = loop {
        if head.windows(4).any(|window| window == b"\r\n\r\n") || head.windows(2).any(|window| window == b"\n\n") {
            break true;
        }
        if head.len() >= HEAD {
            break false;
        }
        let room = (HEAD - head.len()) as u64;
        if (&mut *stream).take(room).read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    };
    let (response, with_body) = match Request::parse(&head) {
        Some(request) if complete => (content.answer(&request), request.method != "HEAD"),
        Some(_) => {
            (Response { status: "431 Request Header Fields Too Large", content_type: PLAIN, body: String::new() }, true)
        }
        None => (Response { status: "400 Bad Request", content_type: PLAIN, body: "bad request\n".into() }, true),
    };
    let mut out = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        response.status,
        response.content_type,
        response.body.len()
    );
    if with_body {
        out.push_str(&response.body);
    }
    stream.write_all(out.as_bytes()).await?;
    stream.shutdown().await
}

/// The first line of a request.
#[derive(Debug, PartialEq, Eq)]
struct Request<'a> {
    method: &'a str,
    /// Without the query.
    path: &'a str,
}

impl<'a> Request<'a> {
    fn parse(head: &'a [u8]) -> Option<Request<'a>> {
        let line = head.split(|byte| *byte == b'\n').next()?;
        let mut words = std::str::from_utf8(line).ok()?.trim_end().split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() || !version.starts_with("HTTP/1.") || method.is_empty() {
            return None;
        }
        let path = target.split('?').next()?;
        path.starts_with('/').then_some(Request { method, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Count;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn proptest_parsing_a_request_is_total(head in prop::collection::vec(any::<u8>(), 0..100)) {
            Request::parse(&head);
        }
    }

    async fn ask(endpoint: &Endpoint, request: &[u8]) -> String {
        let mut answer = String::new();
        match endpoint {
            Endpoint::Tcp { address, .. } => {
                let mut stream = tokio::net::TcpStream::connect(address).await.expect("connect");
                stream.write_all(request).await.expect("write");
                stream.read_to_string(&mut answer).await.expect("read");
            }
            Endpoint::Unix(path) => {
                let mut stream = tokio::net::UnixStream::connect(path).await.expect("connect");
                stream.write_all(request).await.expect("write");
                stream.read_to_string(&mut answer).await.expect("read");
            }
        }
        answer
    }

    #[tokio::test]
    async fn metrics_are_served_over_tcp_and_unix_and_nothing_else_is() {
        let dir = tempfile::tempdir().expect("temp");
        let metrics = Metrics::new();
        metrics.general().count(Count::FuseMountFailure);
        // The directory does not exist yet.
        let unix = Endpoint::new("unix", dir.path().join("run/metrics.sock").to_str().expect("utf-8")).expect("known");
        for endpoint in [Endpoint::new("tcp", "localhost:0").expect("known"), unix] {
            let listener = endpoint.bind().await.expect("bind");
            let reachable = match &listener {
                Listener::Tcp(tcp) => {
                    let address = tcp.local_addr().expect("address").to_string();
                    Endpoint::Tcp { address, family: Family::Any }
                }
                Listener::Unix(_) => endpoint.clone(),
            };
            let served = tokio::spawn(serve(listener, Content::Metrics(metrics.clone())));
            let answer = ask(&reachable, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
            assert!(answer.ends_with("operation_type=\"fuse_mount_failure_count\"} 1\n"));
            let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
            assert!(head.contains(&format!("Content-Length: {}", body.len())));
            for (request, status) in [
                (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
                (b"GET /metrics/ HTTP/1.0\n\n", "404"),
                (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
                (b"nonsense\r\n\r\n", "400"),
            ] {
                assert!(ask(&reachable, request).await.starts_with(&format!("HTTP/1.1 {status} ")));
            }
            let endless = [&b"GET /metrics HTTP/1.1\r\n"[..], &[b'a'; HEAD]].concat();
            assert!(ask(&reachable, &endless[..HEAD]).await.starts_with("HTTP/1.1 431 "));
            served.abort();
        }
        // A socket that a dead daemon left is replaced; a file of somebody else is not.
        let old = Endpoint::Unix(dir.path().join("run/metrics.sock"));
        old.bind().await.expect("bound again");
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").expect("write");
        assert!(Endpoint::Unix(file.clone()).bind().await.is_err());
        assert_eq!(std::fs::read(file).expect("read"), b"mine");
    }

    #[tokio::test]
    async fn peers_that_say_nothing_do_not_keep_others_out_for_ever() {
        let listener = Endpoint::new("tcp4", "127.0.0.1:0").expect("known").bind().await.expect("bind");
        let Listener::Tcp(tcp) = &listener else { panic!("tcp") };
        let address = tcp.local_addr().expect("address").to_string();
        let served = tokio::spawn(serve(listener, Content::Debug));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(tokio::net::TcpStream::connect(&address).await.expect("connect"));
        }
        let reachable = Endpoint::Tcp { address, family: Family::V4 };
        let asked = ask(&reachable, b"GET /debug/pprof/profile HTTP/1.1\r\n\r\n");
        let answer = tokio::time::timeout(PATIENCE + Duration::from_secs(5), asked).await.expect("in time");
        assert!(answer.starts_with("HTTP/1.1 501 "), "{answer}");
        served.abort();
    }

    #[test]
    fn networks_have_gos_names() {
        assert_eq!(Endpoint::new("udp", "x"), Err(UnknownNetwork("udp".into())));
        assert!(matches!(Endpoint::new("tcp6", ":1"), Ok(Endpoint::Tcp { family: Family::V6, .. })));
    }
}
