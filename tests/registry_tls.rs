//! TLS: real registries with private authorities, client certificates, and certificates that nobody should accept.

use crate::{
    certificates::{Authority, Pair, self_signed},
    fault_registry::{FaultRegistry, Reply},
    registry::settings,
    registry_real::{Door, Program, Real, check},
};
use soci::registry::{HostSettings, Registry, RegistryError, Repository};
use std::{net::IpAddr, path::Path};

const LOCALHOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// `certs.d`, with a way to write into it.
struct CertsD(tempfile::TempDir);

impl CertsD {
    fn new() -> CertsD {
        CertsD(tempfile::tempdir().unwrap())
    }

    fn write(&self, host: &str, file: &str, text: &str) {
        let directory = self.0.path().join(host);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(file), text).unwrap();
    }

    fn repository(&self, host: &str) -> Repository {
        let hosts = HostSettings { directories: vec![self.0.path().to_owned()], ..HostSettings::default() };
        let registry = Registry::new(settings(), hosts, Default::default()).unwrap();
        registry.repository(&format!("{host}/a/b").parse().unwrap()).unwrap()
    }

    /// What a request over TLS to `host` says, where nothing but `https` is configured.
    async fn refusal(&self, host: &str) -> String {
        self.write(host, "hosts.toml", &format!("server = \"https://{host}\""));
        let error = self.repository(host).manifest("none").await.unwrap_err();
        assert!(matches!(error, RegistryError::Untrusted { .. }), "{error}");
        error.to_string()
    }
}

fn serve(program: Program, pair: &Pair, directory: &Path) -> Real {
    pair.write(directory);
    Real::run(program, LOCALHOST, Door::Open, Some(directory))
}

#[tokio::test]
async fn a_private_authority_is_trusted_where_it_is_named_in_either_way() {
    let authority = Authority::new("Private CA");
    for program in [Program::Docker28, Program::Distribution3] {
        let files = tempfile::tempdir().unwrap();
        let real = serve(program, &authority.issue("registry", &["127.0.0.1"]), files.path());
        let docker = CertsD::new();
        docker.write(&real.host, "ca.crt", &authority.pem());
        check(&real, &docker.repository(&real.host)).await;

        let containerd = CertsD::new();
        let name = real.host.replace(':', "_") + "_";
        containerd.write(&name, "private.pem", &authority.pem());
        containerd.write(&name, "hosts.toml", &format!("server = \"https://{}\"\nca = \"private.pem\"", real.host));
        let missing = containerd.repository(&real.host).manifest("none").await.unwrap_err();
        assert!(matches!(missing, RegistryError::NotFound { .. }), "{missing}");

        let careless = CertsD::new();
        careless.write("_default", "hosts.toml", "skip_verify = true");
        let missing = careless.repository(&real.host).manifest("none").await.unwrap_err();
        assert!(matches!(missing, RegistryError::NotFound { .. }), "{missing}");
    }
}

#[tokio::test]
async fn a_registry_that_wants_client_certificates_gets_the_right_one() {
    let (authority, clients, others) = (Authority::new("CA"), Authority::new("Clients"), Authority::new("Others"));
    let files = tempfile::tempdir().unwrap();
    let (right, wrong) = (clients.issue("node-7", &[]), others.issue("stranger", &[]));
    std::fs::write(files.path().join("client-ca.pem"), clients.pem()).unwrap();
    std::fs::write(files.path().join("client.pem"), right.both()).unwrap();
    let real = serve(Program::Docker28, &authority.issue("registry", &["127.0.0.1"]), files.path());

    let certs = CertsD::new();
    certs.write(&real.host, "ca.crt", &authority.pem());
    let error = certs.repository(&real.host).manifest("none").await.unwrap_err().to_string();
    assert!(error.contains("wants a client certificate, and none is configured"), "{error}");

    certs.write(&real.host, "a.cert", &wrong.certificate);
    let error = soci_error(&certs, &real.host);
    assert!(error.contains("a.cert has no private key beside it"), "{error}");
    certs.write(&real.host, "a.key", &right.key);
    let error = soci_error(&certs, &real.host);
    assert!(error.contains("a.key does not belong to the certificate in "), "{error}");
    certs.write(&real.host, "a.key", &wrong.key);
    // It is the only one there is, and so it is shown.
    let error = certs.repository(&real.host).manifest("none").await.unwrap_err().to_string();
    assert!(error.contains("does not accept the client certificate that is configured"), "{error}");
    // Of several, the one whose authority the registry names.
    certs.write(&real.host, "b.cert", &right.certificate);
    certs.write(&real.host, "b.key", &right.key);
    check(&real, &certs.repository(&real.host)).await;

    let containerd = CertsD::new();
    containerd.write("_default", "ca.pem", &authority.pem());
    containerd.write("_default", "node.pem", &right.both());
    let toml = format!("[host.\"https://{}\"]\nca = [\"ca.pem\"]\nclient = \"node.pem\"", real.host);
    containerd.write("_default", "hosts.toml", &toml);
    let missing = containerd.repository(&real.host).manifest("none").await.unwrap_err();
    assert!(matches!(missing, RegistryError::NotFound { .. }), "{missing}");
}

/// Why the registry at `host` cannot even be asked.
fn soci_error(certs: &CertsD, host: &str) -> String {
    let hosts = HostSettings { directories: vec![certs.0.path().to_owned()], ..HostSettings::default() };
    let registry = Registry::new(settings(), hosts, Default::default()).unwrap();
    match registry.repository(&format!("{host}/a/b").parse().unwrap()) {
        Ok(_) => panic!("usable"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn a_certificate_that_cannot_be_accepted_is_named_with_its_host_and_what_to_do() {
    let authority = Authority::new("Private CA");
    let certs = CertsD::new();
    let start = |pair: &Pair| {
        let files = tempfile::tempdir().unwrap();
        let real = serve(Program::Docker28, pair, files.path());
        (real, files)
    };

    let (real, _files) = start(&authority.issue("good", &["127.0.0.1"]));
    let text = certs.refusal(&real.host).await;
    let expected = format!("{} is not trusted: its certificate was issued by \"CN=Private CA\"", real.host);
    assert!(text.contains(&expected) && text.contains("\"CN=good\", SHA-256 "), "{text}");
    assert!(text.contains("name it as ca of this host in ") && text.contains("hosts.toml"), "{text}");
    // Where only certificates are configured, so is the advice.
    let other = CertsD::new();
    other.write(&real.host, "ca.crt", &Authority::new("Another").pem());
    let text = other.repository(&real.host).manifest("none").await.unwrap_err().to_string();
    assert!(text.contains(&format!("{}/ca.crt", real.host)), "{text}");

    let (real, _files) = start(&authority.issue("moved", &["old.example", "127.0.0.2"]));
    certs.write(&real.host, "ca.pem", &authority.pem());
    let trusted = |host: &str| {
        certs.write(host, "ca.pem", &authority.pem());
        certs.write(host, "hosts.toml", &format!("server = \"https://{host}\"\nca = \"ca.pem\""));
        certs.repository(host)
    };
    let text = trusted(&real.host).manifest("none").await.unwrap_err().to_string();
    assert!(text.contains("is for another host: ") && text.contains("old.example"), "{text}");
    assert!(text.contains(&format!("give the registry a certificate for {}", real.host)), "{text}");

    let (real, _files) = start(&authority.issue_expired("old", &["127.0.0.1"]));
    let text = trusted(&real.host).manifest("none").await.unwrap_err().to_string();
    assert!(text.contains("its certificate expired on 2020-01-02T00:00:00Z"), "{text}");

    let pair = self_signed("lonely", &["127.0.0.1"]);
    let (real, _files) = start(&pair);
    let text = certs.refusal(&real.host).await;
    assert!(text.contains("its certificate is self-signed (certificate \"CN=lonely\", SHA-256 "), "{text}");
    // Do what it says.
    certs.write(&real.host, "ca.pem", &pair.certificate);
    certs.write(&real.host, "hosts.toml", &format!("server = \"https://{}\"\nca = \"ca.pem\"", real.host));
    let missing = certs.repository(&real.host).manifest("none").await.unwrap_err();
    assert!(matches!(missing, RegistryError::NotFound { .. }), "{missing}");
    // That it is named does not make it another host's.
    let (real, _files) = start(&self_signed("lonely", &["old.example"]));
    let text = certs.refusal(&real.host).await;
    assert!(text.contains("for another host: ") || text.contains("self-signed"), "{text}");

    let plain = Real::run(Program::Docker28, LOCALHOST, Door::Open, None);
    let text = certs.refusal(&plain.host).await;
    assert!(text.contains("does not speak TLS") && text.contains("http:// URL in its hosts.toml"), "{text}");
}

#[tokio::test]
async fn a_machine_without_authorities_is_told_what_is_missing() {
    let authority = Authority::new("Private CA");
    let files = tempfile::tempdir().unwrap();
    let real = serve(Program::Docker28, &authority.issue("good", &["127.0.0.1"]), files.path());
    let variables =
        [("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent"), ("SOCI_TEST_HOST", &real.host)];
    crate::registry_environment::run("registry_tls::bare_child", &variables);
}

#[tokio::test]
#[ignore = "run by a_machine_without_authorities_is_told_what_is_missing"]
async fn bare_child() {
    let Ok(host) = std::env::var("SOCI_TEST_HOST") else { return };
    let text = CertsD::new().refusal(&host).await;
    assert!(text.contains("install ca-certificates") && text.contains("no certificate authorities"), "{text}");
    // Plain HTTP needs none.
    let plain = FaultRegistry::start(|_| Reply::new(404));
    let error = CertsD::new().repository(&plain.host()).manifest("none").await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
}
