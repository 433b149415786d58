//! kubeconfig: which cluster, and who we are there.
//!
//! `$KUBECONFIG` may name several files; what the first one says of a name counts, as kubectl has it. Read anew for every connection,
//! so that tokens which are rotated are noticed.

use crate::{
    keychain::{
        Secret, docker,
        program::{self, Program, ProgramError},
    },
    tls::{Pem, System, Trust, Verification},
};
use base64::Engine;
use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

/// Largest kubeconfig read. One with a hundred clusters has 300 KB.
const MAX_FILE: u64 = 4 << 20;
/// Largest certificate, key or token read.
const MAX_PART: u64 = 1 << 20;
/// For a program that logs in to a cloud; kubectl sets no limit.
const EXEC_TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no way to the cluster. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum KubeconfigError {
    #[error("there is no kubeconfig at {0}")]
    Missing(String),
    #[error("{path} cannot be read")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{path} is larger than {limit} bytes")]
    TooLarge { path: String, limit: u64 },
    #[error("{path} is not a kubeconfig{at}")]
    Malformed { path: String, at: String },
    #[error("the kubeconfig has no current context")]
    NoContext,
    #[error("the kubeconfig names the {kind} {name:?} and does not describe it")]
    Dangling { kind: &'static str, name: String },
    #[error("{what} of {name:?} in the kubeconfig cannot be used: {why}")]
    Unusable { what: &'static str, name: String, why: &'static str },
    #[error("the login program {program:?} of the kubeconfig failed")]
    Exec { program: String, source: ProgramError },
}

/// A way to the cluster.
pub(super) struct Cluster {
    pub server: url::Url,
    /// What the server is called in TLS, where that is not its host.
    pub tls_name: Option<String>,
    pub trust: Trust,
    pub proxy: Option<url::Url>,
    pub proof: Proof,
}

/// Who we are, beside a client certificate.
pub(super) enum Proof {
    Nobody,
    Token(Secret),
    Password(String, Secret),
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct File {
    current_context: String,
    contexts: Option<Vec<Named<ContextEntry>>>,
    clusters: Option<Vec<Named<ClusterEntry>>>,
    users: Option<Vec<Named<UserEntry>>>,
}

/// Entries have a name, and their value under a key of its own.
#[derive(serde::Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    value: T,
}

#[derive(serde::Deserialize)]
struct ContextEntry {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    #[serde(default)]
    certificate_authority: String,
    #[serde(default)]
    certificate_authority_data: String,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    #[serde(default)]
    tls_server_name: String,
    #[serde(default)]
    proxy_url: String,
}

#[derive(serde::Deserialize, Default)]
#[serde(rename_all = "kebab-case", default)]
struct UserEntry {
    token: String,
    #[serde(rename = "tokenFile")]
    token_file: String,
    username: String,
    password: String,
    client_certificate: String,
    client_certificate_data: String,
    client_key: String,
    client_key_data: String,
    exec: Option<Exec>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Exec {
    api_version: String,
    command: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
}

#[derive(serde::Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(serde::Deserialize)]
struct ExecCredential {
    status: Option<ExecStatus>,
}

#[derive(serde::Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ExecStatus {
    token: String,
    client_certificate_data: String,
    client_key_data: String,
}

/// The files to read: `path` if there is one, else `$KUBECONFIG`, else `~/.kube/config`.
pub(super) fn files(path: &str) -> Vec<PathBuf> {
    if !path.is_empty() {
        return vec![path.into()];
    }
    match std::env::var_os("KUBECONFIG").filter(|v| !v.is_empty()) {
        Some(list) => std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty()).collect(),
        None => docker::home().map(|home| home.join(".kube/config")).into_iter().collect(),
    }
}

/// Reads the way to the current cluster.
pub(super) async fn load(files: &[PathBuf]) -> Result<Cluster, KubeconfigError> {
    let mut read: Vec<(PathBuf, File)> = Vec::new();
    for path in files {
        match slurp(path, MAX_FILE) {
            Ok(text) => {
                let malformed = |at| KubeconfigError::Malformed { path: path.display().to_string(), at };
                read.push((path.clone(), crate::keychain::yaml(&text).map_err(malformed)?));
            }
            Err(KubeconfigError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if read.is_empty() {
        let shown: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
        return Err(KubeconfigError::Missing(shown.join(", ")));
    }
    let current = read.iter().map(|(_, file)| file.current_context.as_str()).find(|name| !name.is_empty());
    let current = current.ok_or(KubeconfigError::NoContext)?;
    let (_, context) = find(&read, "context", current, |file| &file.contexts)?;
    let (cluster_file, cluster) = find(&read, "cluster", &context.cluster, |file| &file.clusters)?;
    let mut out = of_cluster(cluster_file, &context.cluster, cluster)?;
    if !context.user.is_empty() {
        let (user_file, user) = find(&read, "user", &context.user, |file| &file.users)?;
        log_in(&mut out, user_file, &context.user, user).await?;
    }
    Ok(out)
}

fn find<'f, T>(
    files: &'f [(PathBuf, File)],
    kind: &'static str,
    name: &str,
    list: fn(&File) -> &Option<Vec<Named<T>>>,
) -> Result<(&'f Path, &'f T), KubeconfigError> {
    let entry = files.iter().find_map(|(path, file)| {
        let named = list(file).iter().flatten().find(|entry| entry.name == name)?;
        Some((path.as_path(), &named.value))
    });
    entry.ok_or_else(|| KubeconfigError::Dangling { kind, name: name.to_owned() })
}

fn of_cluster(file: &Path, name: &str, cluster: &ClusterEntry) -> Result<Cluster, KubeconfigError> {
    let unusable = |what, why| KubeconfigError::Unusable { what, name: name.to_owned(), why };
    let http = |url: &url::Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    let server = url::Url::parse(cluster.server.trim_end_matches('/')).ok().filter(http);
    let server = server.ok_or_else(|| unusable("the server", "it is not a URL"))?;
    let proxy = match cluster.proxy_url.as_str() {
        "" => None,
        text => Some(url::Url::parse(text).map_err(|_| unusable("the proxy-url", "it is not a URL"))?),
    };
    let authority =
        pem(file, &cluster.certificate_authority, &cluster.certificate_authority_data, "certificate-authority", name)?;
    // As client-go: an authority that is named is the only one.
    let system = if authority.is_some() { System::Ignored } else { System::Trusted };
    let verification = match cluster.insecure_skip_tls_verify {
        true => Verification::Skipped,
        false => Verification::Required,
    };
    let trust = Trust { system, authorities: authority.into_iter().collect(), identities: Vec::new(), verification };
    let tls_name = Some(cluster.tls_server_name.clone()).filter(|name| !name.is_empty());
    if let Some(tls_name) = &tls_name {
        if !matches!(url::Host::parse(tls_name), Ok(url::Host::Domain(_))) {
            return Err(unusable("tls-server-name", "it is not a DNS name"));
        }
        if proxy.is_some() {
            return Err(unusable("tls-server-name", "together with a proxy-url it is not supported"));
        }
    }
    Ok(Cluster { server, tls_name, trust, proxy, proof: Proof::Nobody })
}

async fn log_in(out: &mut Cluster, file: &Path, name: &str, user: &UserEntry) -> Result<(), KubeconfigError> {
    let certificate = pem(file, &user.client_certificate, &user.client_certificate_data, "client-certificate", name)?;
    let key = pem(file, &user.client_key, &user.client_key_data, "client-key", name)?;
    out.trust.identities.extend(certificate.zip(key));
    if !user.token_file.is_empty() {
        let text = slurp(&beside(file, &user.token_file), MAX_PART)?;
        let text = std::str::from_utf8(&text).unwrap_or_default().trim();
        out.proof = Proof::Token(Secret::new(text));
    } else if !user.token.is_empty() {
        out.proof = Proof::Token(Secret::new(user.token.as_str()));
    } else if !user.username.is_empty() {
        out.proof = Proof::Password(user.username.clone(), Secret::new(user.password.as_str()));
    } else if let Some(exec) = &user.exec {
        let status = run(exec, file).await?;
        if !status.token.is_empty() {
            out.proof = Proof::Token(Secret::new(status.token));
        }
        if !status.client_certificate_data.is_empty() {
            let part = |text: String| Pem { name: format!("the answer of {}", exec.command), bytes: text.into_bytes() };
            out.trust.identities = vec![(part(status.client_certificate_data), part(status.client_key_data))];
        }
    }
    Ok(())
}

async fn run(exec: &Exec, file: &Path) -> Result<ExecStatus, KubeconfigError> {
    let failed = |source| KubeconfigError::Exec { program: exec.command.clone(), source };
    let info = serde_json::json!({
        "apiVersion": exec.api_version, "kind": "ExecCredential", "spec": { "interactive": false },
    });
    let mut env = vec![("KUBERNETES_EXEC_INFO".to_owned(), info.to_string())];
    env.extend(exec.env.iter().flatten().map(|v| (v.name.clone(), v.value.clone())));
    // A command with a slash is relative to the kubeconfig; one without is looked for in PATH.
    let path = if exec.command.contains('/') { beside(file, &exec.command) } else { PathBuf::from(&exec.command) };
    let args = exec.args.as_deref().unwrap_or_default();
    let output = program::run(&Program { path: &path, args, env: &env, input: b"", limit: EXEC_TIMEOUT }).await;
    let output = output.map_err(failed)?;
    let answer: ExecCredential =
        serde_json::from_slice(output.success().map_err(failed)?).map_err(|_| failed(ProgramError::Answer))?;
    answer.status.ok_or_else(|| failed(ProgramError::Answer))
}

fn beside(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("/")).join(path)
}

/// A certificate or key: in the file itself, or in another.
fn pem(file: &Path, path: &str, data: &str, what: &'static str, name: &str) -> Result<Option<Pem>, KubeconfigError> {
    if !data.is_empty() {
        let decoded = base64::engine::general_purpose::STANDARD.decode(data.trim());
        let why = "it is not base64";
        let bytes = decoded.map_err(|_| KubeconfigError::Unusable { what, name: name.to_owned(), why })?;
        return Ok(Some(Pem { name: format!("{what} of {name:?} in {}", file.display()), bytes }));
    }
    if path.is_empty() {
        return Ok(None);
    }
    let path = beside(file, path);
    let bytes = slurp(&path, MAX_PART)?;
    Ok(Some(Pem { name: path.display().to_string(), bytes }))
}

fn slurp(path: &Path, limit: u64) -> Result<Vec<u8>, KubeconfigError> {
    let unreadable = |source| KubeconfigError::Unreadable { path: path.display().to_string(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    match bytes.len() as u64 > limit {
        true => Err(KubeconfigError::TooLarge { path: path.display().to_string(), limit }),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn the_current_context_leads_to_a_cluster_and_a_login() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("login");
        let script = "#!/bin/sh\necho \"{\\\"status\\\":{\\\"token\\\":\\\"t-$1-$REGION-$(echo $KUBERNETES_EXEC_INFO | tr -d '\\\" ' | cut -c13-20)\\\"}}\"\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("config");
        let text = |user: &str| {
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- {{name: other, context: {{cluster: x, user: x}}}}\n\
                 - name: c\n  context:\n    cluster: k\n    user: u\n    namespace: n\nclusters:\n- name: k\n  cluster:\n    \
                 server: https://10.0.0.1:6443/\n    certificate-authority-data: Zm9v\nusers:\n- name: u\n  user: {user}\npreferences: {{}}\n"
            )
        };
        let load = async |user: &str| {
            std::fs::write(&path, text(user)).unwrap();
            super::load(std::slice::from_ref(&path)).await.map_err(|e| crate::keychain::chain(&e))
        };
        let cluster = load("{token: abc}").await.unwrap();
        assert_eq!(cluster.server.as_str(), "https://10.0.0.1:6443/");
        assert_eq!(
            (cluster.trust.system, cluster.trust.authorities[0].bytes.as_slice()),
            (System::Ignored, &b"foo"[..])
        );
        assert!(matches!(cluster.proof, Proof::Token(t) if t.expose() == "abc"));
        std::fs::write(dir.path().join("t"), "from-file\n").unwrap();
        assert!(matches!(load("{tokenFile: t}").await.unwrap().proof, Proof::Token(t) if t.expose() == "from-file"));
        let exec = "{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./login, args: [eks], env: [{name: REGION, value: r1}]}}";
        let proof = load(exec).await.unwrap().proof;
        assert!(matches!(&proof, Proof::Token(t) if t.expose().starts_with("t-eks-r1-")), "the program was run");
        assert!(load("{exec: {apiVersion: v1, command: ./none}}").await.err().unwrap().contains("\"./none\""));
        std::fs::write(&path, "users: [{name: hunter2, user: {token: [}]").unwrap();
        let error = super::load(std::slice::from_ref(&path)).await.err().unwrap().to_string();
        assert!(error.contains("is not a kubeconfig") && !error.contains("hunter2"), "{error}");
        let none = [dir.path().join("none")];
        assert!(matches!(super::load(&none).await, Err(KubeconfigError::Missing(_))));
        // Several files: the first that knows a name counts.
        std::fs::write(&path, text("{token: abc}")).unwrap();
        let first = dir.path().join("first");
        std::fs::write(&first, "users: [{name: u, user: {token: first}}]").unwrap();
        let both = super::load(&[first, path]).await.unwrap();
        assert!(matches!(both.proof, Proof::Token(t) if t.expose() == "first"));
    }
}
