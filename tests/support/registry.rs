//! Registries: Debian's docker-registry 2.8, distribution v3, and a small one that has the referrers API; and a way to push to them.
//!
//! Pushing is our own, for the tools stumble over SOCI artifacts: a layout's blobs and manifests go up as they are, byte for byte.

use super::command::text;
use super::link::Link;
use super::process::Process;
use super::slot::Root;
use soci::oci::{Descriptor, Digest, Index, Manifest, media_type};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// docker-registry 2.8 from Debian: no referrers API.
    Docker28,
    /// distribution v3.0: no referrers API either.
    Distribution3,
    /// docker-registry 2.8 that lets in `u` with password `p` and nobody else.
    Guarded,
    /// go-containerregistry's, in memory: has the referrers API.
    Referrers,
}

pub struct Registry {
    /// `host:port`, the first part of every image reference.
    pub host: String,
    process: Process,
    /// `user:password@` to push with.
    login: &'static str,
}

impl Registry {
    /// A registry on the loopback, its data below `root`.
    pub fn start(kind: Kind, root: &Root) -> Registry {
        let host = format!("127.0.0.1:{}", free_port());
        let (program, arguments) = command_line(kind, &host, &root.join("registry"));
        let mut command = Command::new(program);
        let mut started = Registry::run(command.args(arguments), host, &root.join("registry.log"));
        if kind == Kind::Guarded {
            started.login = "u:p@";
        }
        started
    }

    /// A registry at the far end of `link`, its data in `storage`, its log below `root`.
    pub fn start_behind(link: &Link, kind: Kind, root: &Root, storage: &Path) -> Registry {
        let host = format!("{}:5000", link.far());
        let (program, arguments) = command_line(kind, &host, storage);
        let mut command = link.inside(program);
        Registry::run(command.args(arguments), host, &root.join("registry.log"))
    }

    fn run(command: &mut Command, host: String, log: &Path) -> Registry {
        // Its chatter about requests is what a failing test wants to see; its tracing has nowhere to go.
        let process = Process::start("registry", command.env("OTEL_TRACES_EXPORTER", "none"), log);
        process.wait_for_tcp(|| TcpStream::connect_timeout(&host.parse().unwrap(), Duration::from_secs(1)).is_ok());
        Registry { host, process, login: "" }
    }

    /// `host:port/name:tag`
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.host)
    }

    /// Pushes the image of an OCI layout (its only one) with everything it refers to, and further roots of the layout (SOCI v1 indexes,
    /// say) by digest. Blobs that are there already are not sent. The digest of what `tag` now names.
    pub fn push(&self, layout: &Path, name: &str, tag: &str) -> Digest {
        let push = Push { base: format!("http://{}{}/v2/{name}", self.login, self.host), layout: layout.into() };
        runtime().block_on(async {
            let index: Index = read_json(&layout.join("index.json"));
            let image = sole_image(&index, layout);
            for root in index.manifests.iter().filter(|m| m.digest != image.digest) {
                push.tree(root).await;
                push.manifest(root, &root.digest.to_string()).await;
            }
            push.tree(&image).await;
            push.manifest(&image, tag).await;
            image.digest
        })
    }

    /// Everything the registry has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    pub fn stop(self) {
        self.process.stop();
    }
}

/// bcrypt of "p", with the least cost.
const HTPASSWD: &str = "u:$2b$05$abcdefghijklmnopqrstuuqwWMzKt5N8p.u2GX5MuH1t19BMWuLOW\n";

/// A port nobody listens on. Somebody else may take it before it is used: rare, and loud.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The image an OCI layout is about: the only top-level entry that is no SOCI index.
pub fn sole_image(index: &Index, layout: &Path) -> Descriptor {
    let images: Vec<&Descriptor> = index.manifests.iter().filter(|m| !is_soci_index(m, layout)).collect();
    match images[..] {
        [image] => image.clone(),
        _ => panic!("{}: {} images, not one", layout.display(), images.len()),
    }
}

fn is_soci_index(descriptor: &Descriptor, layout: &Path) -> bool {
    let soci = [media_type::SOCI_INDEX_V1, media_type::SOCI_INDEX_V2];
    soci.contains(&descriptor.artifact_type.as_str())
        || media_type::is_manifest(&descriptor.media_type)
            && blob_path(layout, &descriptor.digest).exists()
            && soci.contains(&read_json::<Manifest>(&blob_path(layout, &descriptor.digest)).config.media_type.as_str())
}

pub fn blob_path(layout: &Path, digest: &Digest) -> PathBuf {
    layout.join("blobs/sha256").join(digest.hex())
}

pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The manifest of one platform (the machine's) in a layout that holds one image.
pub fn image_manifest(layout: &Path) -> (Digest, Manifest) {
    let index: Index = read_json(&layout.join("index.json"));
    let mut top = sole_image(&index, layout);
    if media_type::is_index(&top.media_type) {
        let inner: Index = read_json(&blob_path(layout, &top.digest));
        let host = soci::oci::Platform::host();
        top = inner
            .manifests
            .into_iter()
            .find(|m| {
                !is_soci_index(m, layout)
                    && m.platform.as_ref().is_none_or(|p| p.architecture == host.architecture && p.os == host.os)
            })
            .unwrap_or_else(|| panic!("{}: no image for this platform", layout.display()));
    }
    (top.digest, read_json(&blob_path(layout, &top.digest)))
}

/// The SOCI index that `soci convert` put into a layout.
pub fn soci_index(layout: &Path) -> Digest {
    let top: Index = read_json(&layout.join("index.json"));
    let inner = |m: &Descriptor| read_json::<Index>(&blob_path(layout, &m.digest)).manifests;
    let nested = top.manifests.iter().filter(|m| media_type::is_index(&m.media_type)).flat_map(inner);
    let mut all = top.manifests.iter().cloned().chain(nested);
    all.find(|m| is_soci_index(m, layout)).expect("a converted layout has a SOCI index").digest
}

/// The runtime behind everything asynchronous in here.
pub fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap())
}

/// An HTTP client that goes where it is told, whatever proxies the environment names. It keeps no connections: the next registry may have
/// the address of the last one, and a connection from before a link was shaped believes it to be fast.
pub fn http() -> &'static reqwest::Client {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    CLIENT.get_or_init(|| reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap())
}

/// Gets `url`; status and body.
pub fn get(url: &str) -> (u16, String) {
    runtime().block_on(async {
        let accept = format!("{}, {}, */*", media_type::OCI_MANIFEST, media_type::OCI_INDEX);
        let response =
            http().get(url).header("accept", accept).send().await.unwrap_or_else(|e| panic!("GET {url}: {e}"));
        (response.status().as_u16(), response.text().await.unwrap_or_default())
    })
}

fn command_line(kind: Kind, host: &str, storage: &Path) -> (PathBuf, Vec<String>) {
    let config = |health: &str| {
        std::fs::create_dir_all(storage).unwrap();
        let path = storage.join(format!("config-{}.yml", host.replace(':', "-")));
        let text = format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: false}}, level: info}}\n\
             storage: {{filesystem: {{rootdirectory: {}, maxthreads: 200}}, delete: {{enabled: true}}{health}}}\nhttp: {{addr: '{host}'}}\n",
            storage.display()
        );
        std::fs::write(&path, text).unwrap();
        vec!["serve".to_string(), path.display().to_string()]
    };
    match kind {
        Kind::Docker28 => ("docker-registry".into(), config("")),
        Kind::Guarded => {
            let arguments = config("");
            let (config, htpasswd) = (&arguments[1], storage.join("htpasswd"));
            std::fs::write(&htpasswd, HTPASSWD).unwrap();
            let auth = format!("auth: {{htpasswd: {{realm: lab, path: {}}}}}\n", htpasswd.display());
            std::fs::write(config, std::fs::read_to_string(config).unwrap() + &auth).unwrap();
            ("docker-registry".into(), arguments)
        }
        // The tag concurrency limit of v3 defaults to the number of cores; the upload purger is of no use in a short life.
        Kind::Distribution3 => (super::tool("registry3"), config(", maintenance: {uploadpurging: {enabled: false}}")),
        Kind::Referrers => (super::tool("referrers"), vec![host.to_string()]),
    }
}

struct Push {
    base: String,
    layout: PathBuf,
}

impl Push {
    /// Everything below `descriptor`, bottom up, so that no manifest ever names what is not there; `descriptor` itself excepted.
    async fn tree(&self, descriptor: &Descriptor) {
        let path = blob_path(&self.layout, &descriptor.digest);
        if media_type::is_index(&descriptor.media_type) {
            let index: Index = read_json(&path);
            for child in &index.manifests {
                // A layout holds what its maker asked for: other platforms may be named without being there.
                if blob_path(&self.layout, &child.digest).exists() {
                    Box::pin(self.tree(child)).await;
                    self.manifest(child, &child.digest.to_string()).await;
                }
            }
        } else {
            let manifest: Manifest = read_json(&path);
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                self.blob(blob).await;
            }
        }
    }

    async fn blob(&self, blob: &Descriptor) {
        let url = format!("{}/blobs/{}", self.base, blob.digest);
        if http().head(&url).send().await.is_ok_and(|r| r.status().is_success()) {
            return;
        }
        let start = format!("{}/blobs/uploads/", self.base);
        let response = http().post(&start).send().await.unwrap_or_else(|e| panic!("POST {start}: {e}"));
        let location = response
            .headers()
            .get("location")
            .map(|l| text(l.as_bytes()))
            .unwrap_or_else(|| panic!("POST {start}: {}", response.status()));
        let mut to = response.url().join(&location).unwrap();
        to.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        if let (true, Ok(base)) = (self.base.contains('@'), reqwest::Url::parse(&self.base)) {
            // Registries name themselves without the login that they were asked with.
            to.set_username(base.username()).and_then(|()| to.set_password(base.password())).unwrap();
        }
        let path = blob_path(&self.layout, &blob.digest);
        let file = tokio::fs::File::open(&path).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let chunks = futures::stream::try_unfold(file, |mut file| async move {
            use tokio::io::AsyncReadExt;
            let mut chunk = Vec::with_capacity(1 << 20);
            let read = (&mut file).take(1 << 20).read_to_end(&mut chunk).await?;
            std::io::Result::Ok((read > 0).then_some((chunk, file)))
        });
        let body = reqwest::Body::wrap_stream(chunks);
        let response = http()
            .put(to)
            .header("content-length", blob.size)
            .header("content-type", "application/octet-stream")
            .body(body)
            .send()
            .await;
        let response = response.unwrap_or_else(|e| panic!("pushing {}: {e}", blob.digest));
        assert!(
            response.status().is_success(),
            "pushing {}: {} {}",
            blob.digest,
            response.status(),
            response.text().await.unwrap_or_default()
        );
    }

    async fn manifest(&self, descriptor: &Descriptor, target: &str) {
        let bytes = std::fs::read(blob_path(&self.layout, &descriptor.digest)).unwrap();
        let url = format!("{}/manifests/{target}", self.base);
        let response = http().put(&url).header("content-type", &descriptor.media_type).body(bytes).send().await;
        let response = response.unwrap_or_else(|e| panic!("PUT {url}: {e}"));
        assert!(
            response.status().is_success(),
            "PUT {url}: {} {}",
            response.status(),
            response.text().await.unwrap_or_default()
        );
    }
}
