//! Registries that we did not write: Debian's docker-registry 2.8 and distribution v3, open and guarded, with TLS and with mTLS.

use crate::{
    fault_registry::noise,
    registry::{keychain, settings},
};
use soci::{
    oci::{Descriptor, Digest, Index, media_type},
    registry::{Class, HostSettings, Registry, Repository},
};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// bcrypt of "p", with the least cost.
const HTPASSWD: &str = "u:$2b$05$abcdefghijklmnopqrstuuqwWMzKt5N8p.u2GX5MuH1t19BMWuLOW\n";

/// A running docker-registry. It is gone when dropped.
pub struct Real {
    pub host: String,
    scheme: &'static str,
    /// Certificate and key that the registry wants to see.
    identity: Option<Vec<u8>>,
    child: Child,
    _root: tempfile::TempDir,
}

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Docker28,
    /// What `make setup` builds.
    Distribution3,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Open,
    Guarded,
}

impl Real {
    /// With TLS if there is a directory with `cert.pem` and `key.pem`; for clients of an authority only if it has `client-ca.pem`, and
    /// `client.pem` to push with.
    pub fn start_on(ip: IpAddr, door: Door, tls: Option<&Path>) -> Real {
        Real::run(Program::Docker28, ip, door, tls)
    }

    pub fn run(program: Program, ip: IpAddr, door: Door, tls: Option<&Path>) -> Real {
        let root = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port();
        let host = SocketAddr::new(ip, port).to_string();
        let config = root.path().join("config.yml");
        std::fs::write(&config, configuration(root.path(), &host, door, tls)).unwrap();
        let program = match program {
            Program::Docker28 => "docker-registry".into(),
            Program::Distribution3 => crate::support::tool("registry3"),
        };
        let child = Command::new(program)
            .env("OTEL_TRACES_EXPORTER", "none")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed (make setup)");
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(&host).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let identity = tls.and_then(|tls| std::fs::read(tls.join("client.pem")).ok());
        Real { host, scheme, identity, child, _root: root }
    }

    fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let url = if url.starts_with('/') { format!("{}://{}{url}", self.scheme, self.host) } else { url.to_owned() };
        let mut client = reqwest::Client::builder().no_proxy().danger_accept_invalid_certs(true);
        if let Some(identity) = &self.identity {
            client = client.identity(reqwest::Identity::from_pem(identity).unwrap());
        }
        client.build().unwrap().request(method, url).basic_auth("u", Some("p"))
    }

    pub async fn push_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let begun = self.request(reqwest::Method::POST, "/v2/a/b/blobs/uploads/").send().await.unwrap();
        assert_eq!(begun.status(), 202);
        let place = begun.headers()["location"].to_str().unwrap().to_owned();
        let sep = if place.contains('?') { '&' } else { '?' };
        let put = self.request(reqwest::Method::PUT, &format!("{place}{sep}digest={digest}"));
        let done = put.header("content-type", "application/octet-stream").body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(done.status(), 201);
        digest
    }

    async fn push_manifest(&self, target: &str, media_type: &str, bytes: &[u8]) {
        let put = self.request(reqwest::Method::PUT, &format!("/v2/a/b/manifests/{target}"));
        let done = put.header("content-type", media_type).body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(done.status(), 201, "{}", done.text().await.unwrap());
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn configuration(root: &Path, host: &str, door: Door, tls: Option<&Path>) -> String {
    let storage = root.join("data");
    let mut text = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
        storage.display()
    );
    if let Some(tls) = tls {
        let file = |name| tls.join(name).display().to_string();
        text += &format!("  tls:\n    certificate: {}\n    key: {}\n", file("cert.pem"), file("key.pem"));
        if tls.join("client-ca.pem").exists() {
            text += &format!("    clientcas: [{}]\n", file("client-ca.pem"));
        }
    }
    if door == Door::Guarded {
        let path = root.join("htpasswd");
        std::fs::write(&path, HTPASSWD).unwrap();
        text += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display());
    }
    text
}

/// Pushes an image to `real` and reads it in every way through `repository`.
pub async fn check(real: &Real, repository: &Repository) {
    let layer = noise(1 << 20);
    let digest = real.push_blob(&layer).await;
    let config = real.push_blob(b"{}").await;
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST,
        "config": {"mediaType": media_type::OCI_CONFIG, "digest": config, "size": 2},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": layer.len()}],
    })
    .to_string();
    real.push_manifest("latest", media_type::OCI_MANIFEST, manifest.as_bytes()).await;
    let fetched = repository.manifest("latest").await.unwrap();
    assert_eq!((fetched.bytes, fetched.media_type.as_str()), (manifest.clone().into(), media_type::OCI_MANIFEST));
    assert_eq!(repository.manifest(&fetched.digest.to_string()).await.unwrap().digest, Digest::of(manifest.as_bytes()));
    assert_eq!(repository.blob(digest, 1 << 20).await.unwrap(), layer);
    assert_eq!(repository.blob_size(digest).await.unwrap(), 1 << 20);
    let ranges = [0..1u64, 0..1 << 20, 77..100_000, (1 << 20) - 1..1 << 20];
    let reads = ranges.into_iter().map(|range| {
        let expected = layer[range.start as usize..range.end as usize].to_vec();
        async move {
            let mut body = repository.blob_range(digest, range, &[]).await.unwrap();
            let mut got = Vec::new();
            while let Some(chunk) = body.chunk().await.unwrap() {
                got.extend_from_slice(&chunk);
            }
            assert_eq!((got == expected, body.total()), (true, Some(1 << 20)));
        }
    });
    futures::future::join_all(reads).await;
    assert_eq!(repository.blob(Digest::of(b"none"), 9).await.unwrap_err().class(), Class::NotFound);
    assert_eq!(repository.manifest("none").await.unwrap_err().class(), Class::NotFound);

    assert_eq!(repository.referrers(fetched.digest, media_type::SOCI_INDEX_V1).await.unwrap(), []);
    let mut entry = Descriptor::of(media_type::OCI_MANIFEST, manifest.as_bytes());
    entry.artifact_type = media_type::SOCI_INDEX_V1.into();
    let index = Index {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.into(),
        artifact_type: String::new(),
        manifests: vec![entry.clone()],
        subject: None,
        annotations: Default::default(),
    };
    let tag = format!("sha256-{}", fetched.digest.hex());
    real.push_manifest(&tag, media_type::OCI_INDEX, &index.to_canonical_json()).await;
    assert_eq!(repository.referrers(fetched.digest, media_type::SOCI_INDEX_V1).await.unwrap(), [entry]);
}

#[tokio::test]
async fn registries_give_what_was_pushed() {
    for program in [Program::Docker28, Program::Distribution3] {
        let real = Real::run(program, IpAddr::V4(Ipv4Addr::LOCALHOST), Door::Open, None);
        given_what_was_pushed(&real).await;
    }
}

async fn given_what_was_pushed(real: &Real) {
    let registry = Registry::new(settings(), HostSettings::default(), Default::default()).unwrap();
    let repository = registry.repository(&format!("{}/a/b", real.host).parse().unwrap()).unwrap();
    check(real, &repository).await;
}

#[tokio::test]
async fn registries_give_it_to_those_who_are_known() {
    for program in [Program::Docker28, Program::Distribution3] {
        given_to_those_who_are_known(&Real::run(program, IpAddr::V4(Ipv4Addr::LOCALHOST), Door::Guarded, None)).await;
    }
}

async fn given_to_those_who_are_known(real: &Real) {
    let reference = format!("{}/a/b", real.host).parse().unwrap();
    let registry = |keychain| Registry::new(settings(), HostSettings::default(), keychain).unwrap();
    let (known, _dir) = keychain(&[(&real.host, "u:p")]);
    check(real, &registry(known).repository(&reference).unwrap()).await;
    let (wrong, _dir) = keychain(&[(&real.host, "u:q")]);
    for keychain in [wrong, Default::default()] {
        let error = registry(keychain).repository(&reference).unwrap().manifest("latest").await.unwrap_err();
        assert_eq!(error.class(), Class::Unauthorized);
    }
}
