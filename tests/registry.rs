//! Registries as they are: slow, broken, lying, guarded; and one real one.

use crate::fault_registry::{FaultRegistry, Reply, Request, noise};
use bytes::Bytes;
use soci::{
    keychain::{DockerConfig, Keychain},
    oci::{Digest, media_type},
    registry::{
        Class, HostId, HostSettings, HttpSettings, Limit, Mirror, RangeBody, Registry, RegistryError, Repository,
        RetrySettings,
    },
};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

pub const MS: Duration = Duration::from_millis(1);

/// Three quick retries; patient with a machine that is busy with other tests.
pub fn settings() -> HttpSettings {
    let retry = RetrySettings { max_retries: 3, min_wait: MS, max_wait: 20 * MS };
    HttpSettings { idle_timeout: 500 * MS, retry, blob_retry: retry, ..HttpSettings::default() }
}

/// For tests in which nobody answers.
pub fn impatient() -> HttpSettings {
    HttpSettings { dial_timeout: 200 * MS, header_timeout: Limit::After(200 * MS), ..settings() }
}

pub fn keychain(entries: &[(&str, &str)]) -> (Arc<Keychain>, tempfile::TempDir) {
    use base64::Engine;
    let dir = tempfile::tempdir().unwrap();
    let auths: HashMap<_, _> = entries
        .iter()
        .map(|(host, login)| {
            (*host, serde_json::json!({ "auth": base64::engine::general_purpose::STANDARD.encode(login) }))
        })
        .collect();
    let path = dir.path().join("config.json");
    std::fs::write(&path, serde_json::json!({ "auths": auths }).to_string()).unwrap();
    (Arc::new(Keychain::new(vec![Arc::new(DockerConfig::new(path))])), dir)
}

fn repository(server: &FaultRegistry) -> Repository {
    with_mirrors(server, &[])
}

fn with_mirrors(origin: &FaultRegistry, mirrors: &[&FaultRegistry]) -> Repository {
    with_settings(origin, mirrors, settings())
}

fn with_settings(origin: &FaultRegistry, mirrors: &[&FaultRegistry], settings: HttpSettings) -> Repository {
    let mirrors = mirrors.iter().map(|m| Mirror { host: m.host(), ..Mirror::default() }).collect();
    let hosts = HostSettings { mirrors: HashMap::from([(origin.host(), mirrors)]), ..HostSettings::default() };
    let registry = Registry::new(settings, hosts, Arc::default()).unwrap();
    registry.repository(&format!("{}/a/b", origin.host()).parse().unwrap()).unwrap()
}

pub fn with_login(server: &FaultRegistry, keychain: Arc<Keychain>) -> Repository {
    let registry = Registry::new(settings(), HostSettings::default(), keychain).unwrap();
    registry.repository(&format!("{}/a/b", server.host()).parse().unwrap()).unwrap()
}

async fn all(body: &mut RangeBody) -> Result<Vec<u8>, RegistryError> {
    let mut out = Vec::new();
    while let Some(chunk) = body.chunk().await? {
        out.extend_from_slice(&chunk);
    }
    Ok(out)
}

async fn range(repository: &Repository, digest: Digest, range: std::ops::Range<u64>) -> Result<Vec<u8>, RegistryError> {
    all(&mut repository.blob_range(digest, range, &[]).await?).await
}

/// A script that gives `first` to the first `n` requests and `then` to the others.
fn at_first(
    n: usize,
    first: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    then: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> impl Fn(&Request) -> Reply + Send + Sync {
    move |r| if r.number < n { first(r) } else { then(r) }
}

fn blob() -> (Digest, Vec<u8>) {
    let bytes = noise(100_000);
    (Digest::of(&bytes), bytes)
}

#[tokio::test]
async fn trouble_of_the_registry_is_waited_out() {
    let (digest, bytes) = blob();
    for trouble in
        [Reply::new(503), Reply::new(500), Reply::new(429), Reply::reset(), Reply::silence(Duration::from_secs(5))]
    {
        let served = bytes.clone();
        let server = FaultRegistry::start(at_first(2, move |_| trouble.clone(), move |r| Reply::blob(r, &served)));
        let repository = with_settings(&server, &[], impatient());
        assert_eq!(range(&repository, digest, 10..20).await.unwrap(), bytes[10..20]);
        assert_eq!(server.requests().len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sick_registry_is_not_stormed_however_many_wait_for_it_and_found_well_again_soon() {
    let (digest, bytes) = blob();
    let (sick, served) = (Arc::new(std::sync::atomic::AtomicBool::new(true)), bytes.clone());
    let is_sick = sick.clone();
    let server = FaultRegistry::start(move |r| match is_sick.load(Ordering::SeqCst) {
        true => Reply::new(503),
        false => Reply::blob(r, &served),
    });
    let retry = RetrySettings { max_retries: 1000, min_wait: 30 * MS, max_wait: 300_000 * MS };
    let repository = with_settings(&server, &[], HttpSettings { blob_retry: retry, ..settings() });
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let repository = repository.clone();
            tokio::spawn(async move { range(&repository, digest, 10..20).await })
        })
        .collect();
    tokio::time::sleep(1000 * MS).await;
    let at_first = server.requests().len();
    tokio::time::sleep(4000 * MS).await;
    let later = server.requests().len() - at_first;
    assert!(at_first <= 110, "{at_first} requests in the first second: one of each reader, and some to see");
    assert!((1..=8).contains(&later), "{later} requests in 4 s to a registry that answers 503");
    sick.store(false, Ordering::SeqCst);
    let healed = Instant::now();
    for reader in readers {
        assert_eq!(reader.await.unwrap().unwrap(), bytes[10..20]);
    }
    assert!(healed.elapsed() < Duration::from_secs(15), "{:?}", healed.elapsed());
}

#[tokio::test]
async fn when_trouble_does_not_end_the_caller_is_told_that_it_may_ask_again() {
    let server = FaultRegistry::start(|_| Reply::new(502));
    let error = repository(&server).manifest("latest").await.unwrap_err();
    assert!(matches!(error.class(), Class::Retry(_)), "{error:?}");
    let url = server.url("/v2/a/b/manifests/latest");
    let expected = format!("GET \"{url}\": giving up request after 4 attempt(s): 502 Bad Gateway");
    assert_eq!(error.to_string(), expected);
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn a_no_is_not_asked_again() {
    for (status, class) in [
        (404, Class::NotFound),
        (403, Class::Unauthorized),
        (401, Class::Unauthorized),
        (501, Class::Permanent),
        (418, Class::Permanent),
    ] {
        let server = FaultRegistry::start(move |_| Reply::new(status));
        let error = repository(&server).manifest("latest").await.unwrap_err();
        assert_eq!(error.class(), class, "{error:?}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn retry_after_may_be_nothing_and_is_never_longer_than_the_longest_wait() {
    for asked in ["0", "Sun, 06 Nov 1994 08:49:37 GMT", "100000"] {
        let server = FaultRegistry::start(at_first(
            2,
            move |_| Reply::new(503).header("Retry-After", asked),
            |_| Reply::manifest(media_type::OCI_MANIFEST, b"{}"),
        ));
        let started = Instant::now();
        assert_eq!(repository(&server).manifest("latest").await.unwrap().bytes, "{}");
        assert!(started.elapsed() < Duration::from_secs(1), "{asked}");
    }
}

#[tokio::test]
async fn manifests_that_arrive_broken_are_fetched_again() {
    let body = noise(5000);
    let digest = Digest::of(&body);
    let whole = move |_: &Request| Reply::manifest(media_type::OCI_INDEX, &noise(5000));
    let broken: [fn(&Request) -> Reply; 4] = [
        |_| Reply::new(200).body(noise(5000)).truncated(100),
        |_| Reply::new(200).body(noise(5000)).reset_after(100),
        |_| Reply::new(200).body(noise(5000)).stalled(100, Duration::from_secs(5)),
        |_| Reply::new(200).body(noise(4999)),
    ];
    for first in broken {
        let server = FaultRegistry::start(at_first(1, first, whole));
        let fetched = repository(&server).manifest(&digest.to_string()).await.unwrap();
        assert_eq!((fetched.bytes, fetched.digest), (Bytes::from(body.clone()), digest));
        assert_eq!(fetched.media_type, media_type::OCI_INDEX);
    }
}

#[tokio::test]
async fn bytes_that_stay_wrong_never_come_out() {
    let server = FaultRegistry::start(|r| match r.path.contains("blobs") {
        true => Reply::blob(r, b"wrong"),
        false => Reply::manifest(media_type::OCI_MANIFEST, b"wrong")
            .header("Docker-Content-Digest", Digest::of(b"r").to_string()),
    });
    let repository = repository(&server);
    let digest = Digest::of(b"right");
    assert_eq!(repository.manifest(&digest.to_string()).await.unwrap_err().class(), Class::Mismatch);
    assert_eq!(repository.manifest("tag").await.unwrap_err().class(), Class::Mismatch);
    assert_eq!(repository.blob(digest, 100).await.unwrap_err().class(), Class::Mismatch);
    assert_eq!(server.requests().len(), 6, "each once more, in case it was the network");
}

#[tokio::test]
async fn nothing_larger_than_allowed_is_read() {
    let huge = |r: &Request| {
        let reply = Reply::new(200).body(vec![b' '; 5 << 20]);
        if r.path.ends_with("chunked") { reply.chunked() } else { reply }
    };
    let server = FaultRegistry::start(huge);
    let repository = repository(&server);
    for tag in ["stated", "chunked"] {
        let error = repository.manifest(tag).await.unwrap_err();
        assert!(matches!(error, RegistryError::TooLarge { limit: 4_194_304, .. }), "{error:?}");
    }
    assert!(matches!(repository.blob(Digest::of(b""), 1000).await, Err(RegistryError::TooLarge { .. })));
}

#[tokio::test]
async fn a_range_comes_out_whole_or_as_an_error() {
    let (digest, bytes) = blob();
    let served = bytes.clone();
    let server = FaultRegistry::start(move |r| {
        let reply = Reply::blob(r, &served);
        match r.range() {
            Some((1, _)) => reply.truncated(50),
            Some((2, _)) => reply.reset_after(50),
            Some((3, _)) => reply.stalled(50, Duration::from_secs(5)),
            _ => reply,
        }
    });
    let repository = repository(&server);
    assert_eq!(range(&repository, digest, 0..100_000).await.unwrap(), bytes);
    assert_eq!(range(&repository, digest, 99_999..100_000).await.unwrap(), bytes[99_999..]);
    assert!(range(&repository, digest, 7..7).await.unwrap().is_empty());
    for start in 1..=3 {
        let mut body = repository.blob_range(digest, start..1000, &[]).await.unwrap();
        let error = all(&mut body).await.unwrap_err();
        assert!(matches!(error.class(), Class::Retry(_)), "{error:?}");
        assert!(body.chunk().await.unwrap().is_none(), "nothing after an error");
    }
    assert_eq!(repository.blob_size(digest).await.unwrap(), 100_000);
}

#[tokio::test]
async fn a_registry_without_ranges_is_put_up_with_at_the_start_of_a_blob_only() {
    let (digest, bytes) = blob();
    let served = bytes.clone();
    let server = FaultRegistry::start(move |_| Reply::new(200).body(served.clone()));
    let repository = repository(&server);
    assert_eq!(range(&repository, digest, 0..1000).await.unwrap(), bytes[..1000]);
    assert_eq!(range(&repository, digest, 0..100_000).await.unwrap(), bytes);
    let error = range(&repository, digest, 1000..2000).await.unwrap_err();
    assert_eq!(error.class(), Class::RangesUnsupported);
    assert_eq!(repository.blob_size(digest).await.unwrap(), 100_000);
    assert!(matches!(range(&repository, digest, 0..100_001).await.unwrap_err().class(), Class::Retry(_)), "too short");
}

#[tokio::test]
async fn a_range_that_was_not_asked_for_is_refused() {
    let (digest, bytes) = blob();
    let lies: [fn(Reply) -> Reply; 5] = [
        |r| r.header("Content-Range", "bytes 11-20/100000"),
        |r| r.header("Content-Range", "bytes 10-18/100000"),
        |r| r.header("Content-Range", "nonsense"),
        |r| r,
        |r| r.header("Content-Range", "bytes 10-19/100000").header("Content-Encoding", "gzip"),
    ];
    for lie in lies {
        let served = bytes[10..20].to_vec();
        let server = FaultRegistry::start(move |_| lie(Reply::new(206).body(served.clone())));
        let error = range(&repository(&server), digest, 10..20).await.unwrap_err();
        assert!(matches!(error, RegistryError::Malformed { .. }), "{error:?}");
    }
    let too_long =
        |_: &Request| Reply::new(206).header("Content-Range", "bytes 10-19/100000").body(noise(11)).chunked();
    let server = FaultRegistry::start(too_long);
    assert!(matches!(range(&repository(&server), digest, 10..20).await, Err(RegistryError::Malformed { .. })));
}

#[tokio::test]
async fn a_reader_who_pauses_is_not_cut_off() {
    let bytes = noise(8 << 20);
    let digest = Digest::of(&bytes);
    let served = bytes.clone();
    let server = FaultRegistry::start(move |r| Reply::blob(r, &served));
    let short = HttpSettings { blob_timeout: Limit::After(Duration::from_secs(1)), ..settings() };
    let repository = with_settings(&server, &[], short);
    let mut body = repository.blob_range(digest, 0..bytes.len() as u64, &[]).await.unwrap();
    let mut got = body.chunk().await.unwrap().unwrap().to_vec();
    tokio::time::sleep(1100 * MS).await;
    got.extend(all(&mut body).await.unwrap());
    assert_eq!(Digest::of(&got), digest);
}

#[tokio::test]
async fn blobs_are_asked_for_as_they_are_and_connections_are_used_again() {
    let (digest, bytes) = blob();
    let server = FaultRegistry::start(move |r| Reply::blob(r, &bytes));
    let repository = repository(&server);
    for at in 0..10 {
        range(&repository, digest, at..at + 1000).await.unwrap();
    }
    let requests = server.requests();
    assert!(requests.iter().all(|r| r.connection == 0), "one connection is enough for one after the other");
    assert_eq!(requests[0].header("accept-encoding"), Some("identity"));
    assert_eq!(requests[0].header("user-agent"), Some(concat!("soci-snapshotter/", env!("CARGO_PKG_VERSION"))));
    repository.warm(digest, 4).await;
    let connections: std::collections::HashSet<_> = server.requests().iter().map(|r| r.connection).collect();
    assert!((2..=4).contains(&connections.len()), "{connections:?}");
}

fn storage(bytes: Vec<u8>) -> FaultRegistry {
    FaultRegistry::start(move |r| match r.path.contains("sig=old") && r.number > 1 {
        true => Reply::new(403),
        false => Reply::blob(r, &bytes),
    })
}

#[tokio::test]
async fn redirects_are_remembered_until_they_expire_and_see_no_login() {
    let (digest, bytes) = blob();
    let storage = storage(bytes.clone());
    let place = storage.url("/x");
    let served = AtomicUsize::new(0);
    let server = FaultRegistry::start(move |r| {
        if r.header("authorization") != Some("Basic dTpw") {
            return Reply::new(401).header("WWW-Authenticate", "Basic realm=\"r\"");
        }
        let signature = if served.fetch_add(1, Ordering::SeqCst) == 0 { "old" } else { "new" };
        Reply::new(307).header("Location", format!("{place}?sig={signature}"))
    });
    let (keychain, _dir) = keychain(&[(&server.host(), "u:p")]);
    let repository = with_login(&server, keychain);
    for _ in 0..2 {
        assert_eq!(range(&repository, digest, 0..10).await.unwrap(), bytes[..10]);
    }
    assert_eq!((server.requests().len(), storage.requests().len()), (2, 2), "the second went straight to storage");
    assert_eq!(range(&repository, digest, 0..10).await.unwrap(), bytes[..10]);
    assert_eq!((server.requests().len(), storage.count("old"), storage.count("new")), (3, 3, 1));
    for request in storage.requests() {
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.header("referer"), Some(server.url(&format!("/v2/a/b/blobs/{digest}")).as_str()));
    }
}

#[tokio::test]
async fn a_stranger_does_not_lead_us_back_with_our_login() {
    let (digest, _) = blob();
    let back = Arc::new(std::sync::OnceLock::<String>::new());
    let target = back.clone();
    let stranger = FaultRegistry::start(move |_| Reply::new(302).header("Location", target.get().unwrap().clone()));
    let elsewhere = stranger.url("/away");
    let server = FaultRegistry::start(move |r| match (r.path.as_str(), r.header("authorization")) {
        ("/steal", login) => Reply::new(if login.is_some() { 200 } else { 403 }),
        (_, None) => Reply::new(401).header("WWW-Authenticate", "Basic"),
        _ => Reply::new(307).header("Location", elsewhere.clone()),
    });
    back.set(server.url("/steal")).unwrap();
    let (keychain, _dir) = keychain(&[(&server.host(), "u:p")]);
    let error = range(&with_login(&server, keychain), digest, 0..10).await.unwrap_err();
    assert_eq!(error.class(), Class::Unauthorized);
}

#[tokio::test]
async fn redirects_without_end_or_to_nowhere_are_errors() {
    let (digest, _) = blob();
    for location in ["again", "ftp://h/x", "http://", ""] {
        let server = FaultRegistry::start(move |_| Reply::new(302).header("Location", location));
        assert!(
            matches!(range(&repository(&server), digest, 0..10).await, Err(RegistryError::Malformed { .. })),
            "{location}"
        );
        assert!(server.requests().len() <= 22, "two passes of at most eleven");
    }
}

#[tokio::test]
async fn signatures_do_not_show_in_errors() {
    let (digest, _) = blob();
    let storage = FaultRegistry::start(|_| Reply::new(403).body("hunter2"));
    let place = storage.url("/x?X-Sig=hunter2");
    let server = FaultRegistry::start(move |_| Reply::new(307).header("Location", place.clone()));
    let error = range(&repository(&server), digest, 0..10).await.unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("hunter2") && shown.contains(&format!("redirected to {}", storage.host())), "{shown}");
}

#[tokio::test]
async fn mirrors_are_asked_in_order_for_everything_and_the_registry_last() {
    let (digest, bytes) = blob();
    let first = FaultRegistry::start(|_| Reply::new(404));
    let served = bytes.clone();
    let second = FaultRegistry::start(move |r| Reply::blob(r, &served));
    let origin = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_MANIFEST, b"{}"));
    let repository = with_mirrors(&origin, &[&first, &second]);
    assert_eq!(range(&repository, digest, 0..10).await.unwrap(), bytes[..10]);
    assert_eq!((first.requests().len(), second.requests().len(), origin.requests().len()), (1, 1, 0));
    assert!(first.requests()[0].path.contains("ns="), "mirrors are told for which registry they stand");
    let body = repository.blob_range(digest, 0..10, &[]).await.unwrap();
    assert_eq!(body.host().to_string(), second.url("/v2"));
    // The second mirror served bad bytes.
    let body = repository.blob_range(digest, 0..2, &[body.host()]).await.unwrap();
    assert_eq!(body.host().to_string(), origin.url("/v2"));
}

#[tokio::test]
async fn a_dead_mirror_costs_one_time_out_and_is_asked_again_when_it_lives() {
    let (digest, bytes) = blob();
    let alive = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (works, served) = (alive.clone(), bytes.clone());
    let mirror = FaultRegistry::start(move |r| match works.load(Ordering::SeqCst) {
        true => Reply::blob(r, &served),
        false => Reply::silence(Duration::from_secs(5)),
    });
    let served = bytes.clone();
    let origin = FaultRegistry::start(move |r| Reply::blob(r, &served));
    let repository = with_settings(&origin, &[&mirror], impatient());
    let started = Instant::now();
    for _ in 0..5 {
        assert_eq!(range(&repository, digest, 0..10).await.unwrap(), bytes[..10]);
    }
    assert!(started.elapsed() < 800 * MS, "{:?}", started.elapsed());
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 5));
    alive.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(20);
    while mirror.count("/blobs/") < 2 {
        assert!(Instant::now() < deadline, "the mirror is back and not asked");
        tokio::time::sleep(50 * MS).await;
        range(&repository, digest, 0..10).await.unwrap();
    }
}

#[tokio::test]
async fn a_mirror_that_lies_is_passed_over() {
    let (digest, bytes) = blob();
    let mirror = FaultRegistry::start(|r| match r.range() {
        Some(_) => Reply::new(206).header("Content-Range", "bytes 0-9/10").body(noise(10)),
        None => Reply::manifest(media_type::OCI_MANIFEST, b"wrong"),
    });
    let served = bytes.clone();
    let origin = FaultRegistry::start(move |r| match r.path.contains("blobs") {
        true => Reply::blob(r, &served),
        false => Reply::manifest(media_type::OCI_MANIFEST, b"{}"),
    });
    let repository = with_mirrors(&origin, &[&mirror]);
    assert_eq!(range(&repository, digest, 10..20).await.unwrap(), bytes[10..20]);
    let repository = with_mirrors(&origin, &[&mirror]);
    assert_eq!(repository.manifest(&Digest::of(b"{}").to_string()).await.unwrap().bytes, "{}");
}

#[tokio::test]
async fn when_every_host_served_bad_bytes_all_are_asked_again_and_places_looked_up_anew() {
    let (digest, bytes) = blob();
    let storage = storage(bytes.clone());
    let place = storage.url("/x");
    let server = FaultRegistry::start(move |_| Reply::new(307).header("Location", place.clone()));
    let repository = repository(&server);
    let mut bad: Vec<HostId> = Vec::new();
    for _ in 0..2 {
        let mut body = repository.blob_range(digest, 0..10, &bad).await.unwrap();
        bad.push(body.host());
        assert_eq!(all(&mut body).await.unwrap(), bytes[..10]);
    }
    assert_eq!(server.requests().len(), 2);
}
