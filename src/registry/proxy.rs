//! Which proxy a request takes, by the environment, as Go programs read it: containerd and the Go snapshotter next to us do.
//!
//! `HTTP_PROXY`, `HTTPS_PROXY` (else `ALL_PROXY`) by the scheme of the request, unless `NO_PROXY` names its host: an address, a prefix
//! (`10.0.0.0/8`), a domain (with all below it; only those below it if it begins with a dot or `*.`), each with a port or without, or
//! `*`. Lower-case names count where the upper-case ones are not set. The loopback is never asked through a proxy.
//!
//! A proxy speaks HTTP (`http`, also without a scheme, or `https`) or SOCKS (`socks5`, `socks5h`; either looks up names itself, as Go has it).

use super::url::is_loopback;
use crate::telemetry::catalog::say;
use ::url::{Host, Url};
use std::net::IpAddr;

/// Exceptions looked at; each costs every request a comparison.
const MAX_EXCEPTIONS: usize = 1024;

#[derive(Debug, Clone, Default)]
pub(super) struct Proxies {
    http: Option<Url>,
    https: Option<Url>,
    except: Vec<Exception>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Exception {
    what: What,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Everything,
    Prefix(IpAddr, u8),
    Domain {
        name: String,
        /// Only what is below it.
        below: bool,
    },
}

impl Proxies {
    pub fn of_environment() -> Proxies {
        Proxies::new(&|name| std::env::var(name).ok())
    }

    fn new(variable: &dyn Fn(&str) -> Option<String>) -> Proxies {
        let either = |name: &str| {
            let set = |name: &str| variable(name).filter(|value| !value.is_empty());
            set(name).or_else(|| set(&name.to_ascii_lowercase()))
        };
        let proxy = |name| either(name).and_then(|text| proxy(name, &text));
        let all = proxy("ALL_PROXY");
        let except = either("NO_PROXY").unwrap_or_default();
        Proxies {
            http: proxy("HTTP_PROXY").or_else(|| all.clone()),
            https: proxy("HTTPS_PROXY").or(all),
            except: except.split(',').take(MAX_EXCEPTIONS).filter_map(exception).collect(),
        }
    }

    /// The proxy for a request to `url`.
    pub fn of(&self, url: &Url) -> Option<Url> {
        let proxy = match url.scheme() {
            "https" => self.https.as_ref()?,
            _ => self.http.as_ref()?,
        };
        (!is_loopback(url) && !self.except.iter().any(|e| e.covers(url))).then(|| proxy.clone())
    }
}

/// The schemes of proxies.
const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];

fn parse(text: &str) -> Option<Url> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let mut url = Url::parse(&with_scheme).ok().filter(|url| url.has_host() && SCHEMES.contains(&url.scheme()))?;
    if url.scheme() == "socks5" {
        // What the library calls so looks names up here, where only the proxy may know them.
        url.set_scheme("socks5h").ok()?;
    }
    Some(url)
}

/// Variables of the environment that should name a proxy and do not.
pub fn unusable_proxies() -> Vec<&'static str> {
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    let is_set = |name: &&str| std::env::var(name).is_ok_and(|text| !text.is_empty() && parse(&text).is_none());
    names.into_iter().filter(is_set).collect()
}

fn proxy(name: &str, text: &str) -> Option<Url> {
    let url = parse(text);
    if url.is_none() {
        // What is in it may be a password.
        say!(
            ProxyIgnored,
            variable = name,
            "this variable of the environment is not the URL of a proxy (http, https or socks5); going on without it"
        );
    }
    url
}

fn exception(text: &str) -> Option<Exception> {
    let text = text.trim().to_ascii_lowercase();
    if text.is_empty() {
        return None;
    }
    if text == "*" {
        return Some(Exception { what: What::Everything, port: None });
    }
    if let Some((ip, length)) = text.split_once('/') {
        let ip: IpAddr = ip.parse().ok()?;
        let length: u8 = length.parse().ok()?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        return (length <= most).then_some(Exception { what: What::Prefix(ip, length), port: None });
    }
    let (host, port) = match text.rsplit_once(':') {
        // A bare IPv6 address has colons, and no port.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port.parse().ok()?)),
        _ => (text.as_str(), None),
    };
    if let Ok(ip) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        let length = if ip.is_ipv4() { 32 } else { 128 };
        return Some(Exception { what: What::Prefix(ip, length), port });
    }
    let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
    let (name, below) = match host.strip_prefix('.') {
        Some(name) => (name, true),
        None => (host, false),
    };
    (!name.is_empty()).then(|| Exception { what: What::Domain { name: name.to_owned(), below }, port })
}

impl Exception {
    fn covers(&self, url: &Url) -> bool {
        if self.port.is_some() && self.port != url.port_or_known_default() {
            return false;
        }
        match (&self.what, url.host()) {
            (What::Everything, _) => true,
            (What::Prefix(ip, length), Some(Host::Ipv4(host))) => is_in(IpAddr::V4(host), *ip, *length),
            (What::Prefix(ip, length), Some(Host::Ipv6(host))) => is_in(IpAddr::V6(host), *ip, *length),
            (What::Domain { name, below }, Some(Host::Domain(host))) => {
                let host = host.trim_end_matches('.');
                let is_below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                is_below || (!below && host == name)
            }
            _ => false,
        }
    }
}

fn is_in(host: IpAddr, prefix: IpAddr, length: u8) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, true),
        IpAddr::V6(ip) => (u128::from(ip), false),
    };
    let ((host, host_is_v4), (prefix, prefix_is_v4)) = (bits(host), bits(prefix));
    // A shift by the whole width leaves nothing to compare.
    let shift = 128 - u32::from(length);
    host_is_v4 == prefix_is_v4 && host.checked_shr(shift).unwrap_or(0) == prefix.checked_shr(shift).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxied(no_proxy: &str, url: &str) -> bool {
        let proxies = Proxies::new(&|name| match name {
            "HTTPS_PROXY" => Some("proxy:3128".into()),
            "http_proxy" => Some("http://u:p@other:1".into()),
            "NO_PROXY" => Some(no_proxy.into()),
            _ => None,
        });
        proxies.of(&Url::parse(url).unwrap()).is_some()
    }

    #[test]
    fn exceptions_are_those_of_go() {
        for (except, url, expected) in [
            ("", "https://r.example/", true),
            ("", "http://r.example/", true),
            ("", "http://127.0.0.1:5000/", false),
            ("", "http://[::1]:5000/", false),
            ("*", "https://r.example/", false),
            ("r.example", "https://r.example/", false),
            ("example", "https://r.example/", false),
            (".example", "https://r.example/", false),
            ("*.example", "https://r.example/", false),
            (".r.example", "https://r.example/", true),
            ("ample", "https://r.example/", true),
            (" R.EXAMPLE:443 ,x", "https://r.example/", false),
            ("r.example:5000", "https://r.example/", true),
            ("r.example:5000", "https://r.example:5000/", false),
            ("10.0.0.0/8", "https://10.1.2.3/", false),
            ("10.0.0.0/8", "https://11.1.2.3/", true),
            ("0.0.0.0/0", "https://11.1.2.3/", false),
            ("10.1.2.3", "https://10.1.2.3:5000/", false),
            ("10.1.2.3:5000", "https://10.1.2.3/", true),
            ("fd00::/8", "https://[fd00::1]/", false),
            ("fd00::1", "https://[fd00::1]/", false),
            ("[fd00::1]:5000", "https://[fd00::1]:5000/", false),
            ("fd00::/8", "https://10.0.0.1/", true),
            ("10.0.0.0/99,/,:,:x,[", "https://10.0.0.1/", true),
        ] {
            assert_eq!(proxied(except, url), expected, "NO_PROXY={except} {url}");
        }
    }

    #[test]
    fn upper_case_comes_first_and_nonsense_is_no_proxy() {
        let proxies = Proxies::new(&|name| match name {
            "HTTP_PROXY" => Some("http://".into()),
            "ALL_PROXY" => Some("socks5://all:1".into()),
            "https_proxy" => Some("lower:1".into()),
            _ => None,
        });
        let of = |url| proxies.of(&Url::parse(url).unwrap()).map(|url| url.to_string());
        assert_eq!(of("https://x/").as_deref(), Some("http://lower:1/"));
        assert_eq!(of("http://x/").as_deref(), Some("socks5h://all:1"), "the proxy looks names up, as with Go");
        assert_eq!(parse("ftp://p:1"), None);
    }
}
