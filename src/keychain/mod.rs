//! Who we are at a registry: sources of logins, and in which order they are asked.
//!
//! The order, which is also that of the list the daemon makes: docker's configuration with its helpers, podman's, kubelet's credential
//! providers, what kubelet sent with pulls (CRI), the cluster's secrets; and at last nobody, that is anonymously. A login that a
//! registry refuses is followed by the next one, of the same source or the next, each once.
//!
//! Invariants: a [`Secret`] never shows in `Debug`, has no `Display`, is wiped when it is dropped, and no log line or error of this
//! module holds one. A source that fails is named in the log and passed over: an image that needs no login must not suffer from it.
//!
//! Absent on purpose: remembering. Whoever uses logins remembers what they were exchanged for (`registry::auth`), and looks here again
//! when that stops working, which is how renewed logins are noticed.
#![forbid(unsafe_code)]

mod cri;
mod docker;
mod files;
mod helper;
mod kube;
mod kubelet;
mod program;

pub use cri::{CriAuth, CriLogins};
pub use docker::DockerConfig;
pub use kube::KubeSecrets;
pub use kubelet::KubeletProviders;
pub use program::ProgramError;

use crate::{oci::Reference, telemetry::catalog::say};
use std::{fmt, future::Future, pin::Pin, sync::Arc};
use zeroize::Zeroize;

/// What docker.io is called in docker's configuration and by login helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Text that is not shown, and wiped when it is dropped.
#[derive(Clone, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(Box<str>);

impl Secret {
    pub fn new(text: impl Into<Box<str>>) -> Secret {
        Secret(text.into())
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The text itself, for whoever sends it where it belongs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl serde::Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.expose())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
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
    /// What is shown to the registry itself, as it is.
    Registry(Secret),
}

/// Whose logins are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// The registry or mirror, with its port if that is not the usual one.
    pub host: &'a str,
    /// The image they are for; sources that were given logins with a pull know them by this.
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

    /// `host/repository`, as kubelet and podman write it.
    fn image(&self) -> String {
        let host = match self.host {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            host => host,
        };
        format!("{host}/{}", self.reference.repository)
    }
}

/// A boxed answer, so that sources can be kept in one list.
pub type Lookup<'a> = Pin<Box<dyn Future<Output = Result<Vec<Credential>, SourceError>> + Send + 'a>>;

/// One place where logins may be found.
pub trait Source: Send + Sync {
    /// For logs and errors.
    fn name(&self) -> &str;
    /// What this source knows, the likeliest first; nothing if it knows nothing about the host.
    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a>;
    /// A registry has refused what this source knows. Whether asking once more may give something else: a source that remembers answers
    /// forgets this one.
    fn refused(&self, _query: &Query<'_>) -> bool {
        false
    }
}

/// Why a source could not be asked. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path} cannot be read")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{path} is not a {kind}: {what}")]
    Malformed { path: String, kind: &'static str, what: String },
    #[error("login helper {name:?} failed")]
    Helper { name: String, source: ProgramError },
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

    pub fn sources(&self) -> &[Arc<dyn Source>] {
        &self.sources
    }

    /// What `source` knows. That it fails is logged, and returned in words.
    pub async fn ask(&self, source: &dyn Source, query: &Query<'_>) -> Result<Vec<Credential>, String> {
        source.lookup(query).await.map_err(|error| {
            let error = chain(&error);
            say!(LoginUnavailable, source = source.name(), host = query.host, error, "cannot look up a registry login");
            error
        })
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

/// A YAML document (JSON is one, too). The error is where it is wrong, not what: that could quote it.
fn yaml<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(text).map_err(|_| ": it is not UTF-8".to_owned())?;
    serde_saphyr::from_str(text).map_err(|error| match error.location() {
        Some(at) => format!(" (line {}, column {})", at.line(), at.column()),
        None => String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_show() {
        let shown = format!("{:?}", Credential::Password { user: "u".into(), password: Secret::new("hunter2") });
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn yaml_says_where_it_is_wrong_and_not_what() {
        let error = yaml::<Vec<u32>>(b"- 1\n- hunter2\n").unwrap_err();
        assert!(error.contains("line 2") && !error.contains("hunter2"), "{error}");
        assert_eq!(yaml::<Vec<u32>>(b"[1, 2]").unwrap(), [1, 2]);
    }
}
