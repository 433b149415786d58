//! Logins from a cluster: an API server that speaks list and watch.

use crate::{
    certificates::{Authority, server},
    fault_registry::{FaultRegistry, Reply, Request},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use soci::{
    keychain::{Credential, KubeSecrets, Query, Source},
    oci::Reference,
};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

fn secret(name: &str, host: &str, login: &str, version: u32) -> serde_json::Value {
    let auths = serde_json::json!({"auths": {host: {"auth": STANDARD.encode(login)}}});
    serde_json::json!({
        "metadata": {"namespace": "team", "name": name, "resourceVersion": version.to_string()},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": STANDARD.encode(auths.to_string())},
    })
}

fn event(kind: &str, object: &serde_json::Value) -> String {
    serde_json::json!({"type": kind, "object": object}).to_string() + "\n"
}

/// A kubeconfig for the server, whose user has the token `abc`.
fn kubeconfig(server: &FaultRegistry) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{server: '{}'}}}}]\nusers: [{{name: u, user: {{token: abc}}}}]\n",
        server.url("")
    );
    std::fs::write(file.path(), text).unwrap();
    file
}

async fn user(secrets: &KubeSecrets, host: &str) -> Vec<String> {
    let reference: Reference = format!("{host}/a").parse().unwrap();
    let found = secrets.lookup(&Query { host, reference: &reference }).await.unwrap();
    found
        .into_iter()
        .map(|c| match c {
            Credential::Password { user, password } => format!("{user}:{}", password.expose()),
            other => panic!("{other:?}"),
        })
        .collect()
}

async fn until(secrets: &KubeSecrets, host: &str, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found = user(secrets, host).await;
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{host}: {found:?}, not {expected:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn secrets_are_listed_in_pages_watched_and_watched_again() {
    let watches = Arc::new(Mutex::new(0));
    let count = watches.clone();
    let server = FaultRegistry::start(move |r: &Request| {
        if r.header("authorization") != Some("Bearer abc") {
            return Reply::new(401);
        }
        if !r.path.contains("watch=1") {
            let page = match r.path.contains("continue=more") {
                false => serde_json::json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [
                    secret("a", "one.example", "u:1", 1), {"metadata": {"namespace": "x", "name": "broken"},
                    "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "hunter2"}}]}),
                true => {
                    serde_json::json!({"metadata": {"resourceVersion": "5"}, "items": [secret("b", "two.example", "u:2", 2)]})
                }
            };
            return Reply::new(200).json(page.to_string());
        }
        let mut count = count.lock().unwrap();
        *count += 1;
        let (new, gone) = (secret("a", "one.example", "u:new", 7), secret("b", "two.example", "u:2", 8));
        match *count {
            // A change; the connection ends.
            1 => Reply::new(200).chunked_body(event("MODIFIED", &new)),
            // It goes on from there; half an event, then silence and the end of the connection.
            2 => {
                let text = event("DELETED", &gone) + &event("BOOKMARK", &secret("", "", "", 9)) + "{\"type\":\"ADD";
                let whole = text.len();
                Reply::new(200).body(text + "ED").truncated(whole)
            }
            3 => Reply::new(200).chunked_body(event("ERROR", &serde_json::json!({"code": 410, "message": "too old"}))),
            _ => Reply::silence(Duration::from_secs(60)),
        }
    });
    let config = kubeconfig(&server);
    let secrets = KubeSecrets::start(config.path().to_str().unwrap());
    // A lookup waits for the list.
    assert_eq!(user(&secrets, "two.example").await, ["u:2"]);
    until(&secrets, "one.example", &["u:new"]).await;
    // After the second watch `b` is gone; the list after the third brings it back.
    let deadline = Instant::now() + Duration::from_secs(30);
    while *watches.lock().unwrap() < 4 {
        assert!(Instant::now() < deadline, "{:?}", server.requests().iter().map(|r| &r.path).collect::<Vec<_>>());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let seen = server.requests();
    let watched: Vec<_> = seen.iter().filter(|r| r.path.contains("watch=1")).map(|r| &r.path).collect();
    assert!(watched[0].contains("resourceVersion=5") && watched[1].contains("resourceVersion=7"), "{watched:?}");
    assert!(
        seen[0].path.starts_with("/api/v1/secrets?fieldSelector=type%3Dkubernetes.io%2Fdockerconfigjson"),
        "{}",
        seen[0].path
    );
    assert!(seen.iter().filter(|r| !r.path.contains("watch")).count() >= 4, "listed again, in pages");
    until(&secrets, "two.example", &["u:2"]).await;
}

#[tokio::test]
async fn a_cluster_that_comes_late_or_refuses_is_tried_again_and_what_is_known_stays() {
    let up = Arc::new(Mutex::new(false));
    let now = up.clone();
    let server = FaultRegistry::start(move |r: &Request| match *now.lock().unwrap() {
        false => Reply::new(403),
        true if r.path.contains("watch=1") => Reply::reset(),
        true => {
            let list = serde_json::json!({"metadata": {"resourceVersion": "1"}, "items": [secret("a", "one.example", "u:1", 1)]});
            Reply::new(200).json(list.to_string())
        }
    });
    let config = kubeconfig(&server);
    let secrets = KubeSecrets::start(config.path().to_str().unwrap());
    let started = Instant::now();
    assert_eq!(user(&secrets, "one.example").await, Vec::<String>::new());
    assert!(started.elapsed() < Duration::from_secs(10), "a lookup does not wait for ever");
    *up.lock().unwrap() = true;
    until(&secrets, "one.example", &["u:1"]).await;
    *up.lock().unwrap() = false;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(user(&secrets, "one.example").await, ["u:1"]);
}

#[tokio::test]
async fn a_cluster_is_trusted_under_the_name_and_by_the_authority_that_its_kubeconfig_gives() {
    let (authority, clients, other) = (Authority::new("Cluster"), Authority::new("Users"), Authority::new("Other"));
    // As behind a tunnel: the address is the loopback's, the certificate is not.
    let name = "kubernetes.default.svc";
    let tls = server(&authority.issue("apiserver", &[name]), Some(&clients));
    let cluster = FaultRegistry::start_tls(tls, |r: &Request| match r.path.contains("watch=1") {
        true => Reply::silence(Duration::from_secs(60)),
        false => {
            let list = serde_json::json!({"metadata": {"resourceVersion": "1"}, "items": [secret("a", "one.example", "u:1", 1)]});
            Reply::new(200).json(list.to_string())
        }
    });
    let admin = clients.issue("admin", &[]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("admin.pem"), &admin.certificate).unwrap();
    std::fs::write(dir.path().join("other.pem"), other.pem()).unwrap();
    let kubeconfig = |cluster_says: &str, user_says: &str| {
        let path = dir.path().join(format!("config-{}", soci::oci::Digest::of(cluster_says.as_bytes()).hex()));
        let text = format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{server: 'https://{}', {cluster_says}}}}}]\nusers: [{{name: u, user: {{{user_says}}}}}]\n",
            cluster.host()
        );
        std::fs::write(&path, text).unwrap();
        KubeSecrets::start(path.to_str().unwrap())
    };
    let data = |text: &str| STANDARD.encode(text);
    let ours = format!("certificate-authority-data: {}", data(&authority.pem()));
    // The certificate is a file beside the kubeconfig, the key is in it.
    let user_says = format!("client-certificate: admin.pem, client-key-data: {}", data(&admin.key));
    let secrets = kubeconfig(&format!("{ours}, tls-server-name: {name}"), &user_says);
    until(&secrets, "one.example", &["u:1"]).await;
    assert_eq!(cluster.requests()[0].header("sni"), Some(name), "what looks at the name only finds the server, too");
    let deadline = Instant::now() + Duration::from_secs(20);
    while cluster.requests().len() < 2 {
        assert!(Instant::now() < deadline, "it is not watched");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(secrets);
    let before = cluster.requests().len();
    for refused in [
        ours.clone(),
        format!("{ours}, tls-server-name: another.name"),
        format!("certificate-authority: other.pem, tls-server-name: {name}"),
        format!("tls-server-name: {name}"),
        format!("{ours}, tls-server-name: 10.0.0.1"),
    ] {
        let secrets = kubeconfig(&refused, &user_says);
        assert_eq!(user(&secrets, "one.example").await, Vec::<String>::new(), "{refused}");
    }
    let nobody = kubeconfig(&format!("{ours}, tls-server-name: {name}, proxy-url: ''"), "token: abc");
    assert_eq!(user(&nobody, "one.example").await, Vec::<String>::new(), "without a client certificate");
    assert_eq!(cluster.requests().len(), before, "nothing was sent to a server that is not trusted");
    let blindly = kubeconfig("insecure-skip-tls-verify: true", &user_says);
    until(&blindly, "one.example", &["u:1"]).await;
}
