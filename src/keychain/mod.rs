//! Who we are at a registry: sources of credentials, asked in order until one knows.
//!
//! Invariants: a [`Secret`] never shows in `Debug`, has no `Display`, and no log line or error of this module holds one.
//! A source that fails is named in the log and passed over: an image that needs no credentials must not suffer from it.
//!
//! Absent on purpose: remembering. Whoever uses credentials remembers what they were exchanged for (`registry::auth`), and
//! looks here again when that stops working, which is how renewed credentials are noticed.
#![forbid(unsafe_code)]

mod docker;
mod helper;

pub use docker::DockerConfig;
pub use helper::HelperError;

use crate::oci::Reference;
use crate::telemetry::catalog::say;
use std::{fmt, future::Future, pin::Pin, sync::Arc};

/// What docker.io is called in docker's configuration and by login helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<str>);

impl Secret {
    pub fn new(text: impl Into<Box<str>>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for whoever sends it where it belongs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// What proves who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    Password {
        user: String,
        password: Secret,
    },
    /// An OAuth 2 refresh token.
    Identity(Secret),
}

/// Whose credentials are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// The registry or mirror, with its port if that is not the usual one.
    pub host: &'a str,
    /// The image they are for; sources that were given credentials with a pull know them by this.
    pub reference: &'a Reference,
}

impl Query<'_> {
    /// The host as docker's configuration and login helpers know it.
    fn server(&self) -> &str {
        match self.host {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
            host => host,
        }
    }
}

/// A boxed answer, so that sources can be kept in one list.
pub type Lookup<'a> = Pin<Box<dyn Future<Output = Result<Option<Credential>, SourceError>> + Send + 'a>>;

/// One place where credentials may be found.
pub trait Source: Send + Sync {
    /// For logs.
    fn name(&self) -> &'static str;
    /// What this source knows; None if it knows nothing about the host.
    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a>;
}

/// Why a source could not be asked. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path} cannot be read")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{path} is not a docker configuration: {what}")]
    Malformed { path: String, what: &'static str },
    #[error("login helper {name:?} failed")]
    Helper { name: String, source: HelperError },
    /// Of a source of another module.
    #[error("{0}")]
    Other(String),
}

/// All sources, in order.
#[derive(Clone, Default)]
pub struct Keychain {
    sources: Vec<Arc<dyn Source>>,
}

impl Keychain {
    pub fn new(sources: Vec<Arc<dyn Source>>) -> Keychain {
        Keychain { sources }
    }

    /// The first that is found. A failing source is logged and passed over.
    pub async fn lookup(&self, query: &Query<'_>) -> Option<Credential> {
        for source in &self.sources {
            match source.lookup(query).await {
                Ok(Some(found)) => return Some(found),
                Ok(None) => {}
                Err(error) => say!(
                    LoginUnavailable,
                    source = source.name(),
                    host = query.host,
                    error = %chain(&error),
                    "cannot look up a registry login"
                ),
            }
        }
        None
    }
}

impl fmt::Debug for Keychain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sources.iter().map(|s| s.name())).finish()
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Option<Credential>);
    struct Broken;

    impl Source for Fixed {
        fn name(&self) -> &'static str {
            "fixed"
        }
        fn lookup<'a>(&'a self, _: &'a Query<'a>) -> Lookup<'a> {
            Box::pin(async { Ok(self.0.clone()) })
        }
    }

    impl Source for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        fn lookup<'a>(&'a self, _: &'a Query<'a>) -> Lookup<'a> {
            Box::pin(async { Err(SourceError::Other("no".into())) })
        }
    }

    #[tokio::test]
    async fn sources_are_asked_in_order_and_a_broken_one_is_passed_over() {
        let reference = "h/r".parse().unwrap();
        let query = Query { host: "h", reference: &reference };
        let found = Credential::Identity(Secret::new("x"));
        let keychain =
            Keychain::new(vec![Arc::new(Broken), Arc::new(Fixed(None)), Arc::new(Fixed(Some(found.clone())))]);
        assert_eq!(keychain.lookup(&query).await, Some(found));
        assert_eq!(Keychain::default().lookup(&query).await, None);
    }

    #[test]
    fn a_secret_does_not_show() {
        let shown = format!("{:?}", Credential::Password { user: "u".into(), password: Secret::new("hunter2") });
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
