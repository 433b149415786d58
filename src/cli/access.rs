//! The way to registries, as the command line says it: plain HTTP, logins, and patience for somebody who waits for the result.

use super::args::{Access, Global};
use crate::{
    keychain::{Credential, DockerConfig, Keychain, Lookup, Query, Secret, Source},
    oci::Reference,
    registry::{
        HostSettings, HttpSettings, Kind, Limit, Mirror, Observer, Outcome, Registry, RegistryError, Security, TlsFlags,
    },
};
use std::{collections::HashMap, sync::Arc, time::Duration};

/// From a request to the headers of its answer: a registry answers the last piece of a layer when it has stored it.
const ANSWER: Duration = Duration::from_secs(120);
/// Without a byte of a body for this long, the body has failed.
const IDLE: Duration = Duration::from_secs(30);

/// The login that `--user` gives, for the host of one image.
struct Given {
    host: String,
    user: String,
    password: Secret,
}

impl Given {
    /// `user[:password]`; a leading colon does not end an empty name.
    fn new(host: &str, text: &str) -> Given {
        let colon = text.char_indices().skip(1).find(|(_, c)| *c == ':').map(|(at, _)| at);
        let (user, password) = colon.map_or((text, ""), |at| (&text[..at], &text[at + 1..]));
        Given { host: host.to_owned(), user: user.to_owned(), password: Secret::new(password) }
    }
}

impl Source for Given {
    fn name(&self) -> &str {
        "--user"
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        let found = (query.reference.host == self.host)
            .then(|| Credential::Password { user: self.user.clone(), password: self.password.clone() });
        Box::pin(async move { Ok(found.into_iter().collect()) })
    }
}

/// What `--debug` prints: which host was asked for what and how it ended. Never an address: signed ones are capabilities.
struct Trace;

impl Observer for Trace {
    fn request(&self, kind: Kind, host: &str, took: Duration, outcome: Outcome) {
        let ended = match outcome {
            Outcome::Answered(status) => status.to_string(),
            Outcome::Failed => "no answer".to_owned(),
        };
        super::say(&format!("http {kind:?} {host}: {ended} in {} ms", took.as_millis()));
    }
}

/// Quiet when nobody asked.
struct Silent;

impl Observer for Silent {
    fn request(&self, _: Kind, _: &str, _: Duration, _: Outcome) {}
}

/// Why there is no way.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("--tlskey is of no use without --tlscert")]
    KeyAlone,
}

/// The way to the registries of `images`. What the flags say about TLS is about all of them, and that there is TLS at all, also on the
/// loopback, about the last; so is the login.
pub fn registry(access: &Access, images: &[&Reference], global: &Global) -> Result<Registry, AccessError> {
    let http = HttpSettings {
        header_timeout: Limit::After(ANSWER),
        blob_timeout: Limit::Unlimited,
        idle_timeout: IDLE,
        ..HttpSettings::default()
    };
    let mut hosts = HostSettings::default();
    if access.plain_http {
        let plain = |image: &&Reference| {
            let mirror = Mirror { host: image.host.clone(), security: Security::PlainHttp, ..Mirror::default() };
            (image.host.clone(), vec![mirror])
        };
        hosts.mirrors = images.iter().map(plain).collect::<HashMap<_, _>>();
    }
    if !access.plain_http {
        hosts.every_host = tls_flags(access, images.last().map(|image| image.host.as_str()))?;
    }
    hosts.directories = access.hosts_dir.iter().filter(|dir| !dir.as_os_str().is_empty()).cloned().collect();
    let mut sources: Vec<Arc<dyn Source>> = Vec::new();
    if let (Some(user), Some(image)) = (access.user.as_deref().filter(|u| !u.is_empty()), images.last()) {
        sources.push(Arc::new(Given::new(&image.host, user)));
    }
    for file in DockerConfig::of_environment().into_iter().chain(DockerConfig::podman_of_environment()) {
        sources.push(Arc::new(file));
    }
    let observer: Arc<dyn Observer> = if global.debug { Arc::new(Trace) } else { Arc::new(Silent) };
    for name in crate::registry::unusable_proxies() {
        super::say(&format!("warning: {name} is not the URL of a proxy (http, https or socks5); going on without it"));
    }
    Ok(Registry::observed(http, hosts, Arc::new(Keychain::new(sources)), observer)?)
}

fn tls_flags(access: &Access, host: Option<&str>) -> Result<TlsFlags, AccessError> {
    let identity = match (&access.tlscert, &access.tlskey) {
        (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
        (Some(both), None) => Some((both.clone(), both.clone())),
        (None, None) => None,
        (None, Some(_)) => return Err(AccessError::KeyAlone),
    };
    let authorities: Vec<_> = access.tlscacert.iter().cloned().collect();
    let said = access.skip_verify || !authorities.is_empty() || identity.is_some();
    let host = host.filter(|_| said).map(str::to_owned);
    Ok(TlsFlags { skip_verify: access.skip_verify, authorities, identity, host })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_split_at_its_first_colon_but_not_at_a_leading_one() {
        for (text, user, password) in
            [("me:a:b", "me", "a:b"), ("me", "me", ""), (":token", ":token", ""), (":a:b", ":a", "b")]
        {
            let given = Given::new("h", text);
            assert_eq!((given.user.as_str(), given.password.expose()), (user, password), "{text}");
        }
    }
}
