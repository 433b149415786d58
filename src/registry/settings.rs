//! How registries are talked to. Values here are resolved: the zero and negative rules of the configuration file are
//! applied where it is read.

use super::{RetrySettings, endpoint::TRIAL_MAX};
use std::{collections::HashMap, path::PathBuf, time::Duration};

/// A time limit that may be absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Unlimited,
    After(Duration),
}

impl Limit {
    pub(super) fn duration(self) -> Option<Duration> {
        match self {
            Limit::Unlimited => None,
            Limit::After(duration) => Some(duration),
        }
    }
}

/// `[http]` and the request part of `[blob]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    /// To look up a name, connect, and agree on TLS.
    pub dial_timeout: Duration,
    /// From a request to the headers of its answer.
    pub header_timeout: Limit,
    /// One attempt of a request other than for blob data, with its body.
    pub request_timeout: Limit,
    pub retry: RetrySettings,
    /// One attempt of a request for blob data, with its body. Time in which the caller does not ask for more is not counted.
    pub blob_timeout: Limit,
    pub blob_retry: RetrySettings,
    /// Without a byte of a body for this long, the body has failed.
    pub idle_timeout: Duration,
    /// Connections kept open per host while nothing is asked.
    pub idle_connections: usize,
    /// Largest manifest, image index, SOCI index or page of referrers.
    pub manifest_max: u64,
}

impl HttpSettings {
    /// How late it may be noticed that a sick host is well again: soon enough that whoever has the time of [`blob_timeout`] asks it a few
    /// times.
    ///
    /// [`blob_timeout`]: HttpSettings::blob_timeout
    pub(super) fn recovery(&self) -> Duration {
        match self.blob_timeout {
            Limit::Unlimited => TRIAL_MAX,
            Limit::After(time) => TRIAL_MAX.min(time / 4),
        }
    }
}

impl Default for HttpSettings {
    fn default() -> HttpSettings {
        HttpSettings {
            dial_timeout: Duration::from_secs(3),
            header_timeout: Limit::After(Duration::from_secs(3)),
            request_timeout: Limit::After(Duration::from_secs(300)),
            retry: RetrySettings::default(),
            blob_timeout: Limit::After(Duration::from_secs(300)),
            blob_retry: RetrySettings::default(),
            // Three header time-outs: far longer than a congested link pauses, far shorter than a reader's patience.
            idle_timeout: Duration::from_secs(10),
            // As many as the scheduler has ranges in flight for one host, twice over.
            idle_connections: 32,
            // What registries themselves accept (distribution specification, 4 MiB).
            manifest_max: 4 << 20,
        }
    }
}

/// What the time-out of one mirror is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MirrorTimeout {
    /// That of all requests.
    #[default]
    Inherit,
    /// Its own.
    Own(Limit),
}

/// Whether a mirror is asked over TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Security {
    /// TLS, except on loopback.
    #[default]
    Tls,
    /// TLS, also on loopback: somebody has configured certificates for it.
    TlsEverywhere,
    /// `insecure = true`: plain HTTP.
    PlainHttp,
}

/// One entry of `resolver.host."<image host>".mirrors`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mirror {
    /// URL with or without scheme, or a bare `host[:port]`. The path defaults to `/v2`.
    pub host: String,
    pub security: Security,
    pub timeout: MirrorTimeout,
}

/// Where containerd (2.2 by default, older ones by habit) and Docker keep what is said about single registries.
pub const DEFAULT_DIRECTORIES: [&str; 2] = ["/etc/containerd/certs.d", "/etc/docker/certs.d"];

/// `[resolver]` and `[registry]`: whom to ask for the images of a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostSettings {
    /// For each image host, the mirrors to ask before it.
    pub mirrors: HashMap<String, Vec<Mirror>>,
    /// Directories of hosts' directories with `hosts.toml` or certificates, in the order to look into them.
    pub directories: Vec<PathBuf>,
    /// Beside what those say about a host.
    pub every_host: TlsFlags,
}

/// What holds for the TLS of every host: flags of a command line, that know of no single one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsFlags {
    pub skip_verify: bool,
    /// Files with authorities to trust, beside those of the system.
    pub authorities: Vec<PathBuf>,
    /// Files with our certificate and its key; one file may have both. Shown to hosts that ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The image host that was thought of: it is asked over TLS also on the loopback.
    pub host: Option<String>,
}
