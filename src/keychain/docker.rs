//! docker's `config.json`: logins stored in it, and the helpers it names.
//!
//! Read again when the file has changed, so `docker login` needs no restart. A file that is not there is an empty one.

use super::{Credential, Lookup, Query, Secret, Source, SourceError, helper};
use base64::Engine;
use std::{
    collections::HashMap,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// Largest configuration read. Thousands of logins fit.
const MAX_FILE: u64 = 1 << 20;

/// The logins of a docker configuration file.
pub struct DockerConfig {
    path: PathBuf,
    /// What was read last, and which file that was. Held while the file is read.
    read: Mutex<Option<(Stamp, Arc<File>)>>,
}

/// What tells one state of a file from another.
#[derive(PartialEq, Eq, Clone, Copy)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: HashMap<String, Entry>,
    creds_store: String,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl DockerConfig {
    /// The configuration at `path`.
    pub fn new(path: impl Into<PathBuf>) -> DockerConfig {
        DockerConfig { path: path.into(), read: Mutex::default() }
    }

    /// That of the user who runs us: `$DOCKER_CONFIG/config.json`, else `.docker/config.json` at home. A service has no
    /// `$HOME`; its home is then that of its user.
    pub fn of_environment() -> Option<DockerConfig> {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let directory = var("DOCKER_CONFIG").or_else(|| {
            let home = var("HOME").or_else(|| {
                let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten()?;
                Some(user.dir)
            });
            Some(home?.join(".docker"))
        })?;
        Some(DockerConfig::new(directory.join("config.json")))
    }

    fn load(&self) -> Result<Arc<File>, SourceError> {
        let path = || self.path.display().to_string();
        let unreadable = |source| SourceError::Unreadable { path: path(), source };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                *read = None;
                return Ok(Arc::default());
            }
            Err(error) => return Err(unreadable(error)),
        };
        let meta = file.metadata().map_err(unreadable)?;
        let stamp = Stamp { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) };
        if let Some((known, config)) = &*read
            && *known == stamp
        {
            return Ok(config.clone());
        }
        if meta.size() > MAX_FILE {
            return Err(SourceError::Malformed { path: path(), what: "it is larger than 1 MiB" });
        }
        let mut text = Vec::new();
        file.by_ref().take(MAX_FILE).read_to_end(&mut text).map_err(unreadable)?;
        // What serde says could quote the file.
        let config: File = serde_json::from_slice(&text)
            .map_err(|_| SourceError::Malformed { path: path(), what: "it is not the JSON it should be" })?;
        let config = Arc::new(config);
        *read = Some((stamp, config.clone()));
        Ok(config)
    }
}

impl Source for DockerConfig {
    fn name(&self) -> &'static str {
        "docker configuration"
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        Box::pin(async move {
            let config = self.load()?;
            let server = query.server();
            let helper = config.helper(server);
            let stored = || config.stored(server);
            match helper {
                None => Ok(stored()),
                Some(name) => match helper::get(name, server).await {
                    Ok(Some(found)) => Ok(Some(found)),
                    Ok(None) => Ok(stored()),
                    Err(source) => match stored() {
                        Some(found) => Ok(Some(found)),
                        None => Err(SourceError::Helper { name: name.to_owned(), source }),
                    },
                },
            }
        })
    }
}

impl File {
    /// The helper that is responsible for `server`, if any.
    fn helper(&self, server: &str) -> Option<&str> {
        let special = self.cred_helpers.get(server).or_else(|| {
            self.cred_helpers.iter().find(|(key, _)| host_of(key) == host_of(server)).map(|(_, name)| name)
        });
        special.or((!self.creds_store.is_empty()).then_some(&self.creds_store)).map(String::as_str)
    }

    /// The login that the file itself holds. Keys may be hosts or URLs.
    fn stored(&self, server: &str) -> Option<Credential> {
        let exact = self.auths.get(server).and_then(Entry::credential);
        exact.or_else(|| {
            let mut keys: Vec<_> = self.auths.keys().filter(|key| host_of(key) == host_of(server)).collect();
            keys.sort();
            keys.into_iter().find_map(|key| self.auths.get(key)?.credential())
        })
    }
}

impl Entry {
    fn credential(&self) -> Option<Credential> {
        if !self.identitytoken.is_empty() {
            return Some(Credential::Identity(Secret::new(self.identitytoken.as_str())));
        }
        let (user, password) = match self.auth.is_empty() {
            true => (self.username.clone(), self.password.clone()),
            false => {
                let engine = base64::engine::GeneralPurpose::new(
                    &base64::alphabet::STANDARD,
                    base64::engine::general_purpose::PAD
                        .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
                );
                let text = String::from_utf8(engine.decode(self.auth.trim()).ok()?).ok()?;
                let (user, password) = text.split_once(':')?;
                (user.to_owned(), password.trim_end_matches('\0').to_owned())
            }
        };
        (!password.is_empty()).then(|| Credential::Password { user, password: Secret::new(password) })
    }
}

/// `host[:port]` of a key, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    async fn lookup(config: &DockerConfig, host: &str) -> Result<Option<Credential>, SourceError> {
        let reference = format!("{host}/r").parse().unwrap();
        config.lookup(&Query { host, reference: &reference }).await
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.into(), password: Secret::new(password) })
    }

    #[tokio::test]
    async fn logins_are_found_under_every_spelling_of_their_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let config = DockerConfig::new(&path);
        assert_eq!(lookup(&config, "h").await.unwrap(), None, "no file is an empty file");
        // "u:p:q" and "hub:pw"
        std::fs::write(
            &path,
            r#"{"auths":{"https://h:5000/v1/":{"auth":"dTpwOnE="},"https://index.docker.io/v1/":{"auth":"aHViOnB3"},
               "i":{"identitytoken":"t"},"plain":{"username":"a","password":"b"},"empty":{}}}"#,
        )
        .unwrap();
        assert_eq!(lookup(&config, "h:5000").await.unwrap(), password("u", "p:q"));
        assert_eq!(lookup(&config, "h").await.unwrap(), None, "another port is another registry");
        assert_eq!(lookup(&config, "registry-1.docker.io").await.unwrap(), password("hub", "pw"));
        assert_eq!(lookup(&config, "i").await.unwrap(), Some(Credential::Identity(Secret::new("t"))));
        assert_eq!(lookup(&config, "plain").await.unwrap(), password("a", "b"));
        assert_eq!(lookup(&config, "empty").await.unwrap(), None);
        std::fs::write(&path, r#"{"auths":{"h":{"auth":"dTpw"}}}"#).unwrap();
        assert_eq!(lookup(&config, "h").await.unwrap(), password("u", "p"), "a change is noticed");
        std::fs::write(&path, "hunter2").unwrap();
        let error = lookup(&config, "h").await.unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[tokio::test]
    async fn helpers_answer_for_the_hosts_they_are_named_for() {
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("docker-credential-sociunittest");
        let script = "#!/bin/sh\nread -r server\ncase $server in\n\
            https://index.docker.io/v1/) echo '{\"Username\":\"<token>\",\"Secret\":\"idt\"}';;\n\
            known) echo '{\"ServerURL\":\"known\",\"Username\":\"u\",\"Secret\":\"p\"}';;\n\
            big) head -c 100000 /dev/zero;;\n\
            broken) echo hunter2; exit 3;;\n\
            *) echo 'credentials not found in native keychain'; exit 1;;\nesac\n";
        std::fs::write(&helper, script).unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("config.json");
        // The helper is found through PATH, which tests share; a name with a directory is not possible.
        let bin = std::env::var_os("PATH").unwrap_or_default();
        let joined =
            std::env::join_paths(std::iter::once(dir.path().to_owned()).chain(std::env::split_paths(&bin))).unwrap();
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "keychain::docker::tests::helper_child", "--ignored", "--nocapture"])
            .env("PATH", joined)
            .env("SOCI_TEST_DOCKER_CONFIG", &path)
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// The body of the test above, in a process whose PATH has the helper.
    #[tokio::test]
    #[ignore = "run by helpers_answer_for_the_hosts_they_are_named_for"]
    async fn helper_child() {
        let Some(path) = std::env::var_os("SOCI_TEST_DOCKER_CONFIG") else { return };
        let config = DockerConfig::new(&path);
        std::fs::write(&path, r#"{"credsStore":"sociunittest","auths":{"elsewhere":{"auth":"dTpw"}}}"#).unwrap();
        assert_eq!(lookup(&config, "known").await.unwrap(), password("u", "p"));
        assert_eq!(lookup(&config, "docker.io").await.unwrap(), Some(Credential::Identity(Secret::new("idt"))));
        assert_eq!(lookup(&config, "elsewhere").await.unwrap(), password("u", "p"), "what the helper does not know");
        assert_eq!(lookup(&config, "unknown").await.unwrap(), None);
        for host in ["broken", "big"] {
            let error = super::super::chain(&lookup(&config, host).await.unwrap_err());
            assert!(error.contains("sociunittest") && !error.contains("hunter2"), "{error}");
        }
        std::fs::write(&path, r#"{"credHelpers":{"known":"sociunittest","x":"sociunit-missing"}}"#).unwrap();
        assert_eq!(lookup(&config, "known").await.unwrap(), password("u", "p"));
        assert_eq!(lookup(&config, "docker.io").await.unwrap(), None);
        assert!(lookup(&config, "x").await.is_err());
    }
}
