//! kubelet's credential providers, run by us: what `--image-credential-provider-config` and `--image-credential-provider-bin-dir` name.
//!
//! A provider is asked about images that it is configured for, with one JSON document on its standard input; its answer holds for
//! as long as it says, and for the image, its registry, or everything, as it says (`kubelet.config.k8s.io/v1`,
//! `credentialprovider.kubelet.k8s.io/v1`). An answer that a registry refuses is not used again. The configuration is read again when
//! it has changed. Providers that need a pod's service account token are for kubelet alone and are left out.

use super::{
    Credential, Lookup, Query, Secret, Source, SourceError,
    files::{Reread, Unreadable},
    program::{self, Program, ProgramError},
};
use crate::{notation::go_duration, telemetry::catalog::say};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Answers remembered.
const CAPACITY: usize = 1024;
/// No answer is believed for longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Logins taken from one answer.
const MAX_LOGINS: usize = 8;
const CONFIG_VERSIONS: [&str; 3] =
    ["kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"];
const PROTOCOL_VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// The providers of one configuration.
pub struct KubeletProviders {
    name: String,
    bin_dir: PathBuf,
    config: Reread<Vec<Provider>>,
    answers: Mutex<HashMap<Key, Answer>>,
    /// Held while providers run, so that one answer serves all who wait for it.
    running: tokio::sync::Mutex<()>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<serde_json::Value>,
}

#[derive(serde::Deserialize)]
struct Variable {
    name: String,
    value: String,
}

/// What an answer is about: provider, and the image, its registry, or nothing in particular.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key(String, String);

struct Answer {
    /// By pattern of what they are for, the most specific first.
    logins: Arc<[(String, Credential)]>,
    until: Instant,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'a str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    api_version: String,
    cache_key_type: CacheKeyType,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, AuthConfig>>,
}

#[derive(serde::Deserialize, Clone, Copy)]
enum CacheKeyType {
    Image,
    Registry,
    Global,
}

#[derive(serde::Deserialize)]
struct AuthConfig {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

impl KubeletProviders {
    /// Providers of the configuration at `config` (YAML or JSON), whose programs are in `bin_dir`.
    pub fn new(config: impl Into<PathBuf>, bin_dir: impl Into<PathBuf>) -> KubeletProviders {
        let config = config.into();
        KubeletProviders {
            name: format!("kubelet's providers ({})", config.display()),
            bin_dir: bin_dir.into(),
            config: Reread::new(config),
            answers: Mutex::default(),
            running: tokio::sync::Mutex::default(),
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Key, Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self) -> Result<Option<Arc<Vec<Provider>>>, SourceError> {
        let parsed = self.config.load(|text| {
            let file: ConfigFile = super::yaml(text).map_err(|at| format!("it cannot be understood{at}"))?;
            check(file)
        });
        parsed.map_err(|error| match error {
            Unreadable::Read { path, source } => SourceError::Unreadable { path, source },
            Unreadable::Malformed { path, what } => {
                SourceError::Malformed { path, kind: "configuration of kubelet's providers", what }
            }
        })
    }

    fn known(&self, provider: &str, image: &str) -> Option<Arc<[(String, Credential)]>> {
        let now = Instant::now();
        let mut answers = self.answers();
        answers.retain(|_, answer| now < answer.until);
        let host = image.split('/').next().unwrap_or_default();
        let about = [image, host, ""].map(|about| Key(provider.to_owned(), about.to_owned()));
        about.iter().find_map(|key| answers.get(key)).map(|answer| answer.logins.clone())
    }

    async fn ask(&self, provider: &Provider, image: &str) -> Result<Arc<[(String, Credential)]>, ProgramError> {
        let kind = "CredentialProviderRequest";
        let request = Request { kind, api_version: &provider.api_version, image };
        let input = serde_json::to_vec(&request).map_err(|_| ProgramError::Answer)?;
        let variable = |v: &Variable| (v.name.clone(), v.value.clone());
        let env: Vec<_> = provider.env.iter().flatten().map(variable).collect();
        let program = Program {
            path: &self.bin_dir.join(&provider.name),
            args: provider.args.as_deref().unwrap_or_default(),
            env: &env,
            input: &input,
            limit: program::TIMEOUT,
        };
        let output = program::run(&program).await?;
        let response: Response = serde_json::from_slice(output.success()?).map_err(|_| ProgramError::Answer)?;
        if response.kind != "CredentialProviderResponse" || response.api_version != provider.api_version {
            return Err(ProgramError::Answer);
        }
        let stated = response.cache_duration.as_deref().filter(|d| !d.is_empty());
        let duration = stated.unwrap_or(&provider.default_cache_duration);
        let duration = go_duration(duration).ok_or(ProgramError::Answer)?.min(LONGEST);
        // kubelet's order: what sorts last is the most specific.
        let logins: Arc<[_]> = response
            .auth
            .unwrap_or_default()
            .into_iter()
            .rev()
            .map(|(pattern, auth)| {
                let password = Secret::new(auth.password);
                (pattern, Credential::Password { user: auth.username, password })
            })
            .collect();
        if !duration.is_zero() {
            let about = match response.cache_key_type {
                CacheKeyType::Image => image,
                CacheKeyType::Registry => image.split('/').next().unwrap_or_default(),
                CacheKeyType::Global => "",
            };
            let mut answers = self.answers();
            if answers.len() >= CAPACITY {
                let soonest = answers.iter().min_by_key(|(_, a)| a.until).map(|(key, _)| key.clone());
                soonest.map(|key| answers.remove(&key));
            }
            let until = Instant::now() + duration;
            answers.insert(Key(provider.name.clone(), about.to_owned()), Answer { logins: logins.clone(), until });
        }
        Ok(logins)
    }
}

fn check(file: ConfigFile) -> Result<Vec<Provider>, String> {
    if file.kind != "CredentialProviderConfig" || !CONFIG_VERSIONS.contains(&file.api_version.as_str()) {
        return Err(format!(
            "it is a {} of {}, not a CredentialProviderConfig",
            short(&file.kind),
            short(&file.api_version)
        ));
    }
    let mut out = Vec::new();
    for provider in file.providers {
        let name = &provider.name;
        if name.is_empty() || name.contains(['/', '\\', ' ', '\0']) || name == "." || name == ".." {
            return Err(format!("provider {:?}: its name is not that of a program", short(name)));
        }
        if !PROTOCOL_VERSIONS.contains(&provider.api_version.as_str()) {
            return Err(format!("provider {name:?}: its apiVersion {:?} is not known", short(&provider.api_version)));
        }
        if go_duration(&provider.default_cache_duration).is_none() {
            return Err(format!("provider {name:?}: its defaultCacheDuration is not a duration such as \"12h\""));
        }
        if provider.token_attributes.is_some() {
            tracing::info!(provider = name, "left out: it needs the service account of a pod, which only kubelet has");
            continue;
        }
        out.push(provider);
    }
    Ok(out)
}

fn short(text: &str) -> String {
    text.chars().take(100).collect()
}

impl Source for KubeletProviders {
    fn name(&self) -> &str {
        &self.name
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        Box::pin(async move {
            let Some(providers) = self.load()? else {
                let path = self.config.path().display().to_string();
                let source = std::io::ErrorKind::NotFound.into();
                return Err(SourceError::Unreadable { path, source });
            };
            let image = query.image();
            let mut out = Vec::new();
            let mut failed = None;
            for provider in providers.iter().filter(|p| p.match_images.iter().any(|m| matches(m, &image))) {
                let logins = match self.known(&provider.name, &image) {
                    Some(logins) => Ok(logins),
                    None => {
                        let _one = self.running.lock().await;
                        match self.known(&provider.name, &image) {
                            Some(logins) => Ok(logins),
                            None => self.ask(provider, &image).await,
                        }
                    }
                };
                match logins {
                    Ok(logins) => {
                        let fitting = logins.iter().filter(|(pattern, _)| matches(pattern, &image));
                        out.extend(fitting.map(|(_, login)| login.clone()).take(MAX_LOGINS));
                    }
                    Err(source) => failed = Some(SourceError::Helper { name: provider.name.clone(), source }),
                }
            }
            match failed {
                Some(error) if out.is_empty() => Err(error),
                Some(error) => {
                    say!(LoginUnavailable, source = self.name, host = query.host, error = %super::chain(&error), "cannot look up a registry login");
                    Ok(out)
                }
                None => Ok(out),
            }
        })
    }

    fn refused(&self, query: &Query<'_>) -> bool {
        let image = query.image();
        let host = image.split('/').next().unwrap_or_default();
        let mut answers = self.answers();
        let before = answers.len();
        answers.retain(|Key(_, about), _| !about.is_empty() && about != host && *about != image);
        answers.len() < before
    }
}

/// kubelet's rule: as many labels in the host, each matched by itself, the same port, and the path as a prefix.
fn matches(pattern: &str, image: &str) -> bool {
    let split = |text: &str| {
        let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text).to_owned();
        let (authority, path) = match text.find('/') {
            Some(at) => (text[..at].to_owned(), text[at..].to_owned()),
            None => (text, String::new()),
        };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
                (host.to_owned(), port.to_owned())
            }
            _ => (authority, String::new()),
        };
        (host, port, path)
    };
    let ((wanted, wanted_port, prefix), (host, port, path)) = (split(pattern), split(image));
    let (wanted, host): (Vec<_>, Vec<_>) = (wanted.split('.').collect(), host.split('.').collect());
    wanted.len() == host.len()
        && wanted_port == port
        && path.starts_with(prefix.as_str())
        && wanted.iter().zip(&host).all(|(pattern, label)| glob(pattern.as_bytes(), label.as_bytes()))
}

/// `*` and `?`. Goes back to the last star only, so a long pattern takes no longer than the product of the lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn images_are_matched_as_kubelet_does() {
        for (pattern, image, expected) in [
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com/a/b", true),
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.amazonaws.com/a", false),
            ("*.dkr.ecr.*.amazonaws.com", "evil.example/123.dkr.ecr.eu-west-1.amazonaws.com/a", false),
            ("app*.k8s.io", "app1.k8s.io/x", true),
            ("app?.k8s.io", "app12.k8s.io/x", false),
            ("registry.io:8080/path", "registry.io:8080/path/x", true),
            ("registry.io:8080/path", "registry.io/path/x", false),
            ("registry.io", "registry.io:8080/path", false),
            ("https://registry.io/a", "registry.io/b", false),
            ("*", "localhost/a", true),
            ("*a*b*", "xaybz/x", true),
            ("*a*b", "xaybz/x", false),
        ] {
            assert_eq!(matches(pattern, image), expected, "{pattern} {image}");
        }
    }

    struct Lab {
        dir: tempfile::TempDir,
        providers: KubeletProviders,
    }

    /// A provider that counts how often it is run and answers with what `answer` prints.
    fn lab(answer: &str) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("fake-provider");
        let script = format!(
            "#!/bin/sh\nn=$(cat {0}/n 2>/dev/null || echo 0); n=$((n+1)); echo $n > {0}/n\ncat > {0}/request\n{answer}\n",
            dir.path().display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = dir.path().join("config.yaml");
        std::fs::write(
            &config,
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
             - name: fake-provider\n  matchImages: ['*.example', 'r.example:5000']\n  defaultCacheDuration: 1h\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get-credentials]\n  env: [{name: X, value: 'y'}]\n\
             - name: token-provider\n  matchImages: ['*']\n  defaultCacheDuration: 1h\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  tokenAttributes: {serviceAccountTokenAudience: x}\n",
        )
        .unwrap();
        let providers = KubeletProviders::new(config, dir.path());
        Lab { dir, providers }
    }

    fn response(key_type: &str, duration: &str) -> String {
        format!(
            "echo '{{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\
             \"cacheKeyType\":\"{key_type}\"{duration},\"auth\":{{\"*.example\":{{\"username\":\"wide\",\"password\":\"'$X$1'\"}},\
             \"r.example/a\":{{\"username\":\"narrow\",\"password\":\"p'$n'\"}}}}}}'"
        )
    }

    impl Lab {
        async fn users(&self, image: &str) -> Vec<String> {
            let reference: crate::oci::Reference = image.parse().unwrap();
            let found = self.providers.lookup(&Query { host: &reference.host, reference: &reference }).await.unwrap();
            found
                .into_iter()
                .map(|c| match c {
                    Credential::Password { user, password } => format!("{user}:{}", password.expose()),
                    other => panic!("{other:?}"),
                })
                .collect()
        }
        fn runs(&self) -> String {
            std::fs::read_to_string(self.dir.path().join("n")).unwrap_or_default().trim().to_owned()
        }
    }

    #[tokio::test]
    async fn a_provider_is_asked_in_its_protocol_and_its_answer_kept_for_what_it_is_about() {
        let lab = lab(&response("Registry", ""));
        assert_eq!(lab.users("r.example/a/x:1").await, ["narrow:p1", "wide:yget-credentials"]);
        let request: serde_json::Value =
            serde_json::from_slice(&std::fs::read(lab.dir.path().join("request")).unwrap()).unwrap();
        assert_eq!(
            request,
            serde_json::json!({"kind": "CredentialProviderRequest", "image": "r.example/a/x",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1"})
        );
        assert_eq!(lab.users("r.example/b:1").await, ["wide:yget-credentials"], "the same registry, another image");
        assert_eq!(lab.runs(), "1");
        lab.users("q.example/b:1").await;
        assert_eq!(lab.runs(), "2", "another registry");
        assert_eq!(lab.users("elsewhere.test/b").await, Vec::<String>::new());
        assert_eq!(lab.runs(), "2", "not its image");
        let reference = "r.example/a".parse().unwrap();
        assert!(lab.providers.refused(&Query { host: "r.example", reference: &reference }));
        assert!(
            !lab.providers.refused(&Query { host: "r.example", reference: &reference }),
            "nothing is left to forget"
        );
        assert_eq!(lab.users("r.example/a").await[0], "narrow:p3", "what was refused is asked for again");
    }

    #[tokio::test]
    async fn cache_keys_and_durations_are_respected() {
        for (key_type, duration, expected) in [
            ("Image", "", ["1", "2", "3", "3"]),
            ("Global", "", ["1", "1", "1", "1"]),
            ("Global", ",\"cacheDuration\":\"0s\"", ["1", "2", "3", "4"]),
            ("Registry", ",\"cacheDuration\":\"1h0m0s\"", ["1", "1", "2", "2"]),
        ] {
            let lab = lab(&response(key_type, duration));
            for (image, runs) in ["r.example/a", "r.example/b", "q.example/a", "r.example/a"].iter().zip(expected) {
                lab.users(image).await;
                assert_eq!(lab.runs(), runs, "{key_type} {duration} {image}");
            }
        }
    }

    #[tokio::test]
    async fn what_goes_wrong_is_said_without_what_the_provider_said() {
        let query_host = "r.example";
        let reference = "r.example/a".parse().unwrap();
        let query = Query { host: query_host, reference: &reference };
        for answer in ["echo hunter2; exit 1", "echo hunter2", "echo '{\"kind\":\"hunter2\"}'"] {
            let error = lab(answer).providers.lookup(&query).await.unwrap_err();
            let error = super::super::chain(&error);
            assert!(error.contains("fake-provider") && !error.contains("hunter2"), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("c");
        for (text, expected) in [
            ("kind: [", "cannot be understood"),
            ("{\"kind\": \"Pod\", \"apiVersion\": \"v1\"}", "it is a Pod of v1"),
            (
                "kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\nproviders: [{name: ../x, matchImages: [x], \
                 defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}]",
                "is not that of a program",
            ),
        ] {
            std::fs::write(&config, text).unwrap();
            let error = KubeletProviders::new(&config, dir.path()).lookup(&query).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let missing = KubeletProviders::new(dir.path().join("none"), dir.path()).lookup(&query).await;
        assert!(matches!(missing, Err(SourceError::Unreadable { .. })));
    }
}
