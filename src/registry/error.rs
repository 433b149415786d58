//! What can go wrong between us and a registry, by what the caller can do about it.

use crate::oci::Digest;
use std::{fmt, time::Duration};

/// What was asked, as it may be shown: `GET "https://host/v2/…"`, redacted.
#[derive(Clone, PartialEq, Eq)]
pub struct Request(Box<str>);

impl Request {
    pub(super) fn new(method: &str, url: &::url::Url) -> Request {
        Request(format!("{method} {:?}", super::url::redact(url)).into())
    }

    /// A request that was answered from another host, after a redirect.
    pub(super) fn redirected(&self, to: &::url::Url) -> Request {
        Request(format!("{} (redirected to {})", self.0, super::url::authority(to)).into())
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a registry did not give what it was asked for. No text here holds a query value or a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No host could be reached, or each answered that it cannot serve now. Trying again is sensible.
    #[error("{request}: giving up request after {attempts} attempt(s): {what}")]
    Unavailable { request: Request, attempts: u32, what: String, retry_after: Duration },
    /// 401 or 403, also after whatever credentials we have were shown.
    #[error("{request}: access denied: {what}")]
    Unauthorized { request: Request, what: String },
    #[error("{request}: not found")]
    NotFound { request: Request },
    /// The bytes are not those that were asked for, from every host that was tried.
    #[error("{request}: the content has digest {actual}, not {expected}")]
    DigestMismatch { request: Request, expected: Digest, actual: Digest },
    #[error("{request}: the content is larger than {limit} bytes")]
    TooLarge { request: Request, limit: u64 },
    /// The registry sends whole blobs only, and the range does not start at 0.
    #[error("{request}: the registry does not support range requests")]
    RangesUnsupported { request: Request },
    /// Any other status that says no.
    #[error("{request}: the registry answered {status}{what}")]
    Refused { request: Request, status: u16, what: String },
    /// The answer makes no sense.
    #[error("{request}: {what}")]
    Malformed { request: Request, what: String },
    /// TLS could not establish whom we talk to.
    #[error("{request}: {what}")]
    Untrusted { request: Request, what: String },
    /// What is configured for this registry, or this machine, does not let us ask anybody.
    #[error("cannot ask any registry: {what}")]
    Setup { what: String },
}

/// What a caller can do about a [`RegistryError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Ask again, not sooner than this.
    Retry(Duration),
    /// Credentials are missing or wrong.
    Unauthorized,
    NotFound,
    /// The content was not what its digest says.
    Mismatch,
    /// Read the blob from its start instead.
    RangesUnsupported,
    /// Asking again gives the same answer.
    Permanent,
}

impl RegistryError {
    pub fn class(&self) -> Class {
        match self {
            RegistryError::Unavailable { retry_after, .. } => Class::Retry(*retry_after),
            RegistryError::Unauthorized { .. } => Class::Unauthorized,
            RegistryError::NotFound { .. } => Class::NotFound,
            RegistryError::DigestMismatch { .. } => Class::Mismatch,
            RegistryError::RangesUnsupported { .. } => Class::RangesUnsupported,
            RegistryError::TooLarge { .. }
            | RegistryError::Refused { .. }
            | RegistryError::Malformed { .. }
            | RegistryError::Untrusted { .. }
            | RegistryError::Setup { .. } => Class::Permanent,
        }
    }

    /// The same error, after `n` attempts.
    pub(super) fn after_attempts(mut self, n: u32) -> RegistryError {
        if let RegistryError::Unavailable { attempts, .. } = &mut self {
            *attempts = n;
        }
        self
    }
}

/// Why one host failed one attempt, and what follows for the next.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub error: RegistryError,
    pub advice: Advice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// The host has trouble; it may have named a delay.
    Later(Option<Duration>),
    /// The host sent wrong content.
    Corrupt,
    /// The host said no. Another may say yes.
    Elsewhere,
}

impl Failure {
    pub fn later(request: &Request, what: impl Into<String>, after: Option<Duration>) -> Failure {
        let error = RegistryError::Unavailable {
            request: request.clone(),
            attempts: 1,
            what: what.into(),
            retry_after: after.unwrap_or_default(),
        };
        Failure { error, advice: Advice::Later(after) }
    }

    pub fn corrupt(error: RegistryError) -> Failure {
        Failure { error, advice: Advice::Corrupt }
    }

    pub fn malformed(request: &Request, what: impl Into<String>) -> Failure {
        Failure::corrupt(RegistryError::Malformed { request: request.clone(), what: what.into() })
    }

    pub fn elsewhere(error: RegistryError) -> Failure {
        Failure { error, advice: Advice::Elsewhere }
    }
}
