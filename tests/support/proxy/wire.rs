//! What goes over the proxy's connections: heads of requests and answers, and what happens to them on the way.

use super::{Counted, Fault, Seen, Shared, covers, needed};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, atomic::Ordering};
use std::time::{Duration, Instant};

/// With nothing in flight worth keeping, closing resets; here the peer must not mistake it for an orderly end.
pub(super) fn reset(connection: &TcpStream) {
    let linger = rustix::net::sockopt::set_socket_linger(connection, Some(Duration::ZERO));
    let _ = (linger, connection.shutdown(Shutdown::Both));
}

pub(super) fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
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
pub(super) struct Head {
    line: String,
    headers: Vec<(String, String)>,
}

impl Head {
    pub(super) fn read(from: &mut impl BufRead) -> io::Result<Option<Head>> {
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

    pub(super) fn get(&self, name: &str) -> Option<&str> {
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

/// A token for what was asked for, less what is forbidden.
fn token(shared: &Shared, writer: &mut TcpStream, body: &[u8], seen: &mut Seen) -> io::Result<()> {
    let token = format!("token-{}", shared.next.fetch_add(1, Ordering::Relaxed));
    let valid = shared.tokens.lock().unwrap().map_or(Duration::from_secs(300), |t| t.valid_for);
    let form = if seen.method == "POST" { body } else { seen.path.split_once('?').map_or("", |(_, q)| q).as_bytes() };
    let asked: Vec<String> = url::form_urlencoded::parse(form)
        .filter(|(name, _)| name == "scope")
        .flat_map(|(_, scopes)| scopes.split_whitespace().map(String::from).collect::<Vec<_>>())
        .collect();
    shared.scopes.lock().unwrap().extend(asked.iter().cloned());
    let forbidden = shared.forbidden.lock().unwrap().clone();
    let granted = asked.into_iter().filter(|s| !forbidden.iter().any(|f| s.starts_with(&format!("repository:{f}:"))));
    let granted = granted.collect();
    shared.issued.lock().unwrap().insert(token.clone(), (Instant::now() + valid, granted));
    let json = format!(r#"{{"token":"{token}","expires_in":{}}}"#, valid.as_secs().max(1));
    say(writer, seen, 200, &[("content-type", "application/json".into())], &json)
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
        return token(shared, writer, body, seen);
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
