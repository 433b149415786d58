//! URLs as people may see them, and which of them are the same place.

use ::url::{Host, Url};

/// `url` for logs and errors: the values of its query replaced, keys sorted, user information masked, fragment gone.
///
/// Every URL that leaves this module in a text went through here: a signed URL is a capability.
pub fn redact(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_fragment(None);
    if !shown.username().is_empty() || shown.password().is_some() {
        // Both fail only on URLs that cannot have user information, and those have none.
        let _ = shown.set_username("xxxxx");
        let _ = shown.set_password(None);
    }
    if url.query().is_some() {
        let mut keys: Vec<_> = url.query_pairs().map(|(key, _)| key.into_owned()).collect();
        keys.sort();
        let query = keys.iter().map(|key| format!("{key}=redacted")).collect::<Vec<_>>().join("&");
        shown.set_query(if query.is_empty() { None } else { Some(&query) });
    }
    shown.to_string()
}

/// Scheme, host and port are equal: what credentials for one may be shown to the other.
pub fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Whether `url` names this machine.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

/// Host and port of `url`, without anything that could be secret.
pub fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> String {
        redact(&Url::parse(text).unwrap())
    }

    #[test]
    fn no_query_value_and_no_password_survives() {
        assert_eq!(
            redacted("https://u:p@h/v2/a?X-Sig=s3cr3t&A=1&X-Sig=2#f"),
            "https://xxxxx@h/v2/a?A=redacted&X-Sig=redacted&X-Sig=redacted"
        );
        assert_eq!(redacted("https://h/v2/a?just-a-value"), "https://h/v2/a?just-a-value=redacted");
        assert_eq!(redacted("http://h:5000/v2/a"), "http://h:5000/v2/a");
    }

    #[test]
    fn the_default_port_is_the_same_place() {
        let url = |t| Url::parse(t).unwrap();
        assert!(same_origin(&url("https://h/a"), &url("https://h:443/b")));
        assert!(!same_origin(&url("https://h/a"), &url("http://h/a")));
        assert!(!same_origin(&url("https://h/a"), &url("https://h.evil/a")));
    }
}
