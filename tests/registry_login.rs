//! Proving who asks: logins, grants, and who must not see them.

use crate::{
    fault_registry::{FaultRegistry, Reply, Request},
    registry::{MS, impatient, keychain, settings, with_login},
};
use soci::{
    keychain::{Credential, Keychain, KubeletProviders, Lookup, Query, Secret, Source},
    oci::media_type,
    registry::{Class, HostSettings, Registry, Repository},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

fn manifest() -> Reply {
    Reply::manifest(media_type::OCI_MANIFEST, b"{}")
}

/// A registry that wants a grant of `login`, of which it knows only the latest.
fn guarded(login: &FaultRegistry, valid: impl Fn(&str) -> bool + Send + Sync + 'static) -> FaultRegistry {
    let realm = login.url("/login");
    FaultRegistry::start(move |r| match r.header("authorization").and_then(|a| a.strip_prefix("Bearer ")) {
        Some(grant) if valid(grant) => manifest(),
        _ => Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}",service="s""#)),
    })
}

fn anonymous(server: &FaultRegistry) -> Repository {
    let registry = Registry::new(settings(), HostSettings::default(), Arc::default()).unwrap();
    registry.repository(&format!("{}/a/b", server.host()).parse().unwrap()).unwrap()
}

/// A login service that gives `t1`, `t2`, … each valid for `seconds`.
fn login_service(seconds: u64) -> FaultRegistry {
    let given = AtomicUsize::new(0);
    FaultRegistry::start(move |_| {
        std::thread::sleep(20 * MS);
        let n = given.fetch_add(1, Ordering::SeqCst) + 1;
        Reply::new(200).json(format!(r#"{{"token":"t{n}","expires_in":{seconds}}}"#))
    })
}

#[tokio::test]
async fn a_grant_is_asked_for_once_and_kept() {
    let login = login_service(300);
    let server = guarded(&login, |grant| grant == "t1");
    let repository = anonymous(&server);
    let many = futures::future::join_all((0..20).map(|_| repository.manifest("latest"))).await;
    assert!(many.iter().all(Result::is_ok));
    repository.manifest("latest").await.unwrap();
    let asked = login.requests();
    assert_eq!(asked.len(), 1, "all share one");
    assert_eq!(asked[0].path, "/login?service=s&scope=repository%3Aa%2Fb%3Apull");
    let before = server.requests().len();
    repository.manifest("latest").await.unwrap();
    assert_eq!(server.requests().len(), before + 1, "shown with the first request from now on");
}

#[tokio::test]
async fn a_grant_that_ends_is_renewed_and_one_that_is_refused_replaced_once() {
    let login = login_service(1);
    let server = guarded(&login, |grant| grant != "t3");
    let repository = anonymous(&server);
    repository.manifest("latest").await.unwrap();
    tokio::time::sleep(1010 * MS).await;
    let before = server.requests().len();
    repository.manifest("latest").await.unwrap();
    assert_eq!(server.requests().len(), before + 1, "renewed before it was refused");
    let revoked = login_service(300);
    let never = guarded(&revoked, |_| false);
    let error = anonymous(&never).manifest("latest").await.unwrap_err();
    assert_eq!(error.class(), Class::Unauthorized);
    assert_eq!((never.requests().len(), revoked.requests().len()), (2, 1), "exactly once more");
}

#[tokio::test]
async fn a_login_is_posted_and_given_the_older_way_to_those_who_know_no_better() {
    for (status, expected) in [(200, 1), (404, 2), (405, 2)] {
        let login = FaultRegistry::start(move |r| match (r.method.as_str(), status) {
            ("POST", 200) => Reply::new(200).json(r#"{"access_token":"ok"}"#),
            ("POST", status) => Reply::new(status),
            _ if r.header("authorization") == Some("Basic dTpw") => Reply::new(200).json(r#"{"token":"ok"}"#),
            _ => Reply::new(401),
        });
        let server = guarded(&login, |grant| grant == "ok");
        let (keychain, _dir) = keychain(&[(&server.host(), "u:p")]);
        with_login(&server, keychain).manifest("latest").await.unwrap();
        let asked = login.requests();
        assert_eq!(asked.len(), expected);
        assert!(asked[0].body.contains("grant_type=password&username=u&password=p"), "{}", asked[0].body);
        assert!(asked[0].body.contains("client_id=containerd-client"));
    }
}

#[tokio::test]
async fn a_login_service_that_does_not_answer_costs_its_callers_one_time_out_each_not_a_queue() {
    let login = FaultRegistry::start(|_| Reply::silence(Duration::from_secs(5)));
    let server = guarded(&login, |_| true);
    let mut once = impatient();
    once.retry.max_retries = 0;
    let registry = Registry::new(once, HostSettings::default(), Arc::default()).unwrap();
    let repository = registry.repository(&format!("{}/a/b", server.host()).parse().unwrap()).unwrap();
    let started = Instant::now();
    let many = futures::future::join_all((0..50).map(|_| repository.manifest("latest"))).await;
    assert!(many.iter().all(|r| matches!(r.as_ref().unwrap_err().class(), Class::Retry(_))));
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
}

#[tokio::test]
async fn trouble_of_the_login_service_is_waited_out_and_its_no_is_a_no() {
    let login = FaultRegistry::start(|r| match r.number {
        0 | 1 => Reply::new(503),
        _ => Reply::new(200).json(r#"{"token":"ok"}"#),
    });
    anonymous(&guarded(&login, |grant| grant == "ok")).manifest("latest").await.unwrap();
    for status in [401, 403, 404] {
        let login = FaultRegistry::start(move |_| Reply::new(status));
        let error = anonymous(&guarded(&login, |_| true)).manifest("latest").await.unwrap_err();
        assert_eq!(error.class(), Class::Unauthorized, "{error}");
    }
    let nonsense = FaultRegistry::start(|_| Reply::new(200).json(r#"{"token":"bad\nvalue"}"#));
    assert!(anonymous(&guarded(&nonsense, |_| true)).manifest("latest").await.is_err());
}

#[tokio::test]
async fn ecr_asks_for_a_new_login_with_a_403() {
    let text = r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}"#;
    let server = FaultRegistry::start(move |r| match r.header("authorization") {
        Some("Basic dTpuZXc=") => manifest(),
        None => Reply::new(401).header("WWW-Authenticate", "Basic"),
        Some(_) => Reply::new(403).json(text),
    });
    let (keychain, dir) = keychain(&[(&server.host(), "u:old")]);
    let repository = with_login(&server, keychain);
    assert_eq!(repository.manifest("latest").await.unwrap_err().class(), Class::Unauthorized);
    // "u:new"
    let config = format!(r#"{{"auths":{{"{}":{{"auth":"dTpuZXc="}}}}}}"#, server.host());
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    repository.manifest("latest").await.unwrap();
}

/// A source that knows these logins.
struct Knows(&'static str, Vec<(&'static str, &'static str)>, AtomicUsize);

impl Source for Knows {
    fn name(&self) -> &str {
        self.0
    }
    fn lookup<'a>(&'a self, _: &'a Query<'a>) -> Lookup<'a> {
        self.2.fetch_add(1, Ordering::SeqCst);
        let login = |(user, password): &(&str, &'static str)| Credential::Password {
            user: (*user).into(),
            password: Secret::new(*password),
        };
        Box::pin(std::future::ready(Ok(self.1.iter().map(login).collect())))
    }
}

fn chain(sources: &[(&'static str, &[(&'static str, &'static str)])]) -> Arc<Keychain> {
    let source = |(name, logins): &(&'static str, &[(&'static str, &'static str)])| {
        Arc::new(Knows(name, logins.to_vec(), AtomicUsize::new(0))) as Arc<dyn Source>
    };
    Arc::new(Keychain::new(sources.iter().map(source).collect()))
}

#[tokio::test]
async fn a_login_that_is_refused_is_followed_by_the_next() {
    // "u:right"
    let server = FaultRegistry::start(|r| match r.header("authorization") {
        Some("Basic dTpyaWdodA==") => manifest(),
        _ => Reply::new(401).header("WWW-Authenticate", "Basic"),
    });
    let keychain = chain(&[("first", &[("u", "old"), ("u", "older")]), ("second", &[]), ("third", &[("u", "right")])]);
    let repository = with_login(&server, keychain);
    repository.manifest("latest").await.unwrap();
    assert_eq!(server.requests().len(), 4, "nobody, two of the first, the third");
    repository.manifest("latest").await.unwrap();
    assert_eq!(server.requests().len(), 5, "what works is kept");

    let login = FaultRegistry::start(|r| match (r.method.as_str(), r.header("authorization")) {
        ("POST", _) if r.body.contains("password=right") => Reply::new(200).json(r#"{"token":"ok"}"#),
        ("POST", _) => Reply::new(403),
        _ => Reply::new(401),
    });
    let server = guarded(&login, |grant| grant == "ok");
    let keychain = chain(&[("first", &[("u", "wrong")]), ("second", &[("u", "right")])]);
    with_login(&server, keychain).manifest("latest").await.unwrap();
}

#[tokio::test]
async fn when_no_login_helps_the_error_names_the_sources_and_nothing_they_said() {
    let server = FaultRegistry::start(|_| Reply::new(401).header("WWW-Authenticate", "Basic"));
    let keychain = chain(&[("first", &[("u", "hunter2")]), ("second", &[])]);
    let error = with_login(&server, keychain.clone()).manifest("latest").await.unwrap_err();
    assert_eq!(error.class(), Class::Unauthorized);
    let text = error.to_string();
    assert!(text.ends_with("401 Unauthorized; tried first: refused; second: knows nothing; no login at all"), "{text}");
    assert_eq!(server.requests().len(), 2);
    // The same with a login service: nobody is let in, also not anonymously.
    let login = FaultRegistry::start(|_| Reply::new(401));
    let server = guarded(&login, |_| false);
    let text = with_login(&server, keychain).manifest("latest").await.unwrap_err().to_string();
    assert!(
        text.contains("tried first: refused; second: knows nothing; no login at all") && !text.contains("hunter2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_public_image_needs_no_login_and_suffers_from_none_that_is_wrong() {
    let login = FaultRegistry::start(|r| match (r.method.as_str(), r.header("authorization")) {
        ("GET", None) => Reply::new(200).json(r#"{"token":"public"}"#),
        _ => Reply::new(401),
    });
    let server = guarded(&login, |grant| grant == "public");
    with_login(&server, chain(&[("stale", &[("u", "ended")])])).manifest("latest").await.unwrap();
}

#[tokio::test]
async fn no_more_is_asked_for_than_pulling() {
    let login = login_service(300);
    let realm = login.url("/login");
    let server = FaultRegistry::start(move |r| match r.header("authorization") {
        Some(_) => manifest(),
        None => Reply::new(401).header(
            "WWW-Authenticate",
            format!(
                r#"Bearer realm="{realm}",service="s",scope="repository:hub/a/b:pull,push,delete registry:catalog:*""#
            ),
        ),
    });
    anonymous(&server).manifest("latest").await.unwrap();
    assert_eq!(login.requests()[0].path, "/login?service=s&scope=repository%3Ahub%2Fa%2Fb%3Apull");
}

#[tokio::test]
async fn a_login_that_kubelets_provider_gave_is_renewed_when_a_registry_refuses_it() {
    use std::os::unix::fs::PermissionsExt;
    let accepted = Arc::new(Mutex::new("Basic QVdTOjE=".to_owned())); // "AWS:1"
    let now = accepted.clone();
    let server = FaultRegistry::start(move |r| {
        match r.header("authorization") {
        Some(shown) if *shown == *now.lock().unwrap() => manifest(),
        Some(_) => Reply::new(403).json(r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}"#),
        None => Reply::new(401).header("WWW-Authenticate", "Basic realm=\"x\",service=\"ecr.amazonaws.com\""),
    }
    });
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "#!/bin/sh\ncd {}\nn=$(($(cat n 2>/dev/null || echo 0)+1)); echo $n > n\ncat > /dev/null\n\
         echo '{{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\"cacheKeyType\":\"Registry\",\
         \"cacheDuration\":\"12h\",\"auth\":{{\"127.0.0.1:{}\":{{\"username\":\"AWS\",\"password\":\"'$n'\"}}}}}}'\n",
        dir.path().display(),
        server.host().rsplit(':').next().unwrap()
    );
    let program = dir.path().join("ecr-provider");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = serde_json::json!({"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [{
        "name": "ecr-provider", "matchImages": [server.host()], "defaultCacheDuration": "12h",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1"}]});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let providers = KubeletProviders::new(dir.path().join("config.json"), dir.path());
    let repository = with_login(&server, Arc::new(Keychain::new(vec![Arc::new(providers)])));
    repository.manifest("latest").await.unwrap();
    repository.manifest("latest").await.unwrap();
    let runs = || std::fs::read_to_string(dir.path().join("n")).unwrap().trim().to_owned();
    assert_eq!(runs(), "1", "kept");
    *accepted.lock().unwrap() = "Basic QVdTOjI=".to_owned(); // "AWS:2"
    repository.manifest("latest").await.unwrap();
    assert_eq!(runs(), "2", "renewed once");
}

#[test]
fn what_is_logged_on_the_way_names_no_secret() {
    // In a process of its own: what other tests log at the same time would decide what is enabled.
    crate::registry_environment::run("registry_login::log_child", &[]);
}

#[tokio::test]
#[ignore = "run by what_is_logged_on_the_way_names_no_secret"]
async fn log_child() {
    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_env_filter("soci=trace")
        .with_writer(move || writer.clone())
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let storage = FaultRegistry::start(|r: &Request| match r.number % 2 {
        0 => Reply::new(503),
        _ => Reply::new(403),
    });
    let (place, realm) = (storage.url("/x?X-Amz-Signature=hunter2"), Arc::new(Mutex::new(String::new())));
    let at = realm.clone();
    let server = FaultRegistry::start(move |r| match r.header("authorization") {
        None => Reply::new(401).header("WWW-Authenticate", format!("Bearer realm=\"{}\"", at.lock().unwrap())),
        Some(_) => Reply::new(307).header("Location", place.clone()),
    });
    let login = FaultRegistry::start(|r| match r.number {
        0 => Reply::new(500).body("token hunter2"),
        _ => Reply::new(200).json(r#"{"token":"hunter2"}"#),
    });
    *realm.lock().unwrap() = login.url("/token");
    let (keychain, _dir) = keychain(&[(&server.host(), "u:hunter2")]);
    let error = with_login(&server, keychain).blob(soci::oci::Digest::of(b""), 9).await.unwrap_err();
    drop(guard);
    let mut text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("retrying request") && text.contains("Authorizing..."), "{text}");
    text += &error.to_string();
    let text = text.to_lowercase();
    for word in ["hunter2", "password", "passwd", "secret", "credential", "token", "oauth", "bearer", "basic auth"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}
