//! Registries and logins as they are configured: the configuration's words in those of [`crate::registry`] and [`crate::keychain`], and
//! what `config check` says of them.

use crate::{
    config::{self, Config, args::Options},
    keychain::{CriLogins, DockerConfig, Keychain, KubeSecrets, KubeletProviders, Query, Source, SourceError},
    oci::Reference,
    registry::{self, HostSettings, HttpSettings, Mirror, MirrorTimeout, Registry, RetrySettings, Security},
};
use std::{path::Path, sync::Arc, time::Duration};

fn limit(timeout: config::Timeout) -> registry::Limit {
    timeout.duration().map_or(registry::Limit::Unlimited, registry::Limit::After)
}

pub fn http_settings(config: &Config) -> HttpSettings {
    let (http, blob) = (&config.http, &config.blob);
    HttpSettings {
        // A connection that takes longer than an hour is not going to be one.
        dial_timeout: http.dial_timeout.duration().unwrap_or(Duration::from_secs(3600)),
        header_timeout: limit(http.response_header_timeout),
        request_timeout: limit(http.request_timeout),
        retry: RetrySettings { max_retries: http.max_retries, min_wait: http.min_wait, max_wait: http.max_wait },
        blob_timeout: limit(blob.fetching_timeout),
        blob_retry: RetrySettings { max_retries: blob.max_retries, min_wait: blob.min_wait, max_wait: blob.max_wait },
        ..HttpSettings::default()
    }
}

pub fn hosts(config: &Config) -> HostSettings {
    let mirror = |m: &config::Mirror| Mirror {
        host: m.host.clone(),
        security: if m.insecure { Security::PlainHttp } else { Security::Tls },
        timeout: match m.request_timeout {
            config::RequestTimeout::Inherit => MirrorTimeout::Inherit,
            config::RequestTimeout::Never => MirrorTimeout::Own(registry::Limit::Unlimited),
            config::RequestTimeout::After(after) => MirrorTimeout::Own(registry::Limit::After(after)),
        },
    };
    let mirrors = config.resolver.host.iter().map(|(host, list)| (host.clone(), list.iter().map(mirror).collect()));
    HostSettings { mirrors: mirrors.collect(), directories: config.registry.directories(), ..HostSettings::default() }
}

/// Registries as the daemon asks them under `config`, for tools that look at an image with its eyes. Call within a tokio runtime.
pub fn registry_of(config: &Config) -> Result<Registry, registry::RegistryError> {
    Registry::new(http_settings(config), hosts(config), Arc::new(Keychain::new(keychain_sources(config, None))))
}

/// Each source of logins of a daemon with `config`, and whether it knows one for the registry of `reference`: what it knows is not told. What CRI
/// sends with its pulls only the daemon knows. Call within a tokio runtime.
pub async fn logins_of(config: &Config, reference: &Reference) -> Vec<(String, Result<bool, SourceError>)> {
    let query = Query { host: &reference.host, reference };
    let mut out = Vec::new();
    for source in keychain_sources(config, None) {
        let known = source.lookup(&query).await.map(|found| !found.is_empty());
        out.push((source.name().to_owned(), known));
    }
    out
}

pub struct Checked {
    /// One line per image host that something is configured for.
    pub text: String,
    pub warnings: usize,
}

/// Why images of some registries could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RegistriesError {
    #[error(transparent)]
    Setup(#[from] registry::RegistryError),
    #[error("{}", .0.join("; "))]
    Hosts(Vec<String>),
    #[error(
        "cri_keychain.image_service_path is the daemon's own socket {0}: it has to be that of containerd, which does the pulling"
    )]
    Circle(String),
}

/// Whatever would be passed on to the daemon's own socket would be passed on for ever.
pub fn no_circle(config: &Config, address: &str) -> Result<(), RegistriesError> {
    use std::os::unix::fs::MetadataExt;
    let id = |path: &str| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let (path, own) = (&config.cri_keychain.image_service_path, address.strip_prefix("unix://").unwrap_or(address));
    let same = path == own || id(path).is_some_and(|found| id(own) == Some(found));
    match config.cri_keychain.enable_keychain && same {
        true => Err(RegistriesError::Circle(own.to_owned())),
        false => Ok(()),
    }
}

/// Who decides whom to ask for the images of which registry; problems are errors, and what has no effect a warning.
pub fn check(config: &Config, options: &Options) -> Result<Checked, RegistriesError> {
    no_circle(config, &options.address)?;
    let path = &options.config;
    let registry = Registry::new(http_settings(config), hosts(config), Arc::default())?;
    let mut out = Checked { text: String::new(), warnings: 0 };
    let mut problems = Vec::new();
    let mut warn = |text: String| {
        eprintln!("warning: {text}");
        out.warnings += 1;
    };
    // The default names what is there where somebody needed it.
    let usual = |directory: &Path| registry::DEFAULT_DIRECTORIES.iter().any(|usual| directory == Path::new(usual));
    for directory in config.registry.directories().iter().filter(|dir| !dir.is_dir() && !usual(dir)) {
        warn(format!("registry.config_path: {} is not a directory", directory.display()));
    }
    for report in registry.hosts_report() {
        let (host, hosts) = (&report.image_host, report.hosts.join(", then "));
        let by = match &report.decided {
            registry::DecidedBy::Default => "nothing special".to_owned(),
            registry::DecidedBy::Resolver => format!("[resolver.host] in {}", path.display()),
            registry::DecidedBy::Path(path) => path.display().to_string(),
        };
        if let Some(problem) = report.problem {
            problems.push(format!("images of {host} cannot be had: {problem}"));
            continue;
        }
        out.text += &format!("{host}: {by} decides: {hosts}\n");
        for key in &report.unknown_keys {
            warn(format!("{by}:{key}: unknown key, ignored"));
        }
        if let Some(unused) = &report.unused {
            // That a host of its own beats the default is what the default is for.
            if unused.ends_with("_default/hosts.toml") {
                out.text += &format!("{host}: {unused} is not used\n");
            } else {
                warn(format!("{host}: {unused} is not used, because {by} decides"));
            }
        }
    }
    if problems.is_empty() { Ok(out) } else { Err(RegistriesError::Hosts(problems)) }
}

/// Where logins come from, in the order in which they are tried (`keychain`). Call within a tokio runtime.
pub fn keychain_sources(config: &Config, cri: Option<Arc<CriLogins>>) -> Vec<Arc<dyn Source>> {
    let mut sources: Vec<Arc<dyn Source>> = Vec::new();
    for file in DockerConfig::of_environment().into_iter().chain(DockerConfig::podman_of_environment()) {
        sources.push(Arc::new(file));
    }
    let kubelet = &config.kubelet_keychain;
    if kubelet.enable_keychain {
        sources.push(Arc::new(KubeletProviders::new(&kubelet.config_path, &kubelet.bin_dir)));
    }
    sources.extend(cri.map(|logins| logins as Arc<dyn Source>));
    if config.kubeconfig_keychain.enable_keychain {
        sources.push(Arc::new(KubeSecrets::start(&config.kubeconfig_keychain.kubeconfig_path)));
    }
    sources
}
