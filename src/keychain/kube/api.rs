//! Listing and watching secrets: what is read of the API server's answers, bounded.

use super::config::{Cluster, Proof};
use crate::{
    keychain::{Secret, docker::Logins},
    tls::{self, Protocols, SystemRoots},
};
use base64::Engine;
use bytes::BytesMut;
use http::header;
use std::time::Duration;
use zeroize::Zeroizing;

/// The type of secrets that hold docker's configuration.
pub(super) const TYPE: &str = "kubernetes.io/dockerconfigjson";
/// The key in them.
const KEY: &str = ".dockerconfigjson";
/// Secrets in one page. A secret has at most 1 MiB, so a page has at most some 70 MiB of base64; real ones have 20 kB.
const PAGE: u32 = 50;
/// Largest page and largest event read.
const MAX_BODY: usize = 80 << 20;
const MAX_EVENT: usize = 4 << 20;
/// To connect, and for the headers of an answer.
const ANSWER: Duration = Duration::from_secs(15);
/// The server ends a watch after this; then another one begins.
const WATCH: Duration = Duration::from_secs(300);

/// Why the cluster does not tell. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("the connection cannot be set up: {0}")]
    Setup(String),
    #[error("{server}: {what}")]
    Lost { server: String, what: String },
    #[error("{server} answers {status}{hint}")]
    Status { server: String, status: u16, hint: &'static str },
    #[error("{server} sends what cannot be understood")]
    Malformed { server: String },
    /// What was listed is too old to be watched from: list again.
    #[error("the list is too old")]
    Gone,
}

/// One secret, by namespace and name.
pub(super) type Name = (String, String);

/// What a watch tells.
pub(super) enum Event {
    Set(Name, Logins),
    Removed(Name),
}

#[derive(serde::Deserialize)]
struct List {
    metadata: ListMeta,
    #[serde(default)]
    items: Option<Vec<Object>>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    r#continue: String,
}

#[derive(serde::Deserialize)]
struct Object {
    #[serde(default)]
    metadata: Meta,
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    data: Option<std::collections::HashMap<String, Secret>>,
    /// Of an error.
    #[serde(default)]
    code: u16,
}

#[derive(serde::Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    namespace: String,
    name: String,
    resource_version: String,
}

#[derive(serde::Deserialize)]
struct WatchEvent {
    r#type: String,
    object: Object,
}

/// A connection to the API server.
pub(super) struct Api {
    client: reqwest::Client,
    cluster: Cluster,
    /// Where requests go: to the server, under the name that it has in TLS.
    base: url::Url,
}

/// Finds the server under another name.
struct Elsewhere(String);

impl reqwest::dns::Resolve for Elsewhere {
    fn resolve(&self, _: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let host = self.0.clone();
        Box::pin(async move {
            // The port is that of the URL.
            let found: Vec<_> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// A list, and from where on to watch.
pub(super) struct Listed {
    pub secrets: Vec<(Name, Logins)>,
    pub version: String,
}

impl Api {
    pub fn new(cluster: Cluster) -> Result<Api, ApiError> {
        let setup = |e: &dyn std::error::Error| ApiError::Setup(crate::keychain::chain(e));
        let roots = SystemRoots::load();
        let config = tls::client(&cluster.trust, &roots, Protocols::Http2Or1).map_err(|e| setup(&e))?;
        let mut builder = reqwest::Client::builder()
            .use_preconfigured_tls(config)
            // A token is for this server.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("soci-snapshotter/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(ANSWER);
        if let Some(proxy) = &cluster.proxy {
            builder = builder.proxy(reqwest::Proxy::all(proxy.clone()).map_err(|e| setup(&e))?);
        }
        let mut base = cluster.server.clone();
        if let Some(name) = &cluster.tls_name {
            let host = match cluster.server.host() {
                Some(url::Host::Ipv6(ip)) => ip.to_string(),
                other => other.map(|host| host.to_string()).unwrap_or_default(),
            };
            base.set_host(Some(name)).map_err(|e| setup(&e))?;
            // A proxy would be asked for a host of that name.
            builder = builder.dns_resolver(std::sync::Arc::new(Elsewhere(host))).no_proxy();
        }
        Ok(Api { client: builder.build().map_err(|e| setup(&e))?, cluster, base })
    }

    fn server(&self) -> String {
        self.cluster.server.origin().ascii_serialization()
    }

    fn malformed(&self) -> ApiError {
        ApiError::Malformed { server: self.server() }
    }

    fn lost(&self, error: &reqwest::Error) -> ApiError {
        let what = match tls::refusal(error) {
            Some(tls::Failed::Refused(refusal)) => {
                format!("it is not trusted: {refusal}; correct certificate-authority of the kubeconfig")
            }
            Some(tls::Failed::WantsCertificate) => "it does not accept the client certificate of the kubeconfig".into(),
            Some(tls::Failed::NotTls) => "it does not speak TLS".into(),
            None => {
                std::error::Error::source(error).map_or_else(|| "the connection is lost".into(), crate::keychain::chain)
            }
        };
        ApiError::Lost { server: self.server(), what }
    }

    async fn get(&self, query: &[(&str, &str)]) -> Result<reqwest::Response, ApiError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/api/v1/secrets", url.path().trim_end_matches('/')));
        url.query_pairs_mut().append_pair("fieldSelector", &format!("type={TYPE}")).extend_pairs(query);
        let mut request = self.client.get(url).header(header::ACCEPT, "application/json");
        request = match &self.cluster.proof {
            Proof::Nobody => request,
            Proof::Token(token) => request.bearer_auth(token.expose()),
            Proof::Password(user, password) => request.basic_auth(user, Some(password.expose())),
        };
        let sent = tokio::time::timeout(ANSWER, request.send()).await;
        let lost = |what: &str| ApiError::Lost { server: self.server(), what: what.into() };
        let response = sent.map_err(|_| lost("no answer in time"))?.map_err(|e| self.lost(&e))?;
        match response.status().as_u16() {
            200 => Ok(response),
            410 => Err(ApiError::Gone),
            status => {
                let hint = match status {
                    401 => ": the login of the kubeconfig is not accepted",
                    403 => {
                        ": that user may not list and watch secrets of all namespaces; grant it get, list and watch on secrets"
                    }
                    _ => "",
                };
                Err(ApiError::Status { server: self.server(), status, hint })
            }
        }
    }

    /// The next page of secrets, `max` of them at most; empty `next` for the first.
    pub async fn list(&self, max: usize) -> Result<Listed, ApiError> {
        let mut out = Listed { secrets: Vec::new(), version: String::new() };
        let (limit, mut next) = (PAGE.to_string(), String::new());
        loop {
            let mut query = vec![("limit", limit.as_str())];
            if !next.is_empty() {
                query.push(("continue", &next));
            }
            let mut response = self.get(&query).await?;
            let mut body = Zeroizing::new(Vec::new());
            loop {
                let chunk = tokio::time::timeout(ANSWER, response.chunk()).await;
                let Some(chunk) = chunk.map_err(|_| self.malformed())?.map_err(|e| self.lost(&e))? else { break };
                if body.len() + chunk.len() > MAX_BODY {
                    return Err(self.malformed());
                }
                body.extend_from_slice(&chunk);
            }
            let page: List = serde_json::from_slice(&body).map_err(|_| self.malformed())?;
            for object in page.items.unwrap_or_default() {
                // Items of a list do not repeat their type's name, but a secret always has its own.
                if let Some(Event::Set(name, logins)) = change("ADDED", object) {
                    out.secrets.push((name, logins));
                }
            }
            out.version = page.metadata.resource_version;
            next = page.metadata.r#continue;
            if next.is_empty() || out.secrets.len() >= max {
                out.secrets.truncate(max);
                return Ok(out);
            }
        }
    }

    /// Watches from `version` on, until the connection ends or something is wrong; `version` is where the next watch begins.
    pub async fn watch(&self, version: &mut String, mut tell: impl FnMut(Event)) -> Result<(), ApiError> {
        let seconds = WATCH.as_secs().to_string();
        let query = [
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", seconds.as_str()),
            ("resourceVersion", version.as_str()),
        ];
        let mut response = self.get(&query).await?;
        let mut buffer = BytesMut::new();
        loop {
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line = buffer.split_to(end + 1);
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let event: WatchEvent = serde_json::from_slice(&line).map_err(|_| self.malformed())?;
                if event.r#type == "ERROR" {
                    return Err(match event.object.code {
                        410 => ApiError::Gone,
                        status => ApiError::Status { server: self.server(), status, hint: "" },
                    });
                }
                if !event.object.metadata.resource_version.is_empty() {
                    version.clone_from(&event.object.metadata.resource_version);
                }
                if let Some(event) = change(&event.r#type, event.object) {
                    tell(event);
                }
            }
            if buffer.len() > MAX_EVENT {
                return Err(self.malformed());
            }
            // A watch whose end is not told of has been lost on the way.
            let chunk = tokio::time::timeout(WATCH + ANSWER, response.chunk()).await;
            let lost = ApiError::Lost { server: self.server(), what: "the watch has fallen silent".into() };
            match chunk.map_err(|_| lost)?.map_err(|e| self.lost(&e))? {
                Some(chunk) => buffer.extend_from_slice(&chunk),
                None => return Ok(()),
            }
        }
    }
}

/// What an event means for us. A secret that changed its type, or cannot be understood any more, is one that is gone.
fn change(kind: &str, object: Object) -> Option<Event> {
    let name = (object.metadata.namespace, object.metadata.name);
    match kind {
        "ADDED" | "MODIFIED" => {
            let logins = (object.r#type == TYPE)
                .then(|| object.data.as_ref()?.get(KEY).and_then(|text| logins(text.expose())))
                .flatten();
            if logins.is_none() {
                tracing::debug!(
                    namespace = name.0,
                    secret = name.1,
                    "this secret holds no docker configuration that can be understood"
                );
            }
            Some(logins.map_or_else(|| Event::Removed(name.clone()), |logins| Event::Set(name.clone(), logins)))
        }
        "DELETED" => Some(Event::Removed(name)),
        _ => None,
    }
}

fn logins(text: &str) -> Option<Logins> {
    let bytes = Zeroizing::new(base64::engine::general_purpose::STANDARD.decode(text).ok()?);
    Logins::parse(&bytes).ok()
}
