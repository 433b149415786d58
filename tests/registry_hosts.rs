//! `hosts.toml`: who is asked for what, and for how long nobody is asked who does not answer.

use crate::{
    fault_registry::{FaultRegistry, Reply, Request, noise},
    registry::{MS, impatient, settings},
};
use soci::{
    oci::{Digest, media_type},
    registry::{HostSettings, HttpSettings, Limit, Registry, Repository},
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

fn write(root: &Path, host: &str, text: &str) {
    let directory = root.join(host);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
}

fn repository(root: &Path, host: &str, settings: HttpSettings) -> Repository {
    let hosts = HostSettings { directories: vec![root.to_owned()], ..HostSettings::default() };
    let registry = Registry::new(settings, hosts, Default::default()).unwrap();
    registry.repository(&format!("{host}/a/b").parse().unwrap()).unwrap()
}

/// Serves one blob, and manifests that are the text of their tag.
fn registry(bytes: &[u8]) -> FaultRegistry {
    let bytes = bytes.to_vec();
    FaultRegistry::start(move |r| answer(r, &bytes))
}

fn answer(request: &Request, bytes: &[u8]) -> Reply {
    let path = request.path.split('?').next().unwrap();
    match path.rsplit('/').next().unwrap() {
        _ if path.contains("/blobs/") => Reply::blob(request, bytes),
        _ if path.contains("/referrers/") => Reply::manifest(media_type::OCI_INDEX, br#"{"manifests":[]}"#),
        tag if path.contains("/manifests/") && !tag.starts_with("sha256") => {
            Reply::manifest(media_type::OCI_MANIFEST, b"{}")
        }
        _ => Reply::new(404),
    }
}

#[tokio::test]
async fn every_kind_of_request_takes_the_configured_way() {
    let bytes = noise(10_000);
    let digest = Digest::of(&bytes);
    let (mirror, origin) = (registry(&bytes), registry(&bytes));
    let root = tempfile::tempdir().unwrap();
    let toml = format!(
        "server = \"http://{}\"\n[host.\"http://{}/proxy/x\"]\ncapabilities = [\"pull\"]\noverride_path = true\n\
         [host.\"http://{}/proxy/x\".header]\nx-team = [\"red\", \"blue\"]\n",
        origin.host(),
        mirror.host(),
        mirror.host()
    );
    write(root.path(), "r.example", &toml);
    let repository = repository(root.path(), "r.example", settings());
    repository.manifest("latest").await.unwrap();
    assert_eq!(
        (mirror.requests().len(), origin.requests().len()),
        (0, 1),
        "who may not resolve is not asked what a tag is"
    );
    repository.blob(digest, 1 << 20).await.unwrap();
    repository.blob_size(digest).await.unwrap();
    let mut body = repository.blob_range(digest, 5..10, &[]).await.unwrap();
    while body.chunk().await.unwrap().is_some() {}
    assert_eq!(origin.requests().len(), 1, "the rest is the mirror's");
    for request in mirror.requests() {
        let expected = format!("/proxy/x/a/b/blobs/{digest}?ns=r.example");
        assert_eq!((request.path, request.headers["x-team"].as_str()), (expected, "blue"));
    }
    repository.referrers(digest, "x/y").await.unwrap();
    assert!(mirror.count("/referrers/") > 0 && origin.count("/referrers/") > 0, "a mirror need not know referrers");
    let _ = repository.manifest(&digest.to_string()).await;
    assert!(mirror.count("/manifests/sha256:") > 0);
    assert!(
        origin.requests().iter().all(|r| r.header("x-team").is_none()),
        "headers are for the host they are written for"
    );
}

#[tokio::test]
async fn headers_and_logins_are_not_sent_where_a_mirror_redirects_to() {
    let bytes = noise(10_000);
    let digest = Digest::of(&bytes);
    let served = bytes.clone();
    let storage = FaultRegistry::start(move |r| Reply::blob(r, &served));
    let place = storage.url("/signed?X-Amz-Signature=s");
    let served = bytes.clone();
    let mirror = FaultRegistry::start(move |r| match r.path.contains("/here/") {
        true => Reply::blob(r, &served),
        false if r.path.contains("relative") => Reply::new(307).header("Location", "../../../here/x"),
        false => Reply::new(307).header("Location", place.clone()),
    });
    let root = tempfile::tempdir().unwrap();
    let toml = format!("[host.\"http://{}\".header]\nauthorization = \"Basic eDp5\"\nx-key = \"k\"", mirror.host());
    write(root.path(), "_default", &toml);
    assert_eq!(repository(root.path(), "r.example", settings()).blob(digest, 1 << 20).await.unwrap(), bytes);
    assert_eq!(mirror.requests()[0].header("authorization"), Some("Basic eDp5"));
    let seen = storage.requests();
    assert!(seen.iter().all(|r| r.header("authorization").is_none() && r.header("x-key").is_none()), "{seen:?}");
    let relative = {
        let hosts = HostSettings { directories: vec![root.path().to_owned()], ..HostSettings::default() };
        let registry = Registry::new(settings(), hosts, Default::default()).unwrap();
        registry.repository(&"r.example/relative".parse().unwrap()).unwrap()
    };
    assert_eq!(relative.blob(digest, 1 << 20).await.unwrap(), bytes);
    let here = mirror.requests().into_iter().find(|r| r.path.contains("/here/")).unwrap();
    assert_eq!(here.header("x-key"), Some("k"), "the same host is the same host");
}

#[tokio::test]
async fn a_dead_mirror_costs_one_time_out_and_is_asked_again_when_it_lives() {
    let bytes = noise(10_000);
    let digest = Digest::of(&bytes);
    let alive = Arc::new(AtomicBool::new(false));
    let (now, served) = (alive.clone(), bytes.clone());
    let mirror = FaultRegistry::start(move |r| match now.load(Ordering::SeqCst) {
        true => answer(r, &served),
        false => Reply::silence(Duration::from_secs(20)),
    });
    let origin = registry(&bytes);
    let root = tempfile::tempdir().unwrap();
    let toml = format!("server = \"http://{}\"\n[host.\"http://{}\"]", origin.host(), mirror.host());
    write(root.path(), "r.example", &toml);
    write(root.path(), "q.example", &toml);
    // The origin may be slow on a busy machine; the mirror says nothing at all.
    let patient = Limit::After(Duration::from_secs(1));
    let repository = repository(root.path(), "r.example", HttpSettings { header_timeout: patient, ..impatient() });
    // The penalty of one second passes several times; nobody waits for the mirror after the first.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        repository.blob(digest, 1 << 20).await.unwrap();
        tokio::time::sleep(50 * MS).await;
    }
    assert_eq!(mirror.count("/blobs/"), 1, "one request, one time-out");
    let probes = mirror.count("/v2/") - mirror.count("/blobs/");
    assert!((1..=4).contains(&probes), "signs of life were asked for {probes} times");
    alive.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(40);
    while mirror.count("/blobs/") < 2 {
        assert!(Instant::now() < deadline, "the mirror lives and is not asked");
        repository.blob(digest, 1 << 20).await.unwrap();
        tokio::time::sleep(50 * MS).await;
    }
}

#[tokio::test]
async fn a_mirror_that_lies_is_found_out_and_the_next_host_is_asked() {
    let bytes = noise(10_000);
    let digest = Digest::of(&bytes);
    let (mirror, origin) = (registry(&noise(9_999)), registry(&bytes));
    let root = tempfile::tempdir().unwrap();
    write(
        root.path(),
        "_default",
        &format!("server = \"http://{}\"\n[host.\"http://{}\"]", origin.host(), mirror.host()),
    );
    let repository = repository(root.path(), "r.example", settings());
    assert_eq!(repository.blob(digest, 1 << 20).await.unwrap(), bytes);
    assert_eq!((mirror.count("/blobs/"), origin.count("/blobs/")), (1, 1));
    // Of a range only the caller knows the digest: it names the host that lied.
    let body = repository.blob_range(digest, 0..10, &[]).await.unwrap();
    let liar = soci::registry::HostId::new(&mirror.url("/v2"));
    let honest = repository.blob_range(digest, 0..10, std::slice::from_ref(&liar)).await.unwrap();
    assert_ne!(honest.host(), liar);
    drop((body, honest));
}

#[tokio::test]
async fn changes_are_in_force_for_repositories_that_are_open() {
    let (one, two) = (registry(b"x"), registry(b"x"));
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "r.example", &format!("server = \"http://{}\"", one.host()));
    let repository = repository(root.path(), "r.example", settings());
    repository.manifest("latest").await.unwrap();
    assert_eq!((one.requests().len(), two.requests().len()), (1, 0));
    write(root.path(), "r.example", &format!("server = \"http://{}\"\n", two.host()));
    tokio::time::sleep(1100 * MS).await;
    repository.manifest("latest").await.unwrap();
    assert_eq!((one.requests().len(), two.requests().len()), (1, 1));
}

#[tokio::test]
async fn where_nobody_may_be_asked_the_error_names_the_capability() {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "r.example", "capabilities = [\"pull\"]");
    let error = repository(root.path(), "r.example", settings()).manifest("latest").await.unwrap_err().to_string();
    assert!(error.contains("no host for images of r.example has the capability \"resolve\""), "{error}");
}
