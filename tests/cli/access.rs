//! How `soci` gets into registries: certificates, logins, and the directories that say so. Real registries with TLS, real helpers.

use super::lab::{Lab, case, golden, ran};
use crate::{
    certificates::{Authority, self_signed},
    registry_real::{Door, Program, Real},
    support::{
        containerd::Version,
        proxy::{Fault, Proxy, Rule, Tokens},
        registry::{Kind, Registry},
        slot::{Root, Slot},
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use std::{
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A registry with TLS of a private authority, whose certificate is `ca.pem` in the directory; and one without that has an image.
struct Places {
    private: Real,
    files: tempfile::TempDir,
    /// The image.
    source: String,
    _open: Registry,
    _root: Root,
    _slot: Slot,
}

impl Places {
    fn new(program: Program, door: Door) -> Places {
        Places::prepared(program, door, |_| {})
    }

    fn prepared(program: Program, door: Door, prepare: impl FnOnce(&Path)) -> Places {
        let (slot, files) = (Slot::take(), tempfile::tempdir().unwrap());
        let authority = Authority::new("Private CA");
        authority.issue("registry", &["127.0.0.1"]).write(files.path());
        std::fs::write(files.path().join("ca.pem"), authority.pem()).unwrap();
        prepare(files.path());
        let private = Real::run(program, LOCALHOST, door, Some(files.path()));
        let root = slot.root();
        let open = Registry::start(Kind::Docker28, &root);
        open.push(&case(&golden(), "single"), "gold", "v1");
        let source = open.reference("gold", "v1");
        Places { private, files, source, _open: open, _root: root, _slot: slot }
    }

    fn file(&self, name: &str) -> String {
        self.files.path().join(name).display().to_string()
    }

    /// `name` in the private registry.
    fn target(&self, name: &str) -> String {
        format!("{}/{name}:soci", self.private.host)
    }

    /// `soci convert --registry MORE… SOURCE TARGET`, in a home of its own.
    fn convert(&self, target: &str, more: &[&str]) -> super::Ran {
        ran(self
            .command()
            .args(["convert", "--registry", "--quiet", "--min-layer-size", "0"])
            .args(more)
            .args([&self.source, target]))
    }

    fn command(&self) -> Command {
        let mut soci = super::command();
        // Nobody's docker login of this machine.
        soci.env("HOME", self.files.path()).env_remove("DOCKER_CONFIG");
        soci
    }
}

#[test]
fn privileged_flags_about_tls_open_a_registry_of_a_private_authority() {
    for program in [Program::Docker28, Program::Distribution3] {
        let places = Places::new(program, Door::Open);
        let other = Authority::new("Another CA");
        std::fs::write(places.file("other.pem"), other.pem()).unwrap();
        places.convert(&places.target("a"), &["--tlscacert", &places.file("other.pem")]).failed(&[
            "is not trusted",
            "issued by \"CN=Private CA\"",
            "--tlscacert",
        ]);
        places.convert(&places.target("a"), &["--tlscacert", "/nonexistent"]).failed(&["/nonexistent cannot be read"]);
        let by_authority = places.convert(&places.target("a"), &["--tlscacert", &places.file("ca.pem")]).ok();
        let blindly = places.convert(&places.target("b"), &["--skip-verify"]).ok();
        let short = places.convert(&places.target("c"), &["-k"]).ok();
        assert_eq!((by_authority.text(), by_authority.text()), (blindly.text(), short.text()));
        // Reading it there takes the same; the index goes beside the image.
        let source = places.target("a");
        let create = |more: &[&str]| {
            ran(places.command().args(["create", "--registry", "-q", "--min-layer-size", "0"]).args(more).arg(&source))
        };
        create(&["--tlscacert", &places.file("ca.pem")]).ok();
    }
}

#[test]
fn privileged_directories_of_hosts_and_flags_go_together() {
    let places = Places::new(Program::Docker28, Door::Open);
    let host = &places.private.host;
    let directory = |name: &str, file: &str, text: &str| {
        let root = places.files.path().join(name);
        std::fs::create_dir_all(root.join(host)).unwrap();
        std::fs::write(root.join(host).join(file), text).unwrap();
        root.display().to_string()
    };
    let docker = directory("docker", "ca.crt", &std::fs::read_to_string(places.file("ca.pem")).unwrap());
    let toml = format!("server = \"https://{host}\"\nca = \"{}\"\n", places.file("ca.pem"));
    let containerd = directory("containerd", "hosts.toml", &toml);
    places.convert(&places.target("a"), &["--hosts-dir", &docker]).ok();
    places.convert(&places.target("b"), &["--hosts-dir", &format!("/nonexistent,{containerd}")]).ok();
    // As nerdctl passes them on: what the file says of the way counts, and the flag does beside it.
    let elsewhere = directory("elsewhere", "hosts.toml", &format!("server = \"https://{host}\"\n"));
    places.convert(&places.target("c"), &["--hosts-dir", &elsewhere]).failed(&["is not trusted", "hosts.toml"]);
    places.convert(&places.target("c"), &["--hosts-dir", &elsewhere, "--skip-verify"]).ok();
    let broken = directory("broken", "hosts.toml", "server = 7\n");
    places.convert(&places.target("d"), &["--hosts-dir", &broken]).failed(&["hosts.toml:1:10"]);
    // A short name is one of Docker Hub's, which this directory says is here.
    let hub = places.files.path().join("hub/docker.io");
    std::fs::create_dir_all(&hub).unwrap();
    std::fs::write(hub.join("hosts.toml"), toml).unwrap();
    let hub = places.file("hub");
    let named = ran(places
        .command()
        .args(["convert", "--registry", "--min-layer-size", "0", "--hosts-dir", &hub])
        .args([&places.source, "team/app:1"]));
    named.ok();
    places.convert(&format!("{}/copy:1", places.private.host), &["--hosts-dir", &docker]).ok();
    let from_hub =
        ["convert", "--registry", "--min-layer-size=0", "--hosts-dir", &hub, "-q", "team/app:1", "docker.io/nginx:2"];
    ran(places.command().args(from_hub)).ok();
    let library = ["create", "--registry", "--hosts-dir", &hub, "-q", "nginx:3"];
    ran(places.command().args(library)).failed(&["docker.io/library/nginx", "not found"]);
}

#[test]
fn privileged_client_certificates_are_shown_to_who_asks_for_one() {
    let clients = Authority::new("Clients");
    let pair = clients.issue("ci", &[]);
    let places = Places::prepared(Program::Docker28, Door::Open, |files| {
        std::fs::write(files.join("client-ca.pem"), clients.pem()).unwrap();
        std::fs::write(files.join("client.pem"), pair.both()).unwrap();
    });
    std::fs::write(places.file("client.cert"), &pair.certificate).unwrap();
    std::fs::write(places.file("client.key"), &pair.key).unwrap();
    let stranger = self_signed("stranger", &[]);
    std::fs::write(places.file("stranger.pem"), stranger.both()).unwrap();
    let ca = places.file("ca.pem");
    let target = places.target("a");
    places.convert(&target, &["--tlscacert", &ca]).failed(&["wants a client certificate", "--tlscert"]);
    places
        .convert(&target, &["--tlscacert", &ca, "--tlscert", &places.file("stranger.pem")])
        .failed(&["does not accept the client certificate"]);
    places.convert(&target, &["--tlscacert", &ca, "--tlskey", &places.file("client.key")]).failed(&["--tlscert"]);
    let apart = ["--tlscacert", &ca, "--tlscert", &places.file("client.cert"), "--tlskey", &places.file("client.key")];
    places.convert(&target, &apart).ok();
    places.convert(&places.target("b"), &["--tlscacert", &ca, "--tlscert", &places.file("client.pem")]).ok();
}

/// A helper as docker has them: it is asked `get`, gets a server on its input, and says who we are there. It writes down how it was asked.
fn helper(directory: &Path, name: &str, answer: &str) -> PathBuf {
    let path = directory.join(format!("docker-credential-{name}"));
    let asked = directory.join("asked");
    let script = format!(
        "#!/bin/sh\nprintf '%s %s:' \"$0\" \"$*\" >> {0}\ncat >> {0}\necho >> {0}\n{answer}\n",
        asked.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    asked
}

#[test]
fn privileged_an_index_is_pushed_with_every_kind_of_login() {
    let lab = Lab::new(Version::V22);
    for program in [Program::Docker28, Program::Distribution3] {
        let places = Places::new(program, Door::Guarded);
        let host = &places.private.host;
        let image = format!("{host}/gold:v1");
        // containerd has the image, its registry has nothing of it: all of it goes up.
        lab.fetch(&places.source);
        crate::support::command::output(lab.containerd.ctr().args(["images", "tag", &places.source, &image]));
        lab.soci(["create", "--min-layer-size", "0", &image]).ok();
        let (ca, home) = (places.file("ca.pem"), places.files.path());
        let push = |more: &[&str], path: &str| {
            let mut soci = lab.command();
            soci.env("HOME", home).env_remove("DOCKER_CONFIG").env("PATH", path);
            ran(soci.args(["push", "--quiet", "--tlscacert", &ca]).args(more).arg(&image))
        };
        let path = std::env::var("PATH").unwrap();
        let nobody = push(&[], &path);
        nobody.failed(&["access denied", "docker login", "no login at all"]);
        push(&["--user", "u:wrong"], &path).failed(&["access denied", "--user: refused"]);
        let index = push(&["--user", "u:p"], &path).ok();
        assert!(index.text().starts_with("sha256:"));

        // docker login
        std::fs::create_dir_all(home.join(".docker")).unwrap();
        let configuration = home.join(".docker/config.json");
        let auths = serde_json::json!({"auths": {host: {"auth": STANDARD.encode("u:p")}}});
        std::fs::write(&configuration, auths.to_string()).unwrap();
        assert_eq!(push(&["--existing-index", "allow"], &path).ok().text(), index.text());

        // ECR's helper
        let helpers = serde_json::json!({"credHelpers": {host: "ecr-login"}});
        std::fs::write(&configuration, helpers.to_string()).unwrap();
        let asked = helper(home, "ecr-login", "echo '{\"ServerURL\":\"s\",\"Username\":\"u\",\"Secret\":\"p\"}'");
        let path = format!("{}:{path}", home.display());
        assert_eq!(push(&["--existing-index", "allow"], &path).ok().text(), index.text());
        let asked = std::fs::read_to_string(asked).unwrap();
        let expected = format!("{}/docker-credential-ecr-login get:{host}", home.display());
        assert!(asked.lines().all(|line| line == expected) && asked.lines().count() >= 1, "{asked}");

        // One that says nothing useful is named, and what it says is not.
        helper(home, "ecr-login", "echo 'NoCredentialProviders: hunter2'; exit 1");
        push(&["--existing-index", "allow"], &path).failed(&["access denied", "ecr-login", "exit status: 1"]);
        let told = push(&["--existing-index", "allow"], &path).stderr;
        assert!(!told.contains("hunter2"), "{told}");
        helper(home, "ecr-login", "yes hunter2");
        push(&["--existing-index", "allow"], &path).failed(&["its answer is longer than 65536 bytes"]);
    }
}

#[test]
fn privileged_a_layer_is_mounted_with_a_token_that_says_so_or_sent() {
    let places = Places::new(Program::Docker28, Door::Open);
    let slot = Slot::take();
    let root = slot.root();
    let registry = Registry::start(Kind::Distribution3, &root);
    let proxy = Proxy::start(&registry.host);
    proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(60) }));
    let convert = |from: &str, to: &str| {
        ran(places.command().args(["convert", "--registry", "--quiet", "--min-layer-size", "0", from, to]))
    };
    let first = proxy.reference("team/app", "soci");
    convert(&places.source, &first).ok();
    proxy.take_scopes();
    proxy.take_seen();
    convert(&first, &proxy.reference("other/app", "soci")).ok();
    let scopes = proxy.take_scopes();
    let (push, pull) = ("repository:other/app:pull,push", "repository:team/app:pull");
    let both = scopes.windows(2).any(|pair| pair[0] == push && pair[1] == pull);
    assert!(both, "mounting takes the right to read there, too: {scopes:?}");
    let known = |scope: &String| [push, pull, "repository:other/app:pull"].contains(&scope.as_str());
    assert!(scopes.iter().all(known), "and nothing else is asked for: {scopes:?}");
    let seen = proxy.take_seen();
    let mounted: Vec<_> = seen.iter().filter(|s| s.path.contains("mount=")).collect();
    assert!(mounted.iter().any(|s| s.status == 201), "{mounted:?}");
    let sent: u64 = seen.iter().filter(|s| s.method == "PATCH").map(|s| s.received).sum();
    assert_eq!(sent, 0, "what is mounted is not sent");
    // Who may write there, but read the first only as anybody who pulls: the registry says no to mounting, and takes the layer.
    proxy.rule(Rule::all(Fault::Status(403)).containing("mount="));
    convert(&first, &proxy.reference("third/app", "soci")).ok();
    let seen = proxy.take_seen();
    assert!(seen.iter().filter(|s| s.path.contains("mount=")).all(|s| s.status != 201));
    let sent: u64 = seen.iter().filter(|s| s.method == "PATCH" || s.method == "PUT").map(|s| s.received).sum();
    assert!(sent > 4_000_000, "the layer was sent: {sent}");
}
