//! What the environment decides: which authorities are trusted, and which proxy is used.
//!
//! Both are read when a client is made and cannot be changed in a process that runs other tests, so each test runs its
//! second half in a process of its own.

use crate::{
    fault_registry::{FaultRegistry, Reply, noise},
    registry::settings,
    registry_real::{Door, Real},
};
use soci::{
    oci::{Digest, media_type},
    registry::{HostSettings, Mirror, Registry, RegistryError, Security},
};
use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
};

/// Runs the ignored test `name` in a process with `variables` and without any proxy of ours.
pub fn run(name: &str, variables: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
        command.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// An address of this machine that others can see: the loopback is never asked over TLS. Sends nothing.
fn address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").expect("this machine has a route to others");
    let ip = socket.local_addr().unwrap().ip();
    assert!(!ip.is_loopback() && !ip.is_unspecified(), "{ip}");
    ip
}

fn certificate(directory: &Path, ip: IpAddr) {
    let status = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=test", "-addext", &format!("subjectAltName=IP:{ip}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(directory)
        .stderr(std::process::Stdio::null())
        .status()
        .expect("openssl is installed (make setup)");
    assert!(status.success());
}

#[tokio::test]
async fn tls_is_used_and_only_authorities_of_this_machine_are_trusted() {
    let ip = address();
    let dir = tempfile::tempdir().unwrap();
    certificate(dir.path(), ip);
    let real = Real::start_on(ip, Door::Open, Some(dir.path()));
    let layer = noise(1 << 20);
    let digest = real.push_blob(&layer).await.to_string();
    let cert = dir.path().join("cert.pem");
    run(
        "registry_environment::tls_child",
        &[("SSL_CERT_FILE", cert.to_str().unwrap()), ("SOCI_TEST_HOST", &real.host), ("SOCI_TEST_BLOB", &digest)],
    );
    run("registry_environment::tls_child_without_trust", &[("SOCI_TEST_HOST", &real.host)]);
}

#[tokio::test]
#[ignore = "run by tls_is_used_and_only_authorities_of_this_machine_are_trusted"]
async fn tls_child() {
    let (Some(host), Some(blob)) = (variable("SOCI_TEST_HOST"), variable("SOCI_TEST_BLOB")) else { return };
    let registry = Registry::new(settings(), HostSettings::default(), Default::default()).unwrap();
    let repository = registry.repository(&format!("{host}/a/b").parse().unwrap()).unwrap();
    let digest: Digest = blob.parse().unwrap();
    assert_eq!(repository.blob(digest, 1 << 20).await.unwrap(), noise(1 << 20));
    let error = repository.manifest("none").await.unwrap_err();
    assert!(matches!(&error, RegistryError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains(&format!("https://{host}/")), "{error}");
}

#[tokio::test]
#[ignore = "run by tls_is_used_and_only_authorities_of_this_machine_are_trusted"]
async fn tls_child_without_trust() {
    let Some(host) = variable("SOCI_TEST_HOST") else { return };
    let registry = Registry::new(settings(), HostSettings::default(), Default::default()).unwrap();
    let repository = registry.repository(&format!("{host}/a/b").parse().unwrap()).unwrap();
    let error = repository.manifest("none").await.unwrap_err();
    assert!(matches!(error, RegistryError::Untrusted { .. }), "{error}");
}

#[tokio::test]
async fn the_proxy_of_the_environment_is_used_but_not_for_the_loopback() {
    let proxy = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_MANIFEST, b"by proxy"));
    let local = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_MANIFEST, b"direct"));
    run("registry_environment::proxy_child", &[("HTTP_PROXY", &proxy.url("")), ("SOCI_TEST_HOST", &local.host())]);
    assert_eq!(proxy.requests()[0].path, "http://m.example/v2/a/b/manifests/latest?ns=r.example");
}

#[tokio::test]
#[ignore = "run by the_proxy_of_the_environment_is_used_but_not_for_the_loopback"]
async fn proxy_child() {
    let Some(host) = variable("SOCI_TEST_HOST") else { return };
    let mirror = Mirror { host: "m.example".into(), security: Security::PlainHttp, ..Mirror::default() };
    let hosts =
        HostSettings { mirrors: HashMap::from([("r.example".into(), vec![mirror])]), ..HostSettings::default() };
    let registry = Registry::new(settings(), hosts, Default::default()).unwrap();
    let get = async |host: &str| {
        registry.repository(&format!("{host}/a/b").parse().unwrap()).unwrap().manifest("latest").await.unwrap().bytes
    };
    assert_eq!(get("r.example").await, "by proxy");
    assert_eq!(get(&host).await, "direct");
}

/// A SOCKS 5 proxy for one user, which leads to `upstream` whatever it is asked for. What it was asked for comes out.
fn socks(upstream: String) -> (String, std::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let (tell, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, upstream, tell) = (client.unwrap(), upstream.clone(), tell.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let bytes = |client: &mut TcpStream, n: u8| {
                    let mut buffer = vec![0; usize::from(n)];
                    client.read_exact(&mut buffer).map(|()| buffer)
                };
                let methods = bytes(&mut client, 2)?[1];
                assert!(bytes(&mut client, methods)?.contains(&2), "a login is offered");
                client.write_all(&[5, 2])?;
                let length = bytes(&mut client, 2)?[1];
                let user = bytes(&mut client, length)?;
                let length = bytes(&mut client, 1)?[0];
                let password = bytes(&mut client, length)?;
                assert_eq!((user.as_slice(), password.as_slice()), (&b"me"[..], &b"pw"[..]));
                client.write_all(&[1, 0])?;
                let head = bytes(&mut client, 5)?;
                assert_eq!((head[1], head[3]), (1, 3), "connect, by name");
                let name = bytes(&mut client, head[4])?;
                let port = bytes(&mut client, 2)?;
                let port = u16::from_be_bytes([port[0], port[1]]);
                tell.send(format!("{}:{port}", String::from_utf8_lossy(&name))).unwrap();
                client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
                let mut server = TcpStream::connect(upstream)?;
                let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                std::io::copy(&mut server, &mut client).map(drop)
            });
        }
    });
    (host, asked)
}

#[tokio::test]
async fn a_socks_proxy_is_asked_for_names_that_only_it_knows() {
    let registry = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_MANIFEST, b"by proxy"));
    let local = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_MANIFEST, b"direct"));
    for scheme in ["socks5", "socks5h"] {
        let (proxy, asked) = socks(registry.host());
        let variable = format!("{scheme}://me:pw@{proxy}");
        run("registry_environment::proxy_child", &[("ALL_PROXY", &variable), ("SOCI_TEST_HOST", &local.host())]);
        assert_eq!(asked.recv().unwrap(), "m.example:80");
    }
}

#[test]
fn a_proxy_that_is_none_is_named_without_its_password() {
    let mut soci = Command::new(env!("CARGO_BIN_EXE_soci"));
    soci.env("HTTPS_PROXY", "ftp://me:hunter2@proxy:1").args(["create", "--registry", "127.0.0.1:1/a:b"]);
    let said = String::from_utf8(soci.output().unwrap().stderr).unwrap();
    assert!(said.contains("warning: HTTPS_PROXY is not the URL of a proxy (http, https or socks5)"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}
