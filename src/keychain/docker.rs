//! docker's `config.json` and podman's `auth.json`: logins stored in them, and the helpers they name.
//!
//! Read again when the file has changed, so `docker login` needs no restart. A file that is not there is an empty one. A key is a
//! host, a URL of one (docker writes `https://index.docker.io/v1/`), or a host with the beginning of a repository (podman: `quay.io/team`).

use super::{
    Credential, Lookup, Query, Secret, Source, SourceError,
    files::{Reread, Unreadable},
    helper,
};
use base64::Engine;
use std::{collections::HashMap, path::PathBuf, sync::Arc};

/// The logins of a docker configuration file.
pub struct DockerConfig {
    name: String,
    file: Reread<Logins>,
}

/// What such a file says; also what a Kubernetes secret of the type `dockerconfigjson` holds.
#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Logins {
    auths: HashMap<String, Entry>,
    creds_store: String,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Entry {
    auth: Secret,
    username: String,
    password: Secret,
    identitytoken: Secret,
    registrytoken: Secret,
}

impl DockerConfig {
    /// The configuration at `path`.
    pub fn new(path: impl Into<PathBuf>) -> DockerConfig {
        DockerConfig::named("docker configuration", path.into())
    }

    fn named(what: &str, path: PathBuf) -> DockerConfig {
        DockerConfig { name: format!("{what} ({})", path.display()), file: Reread::new(path) }
    }

    /// That of the user who runs us: `$DOCKER_CONFIG/config.json`, else `.docker/config.json` at home. A service has no
    /// `$HOME`; its home is then that of its user.
    pub fn of_environment() -> Option<DockerConfig> {
        let directory = variable("DOCKER_CONFIG").or_else(|| Some(home()?.join(".docker")))?;
        Some(DockerConfig::new(directory.join("config.json")))
    }

    /// podman's, buildah's and skopeo's of the user who runs us, in their order: `$REGISTRY_AUTH_FILE` alone, else
    /// `containers/auth.json` below `$XDG_RUNTIME_DIR` (or `/run/containers/<uid>/auth.json`), then below `$XDG_CONFIG_HOME` or
    /// `.config` at home.
    pub fn podman_of_environment() -> Vec<DockerConfig> {
        let podman = |path: PathBuf| DockerConfig::named("podman's logins", path);
        if let Some(path) = variable("REGISTRY_AUTH_FILE") {
            return vec![podman(path)];
        }
        let running = match variable("XDG_RUNTIME_DIR") {
            Some(directory) => directory.join("containers/auth.json"),
            None => PathBuf::from(format!("/run/containers/{}/auth.json", nix::unistd::geteuid())),
        };
        let kept = variable("XDG_CONFIG_HOME").or_else(|| Some(home()?.join(".config")));
        [Some(running), kept.map(|d| d.join("containers/auth.json"))].into_iter().flatten().map(podman).collect()
    }

    fn load(&self) -> Result<Arc<Logins>, SourceError> {
        match self.file.load(Logins::parse) {
            Ok(logins) => Ok(logins.unwrap_or_default()),
            Err(Unreadable::Read { path, source }) => Err(SourceError::Unreadable { path, source }),
            Err(Unreadable::Malformed { path, what }) => {
                Err(SourceError::Malformed { path, kind: "docker configuration", what })
            }
        }
    }
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

pub(super) fn home() -> Option<PathBuf> {
    variable("HOME").or_else(|| {
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten()?;
        Some(user.dir)
    })
}

impl Source for DockerConfig {
    fn name(&self) -> &str {
        &self.name
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        Box::pin(async move {
            let logins = self.load()?;
            let stored = logins.stored(query);
            let Some(name) = logins.helper(query.server()) else { return Ok(stored) };
            match helper::get(name, query.server()).await {
                Ok(found) => Ok(found.into_iter().chain(stored).collect()),
                Err(source) if stored.is_empty() => Err(SourceError::Helper { name: name.to_owned(), source }),
                Err(_) => Ok(stored),
            }
        })
    }
}

impl Logins {
    pub fn parse(text: &[u8]) -> Result<Logins, String> {
        // What serde says could quote the file.
        serde_json::from_slice(text)
            .map_err(|e| format!("it is not the JSON it should be (line {}, column {})", e.line(), e.column()))
    }

    /// The helper that is responsible for `server`, if any.
    fn helper(&self, server: &str) -> Option<&str> {
        let special = self
            .cred_helpers
            .get(server)
            .or_else(|| self.cred_helpers.iter().find(|(key, _)| same_host(key, server)).map(|(_, name)| name));
        special.or((!self.creds_store.is_empty()).then_some(&self.creds_store)).map(String::as_str)
    }

    /// The logins that are stored for the query: of the repository before those of the host, the exact name before other spellings.
    pub fn stored(&self, query: &Query<'_>) -> Vec<Credential> {
        let server = query.server();
        let image = query.image();
        let mut keys: Vec<(usize, bool, &String)> = Vec::new();
        for key in self.auths.keys() {
            match scope(key) {
                Some(path) if same_host(key, server) && covers(path, &image) => {
                    keys.push((path.len(), key == server, key))
                }
                None if same_host(key, server) => keys.push((0, key == server, key)),
                _ => {}
            }
        }
        keys.sort_by(|a, b| (b.0, b.1).cmp(&(a.0, a.1)).then_with(|| a.2.cmp(b.2)));
        let mut out: Vec<Credential> = Vec::new();
        for credential in keys.into_iter().filter_map(|(_, _, key)| self.auths.get(key)?.credential()) {
            if !out.contains(&credential) {
                out.push(credential);
            }
        }
        out
    }
}

/// The beginning of a repository that a key is for, if it is not for a whole host.
fn scope(key: &str) -> Option<&str> {
    if key.starts_with("https://") || key.starts_with("http://") {
        return None;
    }
    let (_, path) = key.split_once('/')?;
    let path = path.trim_end_matches('/');
    (!matches!(path, "" | "v1" | "v2")).then_some(path)
}

fn covers(path: &str, image: &str) -> bool {
    let repository = image.split_once('/').map_or("", |(_, repository)| repository);
    repository.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Entry {
    fn credential(&self) -> Option<Credential> {
        if !self.identitytoken.is_empty() {
            return Some(Credential::Identity(self.identitytoken.clone()));
        }
        if !self.registrytoken.is_empty() {
            return Some(Credential::Registry(self.registrytoken.clone()));
        }
        if !self.auth.is_empty() {
            return basic_pair(&self.auth);
        }
        let user = self.username.clone();
        (!self.password.is_empty()).then(|| Credential::Password { user, password: self.password.clone() })
    }
}

/// The login in base64 of `user:password`.
pub(super) fn basic_pair(auth: &Secret) -> Option<Credential> {
    let engine = base64::engine::GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        base64::engine::general_purpose::PAD.with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
    );
    let bytes = zeroize::Zeroizing::new(engine.decode(auth.expose().trim()).ok()?);
    let (user, password) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
    let password = password.trim_end_matches('\0');
    (!password.is_empty()).then(|| Credential::Password { user: user.to_owned(), password: Secret::new(password) })
}

/// `host[:port]` of a key, which may be a URL.
pub(super) fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

/// Docker Hub has several names; podman's is `docker.io`.
fn same_host(a: &str, b: &str) -> bool {
    fn plain(key: &str) -> &str {
        match host_of(key) {
            "docker.io" | "registry-1.docker.io" => "index.docker.io",
            host => host,
        }
    }
    plain(a) == plain(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    async fn lookup(config: &DockerConfig, host: &str) -> Result<Option<Credential>, SourceError> {
        let reference = format!("{host}/r").parse().unwrap();
        Ok(config.lookup(&Query { host, reference: &reference }).await?.into_iter().next())
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
    async fn podmans_logins_may_be_for_a_part_of_a_registry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        // "a:1" to "d:4"
        std::fs::write(
            &path,
            r#"{"auths":{"h":{"auth":"YTox"},"h/team":{"auth":"Yjoy"},"h/team/app":{"auth":"Yzoz"},"docker.io/x":{"auth":"ZDo0"}}}"#,
        )
        .unwrap();
        let config = DockerConfig::new(path);
        let users = async |image: &str| {
            let reference: crate::oci::Reference = image.parse().unwrap();
            let host = if reference.host == "docker.io" { "registry-1.docker.io" } else { reference.host.as_str() };
            let found = config.lookup(&Query { host, reference: &reference }).await.unwrap();
            let user = |c| match c {
                Credential::Password { user, .. } => user,
                other => panic!("{other:?}"),
            };
            found.into_iter().map(user).collect::<Vec<_>>()
        };
        assert_eq!(users("h/team/app/x").await, ["c", "b", "a"]);
        assert_eq!(users("h/teams").await, ["a"]);
        assert_eq!(users("docker.io/x/y").await, ["d"]);
        assert!(users("docker.io/library/y").await.is_empty());
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
