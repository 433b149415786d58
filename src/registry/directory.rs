//! A host's directory, as containerd (`/etc/containerd/certs.d`) and Docker (`/etc/docker/certs.d`) have them: finding it, reading it,
//! and noticing that it has changed.
//!
//! Below each of the configured directories, in their order: `host_port_`, `host:port` (or `host`), then `_default`. The first
//! directory that is there decides, also when it is empty. In it, `hosts.toml`; where there is none, Docker's files: `*.crt` are
//! authorities, `x.cert` with `x.key` are client certificates.

use super::{
    hosts_file::{self, Entry, HostsFile},
    settings::{HostSettings, TlsFlags},
};
use crate::tls::Pem;
use std::{
    fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Largest certificate or key file read; bundles of all public authorities have 250 KB.
const MAX_PEM: u64 = 1 << 20;
/// Files looked at in one directory.
const MAX_FILES: usize = 256;
/// The directory for hosts that have none of their own.
const DEFAULT: &str = "_default";
/// The file in a host's directory.
pub(super) const HOSTS_TOML: &str = "hosts.toml";

/// Why a host's directory cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DirectoryError {
    #[error("{path} cannot be read: {why}")]
    Unreadable { path: String, why: String },
    #[error("{path} is larger than {limit} bytes")]
    TooLarge { path: String, limit: u64 },
    #[error("{path}:{what}")]
    Invalid { path: String, what: String },
    #[error("{certificate} has no private key beside it: {key} is missing")]
    NoKey { certificate: String, key: String },
}

/// What tells one state of a file or directory from another; None where it is not there.
type State = Option<(u64, u64, i64, i64)>;

/// The files that an answer was made of, also those that were looked for in vain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Stamp(Vec<(PathBuf, State)>);

impl Stamp {
    fn add(&mut self, path: &Path) {
        self.0.push((path.to_owned(), state(path)));
    }

    pub fn is_current(&self) -> bool {
        self.0.iter().all(|(path, known)| state(path) == *known)
    }
}

fn state(path: &Path) -> State {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

/// A host's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub path: PathBuf,
    pub is_default: bool,
}

/// The directory for `host`, if there is one. What was looked at is added to `stamp`.
pub(super) fn find(settings: &HostSettings, host: &str, stamp: &mut Stamp) -> Option<Found> {
    for root in &settings.directories {
        for (name, is_default) in names(host).into_iter().map(|name| (name, false)).chain([(DEFAULT.to_owned(), true)])
        {
            let path = root.join(name);
            stamp.add(&path);
            if path.is_dir() {
                return Some(Found { path, is_default });
            }
        }
    }
    None
}

/// What the directory of `host` may be called. Only what has been a host in an image reference comes here: no slashes, no dots alone.
fn names(host: &str) -> Vec<String> {
    if host.is_empty() || host.starts_with(['.', '_']) || host.contains(['/', '\0']) {
        return Vec::new();
    }
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            vec![format!("{name}_{port}_"), host.to_owned()]
        }
        _ => vec![host.to_owned()],
    }
}

/// The image host that a directory called `name` is for.
pub(super) fn host_of(name: &str) -> Option<String> {
    if name == DEFAULT || name.starts_with('.') {
        return None;
    }
    match name.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            Some(format!("{host}:{port}"))
        }
        _ => Some(name.to_owned()),
    }
}

/// What a directory says. `stamp` gets every file that counts.
pub(super) struct Contents {
    /// None: there is no `hosts.toml`.
    pub file: Option<HostsFile>,
    /// Docker's files, where there is no `hosts.toml`.
    pub certificates: Certificates,
}

/// Authorities and identities as files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Certificates {
    pub authorities: Vec<Pem>,
    pub identities: Vec<(Pem, Pem)>,
}

pub(super) fn read(directory: &Path, stamp: &mut Stamp) -> Result<Contents, DirectoryError> {
    let path = directory.join(HOSTS_TOML);
    stamp.add(&path);
    let Some(bytes) = slurp(&path, hosts_file::MAX_FILE)? else {
        return Ok(Contents { file: None, certificates: docker(directory, stamp)? });
    };
    let shown = path.display().to_string();
    let text = String::from_utf8(bytes)
        .map_err(|_| DirectoryError::Invalid { path: shown.clone(), what: " the file is not UTF-8".into() })?;
    let file = hosts_file::parse(&text, directory)
        .map_err(|e| DirectoryError::Invalid { path: shown, what: e.to_string() })?;
    Ok(Contents { file: Some(file), certificates: Certificates::default() })
}

/// The certificates that an entry of a `hosts.toml` names.
pub(super) fn certificates(entry: &Entry, stamp: &mut Stamp) -> Result<Certificates, DirectoryError> {
    let mut pem = |path: &Path| {
        stamp.add(path);
        self::pem(path)
    };
    let authorities = entry.authorities.iter().map(|path| pem(path)).collect::<Result<_, _>>()?;
    let identities =
        entry.identities.iter().map(|(cert, key)| Ok((pem(cert)?, pem(key)?))).collect::<Result<_, _>>()?;
    Ok(Certificates { authorities, identities })
}

/// The certificates that flags name.
pub(super) fn named(flags: &TlsFlags) -> Result<Certificates, DirectoryError> {
    let authorities = flags.authorities.iter().map(|path| pem(path)).collect::<Result<_, _>>()?;
    let identities = flags.identity.iter().map(|(cert, key)| Ok((pem(cert)?, pem(key)?))).collect::<Result<_, _>>()?;
    Ok(Certificates { authorities, identities })
}

fn docker(directory: &Path, stamp: &mut Stamp) -> Result<Certificates, DirectoryError> {
    let unreadable =
        |e: &io::Error| DirectoryError::Unreadable { path: directory.display().to_string(), why: e.to_string() };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(|e| unreadable(&e))?.take(MAX_FILES) {
        files.push(entry.map_err(|e| unreadable(&e))?.path());
    }
    files.sort();
    let mut out = Certificates::default();
    for path in files {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => {
                stamp.add(&path);
                out.authorities.push(pem(&path)?);
            }
            Some("cert") => {
                let key = path.with_extension("key");
                stamp.add(&path);
                stamp.add(&key);
                if !key.exists() {
                    let (certificate, key) = (path.display().to_string(), key.display().to_string());
                    return Err(DirectoryError::NoKey { certificate, key });
                }
                out.identities.push((pem(&path)?, pem(&key)?));
            }
            _ => {}
        }
    }
    Ok(out)
}

fn pem(path: &Path) -> Result<Pem, DirectoryError> {
    let name = path.display().to_string();
    match slurp(path, MAX_PEM)? {
        Some(bytes) => Ok(Pem { name, bytes }),
        None => Err(DirectoryError::Unreadable { path: name, why: "there is no such file".into() }),
    }
}

/// The file's bytes; None if it is not there.
fn slurp(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, DirectoryError> {
    let unreadable = |e: io::Error| DirectoryError::Unreadable { path: path.display().to_string(), why: e.to_string() };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unreadable(e)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(DirectoryError::TooLarge { path: path.display().to_string(), limit });
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_in_two_ways() {
        assert_eq!(names("docker.io"), ["docker.io"]);
        assert_eq!(names("h:5000"), ["h_5000_", "h:5000"]);
        assert_eq!(names("[::1]:5000"), ["[::1]_5000_", "[::1]:5000"]);
        assert_eq!(names("[::1]"), ["[::1]"]);
        assert!(names("..").is_empty() && names("_default").is_empty() && names("a/b").is_empty());
        assert_eq!(host_of("h_5000_").as_deref(), Some("h:5000"));
        assert_eq!(host_of("h:5000").as_deref(), Some("h:5000"));
        assert_eq!(host_of("a_b").as_deref(), Some("a_b"));
        assert_eq!(host_of("_default"), None);
    }

    #[test]
    fn the_first_directory_decides_and_the_default_is_for_those_without() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for path in [a.join("h:5000"), b.join("h_5000_"), b.join("_default"), b.join("x")] {
            fs::create_dir_all(path).unwrap();
        }
        let settings = HostSettings { directories: vec![a.clone(), b.clone()], ..HostSettings::default() };
        let found = |host| find(&settings, host, &mut Stamp::default()).map(|f| (f.path, f.is_default));
        assert_eq!(found("h:5000"), Some((a.join("h:5000"), false)));
        assert_eq!(found("x"), Some((b.join("x"), false)));
        assert_eq!(found("y"), Some((b.join("_default"), true)));
        let mut stamp = Stamp::default();
        find(&settings, "y", &mut stamp);
        assert!(stamp.is_current());
        fs::create_dir(b.join("y")).unwrap();
        assert!(!stamp.is_current(), "a directory that comes into being is noticed");
    }
}
