//! Which hosts may answer for an image: the mirrors of its registry in their order, then the registry itself.
//!
//! Who decides, for the images of one host, in this order: the host's own directory below one of `[registry] config_path`, if it has
//! a `hosts.toml`; `[resolver.host]`; the directory `_default`; nobody, and then the registry is asked over TLS. Docker's certificate
//! files in a host's directory apply wherever that host is asked. Directories are looked at again when a second has passed: what
//! changed in them is in force for the next request, and what cannot be understood leaves in force what was.
//!
//! How a host fares (`endpoint`) is known for all image hosts together. The last host of a list is never left alone: there is nobody
//! else to ask.

use super::{
    directory::{self, Certificates, DirectoryError, Stamp},
    endpoint::{Endpoint, Endpoints, Health, HostId},
    hosts_file::{Capabilities, Entry},
    settings::{HostSettings, Mirror, MirrorTimeout, Security},
    transport::{Dialing, Transport},
    url::{authority, is_loopback},
};
use crate::{
    telemetry::catalog::say,
    tls::{TlsError, Trust, Verification},
};
use ::url::Url;
use http::HeaderMap;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Image hosts remembered; each costs a few hundred bytes and there are few in any cluster.
const MAX_IMAGE_HOSTS: usize = 1024;
/// How long directories are believed to be as they were. A look costs some ten system calls.
const LOOK: Duration = Duration::from_secs(1);

/// Who has decided which hosts are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecidedBy {
    /// Nobody: the registry itself is asked.
    Default,
    /// `[resolver.host]` of the daemon's configuration.
    Resolver,
    /// This `hosts.toml`, or directory of certificates.
    Path(PathBuf),
}

/// A list, and what it was made of.
#[derive(Debug, Clone)]
struct List {
    endpoints: Endpoints,
    decided: DecidedBy,
    unknown_keys: Vec<String>,
}

#[derive(Debug)]
struct Remembered {
    list: Result<List, HostsError>,
    looked: Instant,
    /// Of the latest look, also if what it found cannot be understood.
    stamp: Stamp,
}

/// All hosts in use. Lists are made when first asked for.
#[derive(Debug)]
pub(super) struct Hosts {
    settings: HostSettings,
    transport: Arc<Transport>,
    /// Held while files are read, which are small and local.
    lists: Mutex<HashMap<String, Remembered>>,
    health: Mutex<HashMap<String, Arc<Health>>>,
    recovery: Duration,
}

/// Why nobody can be asked for the images of a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HostsError {
    #[error("{text:?} is not a host or URL")]
    Invalid { text: String },
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{0}")]
    Client(String),
}

/// What is in force for the images of one host, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// As in image references; `_default` for those that nothing else is said about.
    pub image_host: String,
    pub decided: DecidedBy,
    /// Base URLs in the order they are asked, each with what it may be asked for.
    pub hosts: Vec<String>,
    /// What is configured for this host and not in force.
    pub unused: Option<String>,
    /// Keys of `hosts.toml` that mean nothing, with their place.
    pub unknown_keys: Vec<String>,
    /// Why images of this host cannot be had.
    pub problem: Option<String>,
}

impl Hosts {
    /// That a sick host is well again is to be noticed within `recovery`.
    pub fn new(settings: HostSettings, transport: Arc<Transport>, recovery: Duration) -> Hosts {
        Hosts { settings, transport, recovery, lists: Mutex::default(), health: Mutex::default() }
    }

    /// Hosts for images of `image_host`, as they are configured now. A mirror of `[resolver.host]` that cannot be understood is named
    /// in the log and left out.
    pub fn of(&self, image_host: &str) -> Result<Endpoints, HostsError> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lists.get_mut(image_host) {
            let now = Instant::now();
            if self.settings.directories.is_empty() || now.duration_since(known.looked) < LOOK {
                return known.list.clone().map(|list| list.endpoints);
            }
            known.looked = now;
            if known.stamp.is_current() {
                return known.list.clone().map(|list| list.endpoints);
            }
        }
        let mut stamp = Stamp::default();
        let made = self.list(image_host, &mut stamp);
        let list = match (made, lists.get(image_host).map(|known| &known.list)) {
            (Err(error), Some(Ok(before))) => {
                say!(HostsBroken, image_host, %error, "the configuration of this registry has changed and cannot be used; going on with the one before");
                Ok(before.clone())
            }
            (made, before) => {
                if let Ok(list) = &made {
                    list.say(image_host, before.is_some());
                }
                made
            }
        };
        if lists.len() >= MAX_IMAGE_HOSTS {
            lists.clear();
        }
        let endpoints = list.clone().map(|list| list.endpoints);
        lists.insert(image_host.to_owned(), Remembered { list, looked: Instant::now(), stamp });
        endpoints
    }

    fn list(&self, image_host: &str, stamp: &mut Stamp) -> Result<List, HostsError> {
        let mirrors = self.settings.mirrors.get(image_host).map(Vec::as_slice).unwrap_or_default();
        let found = directory::find(&self.settings, image_host, stamp);
        if let Some(found) = &found
            && (!found.is_default || mirrors.is_empty())
        {
            let read = directory::read(&found.path, stamp)?;
            if let Some(file) = read.file {
                let path = found.path.join(directory::HOSTS_TOML);
                let endpoints = self.of_file(image_host, &file.entries, &path, stamp)?;
                return Ok(List { endpoints, decided: DecidedBy::Path(path), unknown_keys: file.unknown });
            }
            if mirrors.is_empty() {
                let decided = match read.certificates == Certificates::default() {
                    true => DecidedBy::Default,
                    false => DecidedBy::Path(found.path.clone()),
                };
                let endpoint = self.origin(image_host, read.certificates)?;
                let endpoints = [Arc::new(endpoint)].into();
                return Ok(List { endpoints, decided, unknown_keys: Vec::new() });
            }
        }
        let decided = if mirrors.is_empty() { DecidedBy::Default } else { DecidedBy::Resolver };
        let endpoints = self.of_resolver(image_host, mirrors, stamp)?;
        Ok(List { endpoints, decided, unknown_keys: Vec::new() })
    }

    fn of_resolver(&self, image_host: &str, mirrors: &[Mirror], stamp: &mut Stamp) -> Result<Endpoints, HostsError> {
        let origin = origin(image_host, Security::Tls)?;
        let mut out: Vec<Arc<Endpoint>> = Vec::new();
        let mut origin_is_mirror = false;
        for mirror in mirrors {
            let base = match mirror_base(mirror) {
                Ok(base) => base,
                Err(error) => {
                    say!(MirrorIgnored, error = %error, image_host, "ignoring a mirror");
                    continue;
                }
            };
            // An entry for the registry itself says how to talk to it; it is then not asked a second time in another way.
            let same = authority(&base) == authority(&origin);
            origin_is_mirror |= same;
            let capabilities = if same { Capabilities::ALL } else { Capabilities::READ };
            let mut how = How::plain((!same).then_some(image_host), capabilities);
            how.timeout = mirror.timeout;
            how.certificates = self.own_certificates(&authority(&base), stamp)?;
            out.push(Arc::new(self.endpoint(base, how)?));
        }
        if !origin_is_mirror {
            let certificates = self.own_certificates(image_host, stamp)?;
            out.push(Arc::new(self.origin(image_host, certificates)?));
        }
        Ok(out.into())
    }

    /// Docker's certificate files for a host that is asked because of something else.
    fn own_certificates(&self, host: &str, stamp: &mut Stamp) -> Result<Certificates, HostsError> {
        match directory::find(&self.settings, host, stamp) {
            Some(found) if !found.is_default => Ok(directory::read(&found.path, stamp)?.certificates),
            _ => Ok(Certificates::default()),
        }
    }

    /// The registry itself, asked as the certificates that are there for it suggest.
    fn origin(&self, image_host: &str, certificates: Certificates) -> Result<Endpoint, HostsError> {
        let security = if self.about_tls(image_host, &certificates) { Security::TlsEverywhere } else { Security::Tls };
        let how = How { certificates, ..How::plain(None, Capabilities::ALL) };
        self.endpoint(origin(image_host, security)?, how)
    }

    /// Whether somebody speaks of TLS where this registry is concerned: then it is used on the loopback, too.
    fn about_tls(&self, image_host: &str, certificates: &Certificates) -> bool {
        *certificates != Certificates::default() || self.settings.every_host.host.as_deref() == Some(image_host)
    }

    fn of_file(
        &self,
        image_host: &str,
        entries: &[Entry],
        path: &Path,
        stamp: &mut Stamp,
    ) -> Result<Endpoints, HostsError> {
        let plain = origin(image_host, Security::Tls)?;
        let mut out: Vec<Arc<Endpoint>> = Vec::new();
        for entry in entries {
            let certificates = directory::certificates(entry, stamp)?;
            let about_tls = entry.skip_verify || self.about_tls(image_host, &certificates);
            let base = match &entry.base {
                Some(base) => base.clone(),
                None if about_tls => origin(image_host, Security::TlsEverywhere)?,
                // Somebody has written down how the registry is asked: not also in another way.
                None if out
                    .iter()
                    .any(|e| e.login_host == authority(&plain) && e.capabilities == Capabilities::ALL) =>
                {
                    continue;
                }
                None => plain.clone(),
            };
            let same = authority(&base) == authority(&plain);
            let how = How {
                namespace: (!same).then_some(image_host),
                timeout: MirrorTimeout::Inherit,
                capabilities: entry.capabilities,
                headers: entry.headers.iter().cloned().collect(),
                certificates,
                skip_verify: entry.skip_verify,
                dial_timeout: entry.dial_timeout,
                file: Some(path),
            };
            let endpoint = self.endpoint(base, how)?;
            // The registry itself may be named among the hosts: then it has been asked when its turn comes.
            let covers = |e: &Arc<Endpoint>| {
                let (has, wants) = (e.capabilities, endpoint.capabilities);
                e.id == endpoint.id
                    && (has.pull || !wants.pull)
                    && (has.resolve || !wants.resolve)
                    && (has.push || !wants.push)
            };
            if !out.iter().any(covers) {
                out.push(Arc::new(endpoint));
            }
        }
        Ok(out.into())
    }

    fn endpoint(&self, base: Url, how: How<'_>) -> Result<Endpoint, HostsError> {
        let text = base.as_str().trim_end_matches('/').to_owned();
        let host = authority(&base);
        let trust_here = match (how.file, self.settings.directories.first()) {
            (Some(file), _) => format!("name it as ca of this host in {}", file.display()),
            (None, Some(root)) => format!("save it as {}", root.join(&host).join("ca.crt").display()),
            (None, None) => {
                format!(
                    "set [registry] config_path to \"/etc/containerd/certs.d\" and save it as /etc/containerd/certs.d/{host}/ca.crt"
                )
            }
        };
        let every = directory::named(&self.settings.every_host)?;
        let trust = Trust {
            authorities: how.certificates.authorities.into_iter().chain(every.authorities).collect(),
            identities: how.certificates.identities.into_iter().chain(every.identities).collect(),
            verification: match how.skip_verify || self.settings.every_host.skip_verify {
                true => Verification::Skipped,
                false => Verification::Required,
            },
            ..Trust::default()
        };
        let clients = self.transport.clients(&Dialing { trust, timeout: how.dial_timeout })?;
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        if health.len() >= MAX_IMAGE_HOSTS {
            health.retain(|_, health| Arc::strong_count(health) > 1);
        }
        let unknown = || Arc::new(Health::unknown(self.recovery));
        let health = health.entry(base.origin().ascii_serialization()).or_insert_with(unknown).clone();
        Ok(Endpoint {
            id: HostId::new(&text),
            base: text,
            is_tls: base.scheme() == "https",
            login_host: host,
            namespace: how.namespace.map(str::to_owned),
            timeout: how.timeout,
            capabilities: how.capabilities,
            headers: how.headers,
            clients,
            trust_here,
            health,
        })
    }

    /// What is in force for every host that something is configured for, and `_default`.
    pub fn report(&self) -> Vec<HostReport> {
        let mut names: Vec<String> = self.settings.mirrors.keys().cloned().collect();
        for root in &self.settings.directories {
            let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
            let named = entries.filter(|e| e.path().is_dir()).filter_map(|e| e.file_name().into_string().ok());
            names.extend(named.take(MAX_IMAGE_HOSTS).filter_map(|name| directory::host_of(&name)));
        }
        names.sort();
        names.dedup();
        let mut out: Vec<_> = names.iter().map(|name| self.report_of(name, name)).collect();
        if self.settings.directories.iter().any(|directory| directory.is_dir()) {
            // No registry has this name: what is in force for it is in force for all that nothing is said about.
            out.push(self.report_of("_default", "host.invalid"));
        }
        out
    }

    fn report_of(&self, shown: &str, image_host: &str) -> HostReport {
        let made = self.list(image_host, &mut Stamp::default());
        let has_mirrors = self.settings.mirrors.contains_key(image_host);
        let mut report = HostReport {
            image_host: shown.to_owned(),
            decided: DecidedBy::Default,
            hosts: Vec::new(),
            unused: None,
            unknown_keys: Vec::new(),
            problem: None,
        };
        match made {
            Ok(list) => {
                let host = |e: &Arc<Endpoint>| format!("{} ({})", e.id, e.capabilities);
                report.hosts = list.endpoints.iter().map(host).collect();
                report.unused = match &list.decided {
                    DecidedBy::Path(_) if has_mirrors => Some(format!("[resolver.host.\"{image_host}\"]")),
                    DecidedBy::Resolver => directory::find(&self.settings, image_host, &mut Stamp::default())
                        .map(|found| found.path.join(directory::HOSTS_TOML))
                        .filter(|path| path.exists())
                        .map(|path| path.display().to_string()),
                    _ => None,
                };
                report.decided = list.decided;
                report.unknown_keys = list.unknown_keys;
            }
            Err(error) => report.problem = Some(error.to_string()),
        }
        report
    }
}

/// How to talk to a host.
struct How<'a> {
    namespace: Option<&'a str>,
    timeout: MirrorTimeout,
    capabilities: Capabilities,
    headers: HeaderMap,
    certificates: Certificates,
    skip_verify: bool,
    dial_timeout: Option<Duration>,
    /// The `hosts.toml` that says so.
    file: Option<&'a Path>,
}

impl<'a> How<'a> {
    fn plain(namespace: Option<&'a str>, capabilities: Capabilities) -> How<'a> {
        How {
            namespace,
            timeout: MirrorTimeout::Inherit,
            capabilities,
            headers: HeaderMap::new(),
            certificates: Certificates::default(),
            skip_verify: false,
            dial_timeout: None,
            file: None,
        }
    }
}

impl List {
    /// Tells the log who decides, where somebody does.
    fn say(&self, image_host: &str, again: bool) {
        let DecidedBy::Path(path) = &self.decided else { return };
        let (path, hosts) = (path.display().to_string(), self.endpoints.len().to_string());
        match again {
            true => tracing::info!(
                image_host,
                path,
                hosts,
                "the configuration of this registry has changed and is in force"
            ),
            false => tracing::debug!(image_host, path, hosts, "this registry is configured here"),
        }
        for key in &self.unknown_keys {
            say!(ConfigDoubtful, "{path}:{key}: unknown key, ignored");
        }
    }
}

/// The registry itself: https, plain HTTP on loopback. No mirror's settings have a say in it.
fn origin(image_host: &str, security: Security) -> Result<Url, HostsError> {
    let host = match image_host {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        host => host,
    };
    base(host, "/v2", security)
}

fn mirror_base(mirror: &Mirror) -> Result<Url, HostsError> {
    let invalid = || HostsError::Invalid { text: mirror.host.chars().take(300).collect() };
    let rest = match mirror.host.split_once("://") {
        Some((_, rest)) => rest,
        None => &mirror.host,
    };
    let (host, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    if host.is_empty() || host.contains('@') || path.contains(['?', '#']) {
        return Err(invalid());
    }
    let path = match path.trim_end_matches('/') {
        "" => "/v2",
        path => path,
    };
    base(host, path, mirror.security)
}

fn base(host: &str, path: &str, security: Security) -> Result<Url, HostsError> {
    let invalid = || HostsError::Invalid { text: host.chars().take(300).collect() };
    let tls = Url::parse(&format!("https://{host}{path}")).map_err(|_| invalid())?;
    if tls.host_str().is_none_or(str::is_empty) {
        return Err(invalid());
    }
    match security {
        Security::TlsEverywhere => Ok(tls),
        Security::Tls if !is_loopback(&tls) => Ok(tls),
        // Parsed anew, because the default port differs.
        Security::Tls | Security::PlainHttp => Url::parse(&format!("http://{host}{path}")).map_err(|_| invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{HttpSettings, endpoint::Standing, transport::Unobserved};

    fn hosts(settings: HostSettings) -> Hosts {
        let transport = Transport::new(&HttpSettings::default(), Arc::new(Unobserved)).unwrap();
        Hosts::new(settings, Arc::new(transport), HttpSettings::default().recovery())
    }

    fn bases(image_host: &str, mirrors: &[(&str, Security)]) -> Vec<String> {
        let mirrors: Vec<Mirror> = mirrors
            .iter()
            .map(|(host, security)| Mirror { host: (*host).into(), security: *security, ..Mirror::default() })
            .collect();
        let settings =
            HostSettings { mirrors: HashMap::from([(image_host.to_owned(), mirrors)]), ..HostSettings::default() };
        hosts(settings).of(image_host).unwrap().iter().map(|e| e.url("r", "x").unwrap().to_string()).collect()
    }

    #[test]
    fn mirrors_come_first_and_may_be_bare_hosts() {
        use Security::*;
        assert_eq!(
            bases(
                "docker.io",
                &[
                    ("https://m.example", Tls),
                    ("m.example:5000", Tls),
                    ("http://m.example/proxy/hub/", Tls),
                    ("10.0.0.1:5000", PlainHttp),
                    ("127.0.0.1:5000", Tls),
                    ("", Tls),
                    ("a b", Tls),
                ]
            ),
            [
                "https://m.example/v2/r/x?ns=docker.io",
                "https://m.example:5000/v2/r/x?ns=docker.io",
                "https://m.example/proxy/hub/r/x?ns=docker.io",
                "http://10.0.0.1:5000/v2/r/x?ns=docker.io",
                "http://127.0.0.1:5000/v2/r/x?ns=docker.io",
                "https://registry-1.docker.io/v2/r/x",
            ]
        );
        assert_eq!(bases("localhost:5000", &[]), ["http://localhost:5000/v2/r/x"]);
        assert_eq!(bases("[::1]:5000", &[]), ["http://[::1]:5000/v2/r/x"]);
    }

    #[test]
    fn an_insecure_mirror_leaves_the_origin_secure_unless_it_is_the_origin() {
        use Security::*;
        assert_eq!(
            bases("r.example", &[("m.example", PlainHttp)]),
            ["http://m.example/v2/r/x?ns=r.example", "https://r.example/v2/r/x"]
        );
        assert_eq!(bases("r.example:5000", &[("http://r.example:5000", PlainHttp)]), ["http://r.example:5000/v2/r/x"]);
    }

    /// The base URLs for `image_host`, and who says so.
    fn decided(hosts: &Hosts, image_host: &str) -> (Vec<String>, DecidedBy) {
        let list = hosts.list(image_host, &mut Stamp::default()).unwrap();
        (list.endpoints.iter().map(|e| e.id.to_string()).collect(), list.decided)
    }

    #[test]
    fn the_specific_host_wins_and_the_report_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let write = |host: &str, text: &str| {
            let path = dir.path().join(host);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("hosts.toml"), text).unwrap();
            path.join("hosts.toml")
        };
        let fallback = write("_default", "[host.\"https://d.example\"]\n");
        let both = write("both.example", "[host.\"http://f.example\"]\ncapabilities = [\"pull\"]\nnonsense = 1\n");
        write("broken.example_5000_", "server = 7");
        let mirror = |host: &str| vec![Mirror { host: host.into(), ..Mirror::default() }];
        let settings = HostSettings {
            mirrors: HashMap::from([
                ("both.example".to_owned(), mirror("https://r.example")),
                ("only.example".to_owned(), mirror("https://r.example")),
            ]),
            directories: vec![dir.path().to_owned()],
            ..HostSettings::default()
        };
        let hosts = hosts(settings);
        let id = |base: &str| format!("{base}/v2");
        let (https_f, both_origin) = (id("http://f.example"), id("https://both.example"));
        assert_eq!(
            decided(&hosts, "both.example"),
            (vec![https_f.clone(), both_origin], DecidedBy::Path(both.clone()))
        );
        let expected = vec![id("https://r.example"), id("https://only.example")];
        assert_eq!(decided(&hosts, "only.example"), (expected, DecidedBy::Resolver));
        let expected = vec![id("https://d.example"), id("https://x.example")];
        assert_eq!(decided(&hosts, "x.example"), (expected, DecidedBy::Path(fallback.clone())));
        assert!(
            hosts.of("broken.example:5000").unwrap_err().to_string().contains("hosts.toml:1:10: expected a string")
        );

        let report = hosts.report();
        let of = |name: &str| report.iter().find(|r| r.image_host == name).unwrap().clone();
        assert_eq!(of("both.example").decided, DecidedBy::Path(both));
        assert_eq!(of("both.example").unused.as_deref(), Some("[resolver.host.\"both.example\"]"));
        assert_eq!(of("both.example").unknown_keys, ["3:1: nonsense"]);
        assert_eq!(of("both.example").hosts[0], format!("{https_f} (pull)"));
        assert_eq!(of("only.example").unused, Some(fallback.display().to_string()));
        assert_eq!(of("_default").decided, DecidedBy::Path(fallback));
        assert!(of("broken.example:5000").problem.is_some());
    }

    #[test]
    fn a_list_that_breaks_leaves_the_one_before_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("h.example").join("hosts.toml");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let settings = HostSettings { directories: vec![dir.path().to_owned()], ..HostSettings::default() };
        let hosts = hosts(settings);
        let first = || {
            // A look is due again.
            if let Some(known) = hosts.lists.lock().unwrap().get_mut("h.example") {
                known.looked -= LOOK;
            }
            hosts.of("h.example").unwrap()[0].id.to_string()
        };
        assert_eq!(first(), "https://h.example/v2");
        std::fs::write(&file, "[host.\"https://one.example\"]").unwrap();
        assert_eq!(first(), "https://one.example/v2");
        std::fs::write(&file, "[host.\"https://one.example").unwrap();
        assert_eq!(first(), "https://one.example/v2");
        std::fs::write(&file, "[host.\"https://three.example\"]").unwrap();
        assert_eq!(first(), "https://three.example/v2");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(first(), "https://h.example/v2");
    }

    #[test]
    fn how_a_host_fares_is_known_for_all_image_hosts() {
        let mirror = vec![Mirror { host: "https://m.example".into(), ..Mirror::default() }];
        let mirrors = [("a.example".to_owned(), mirror.clone()), ("b.example".to_owned(), mirror)];
        let hosts = hosts(HostSettings { mirrors: mirrors.into(), ..HostSettings::default() });
        hosts.of("a.example").unwrap()[0].failed(None);
        assert_eq!(hosts.of("b.example").unwrap()[0].standing(), Standing::Penalised);
        hosts.of("b.example").unwrap()[0].lives();
        assert_eq!(hosts.of("a.example").unwrap()[0].standing(), Standing::Good);
    }
}
