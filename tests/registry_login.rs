//! Proving who asks: logins, grants, and who must not see them.

use crate::{
    fault_registry::{FaultRegistry, Reply, Request},
    registry::{MS, impatient, keychain, settings, with_login},
};
use soci::{
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
