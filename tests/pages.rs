//! Man pages of section 7: what they show is run, so that nobody copies a command that does not work.
//!
//! A page's blocks (`.nf` to `.fi`) are commands or TOML. Commands run as they stand, in a shell, on a node with containerd and our daemon;
//! `registry.example` is a registry of the lab, and small scripts in front of the tools tell them where all that is.

use crate::{
    operator::Node,
    support::{
        command::{attempt, output, text},
        containerd::Version,
        image::{Image, bulk, busybox},
        slot::Slot,
    },
};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

const CI: &str = include_str!("../src/cli/man/soci-ci.7");
const CHECK: &str = include_str!("../src/cli/man/soci-check.7");
const REGISTRIES: &str = include_str!("../packaging/man/soci-registries.7");
const CREDENTIALS: &str = include_str!("../packaging/man/soci-credentials.7");

/// The blocks of a page, as a reader sees them.
fn blocks(page: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        match (line, &mut block) {
            (".nf", _) => block = Some(String::new()),
            (".fi", Some(text)) => {
                out.push(std::mem::take(text));
                block = None;
            }
            (".RS" | ".RE", _) => {}
            (line, Some(text)) => {
                let line = line.replace("\\-", "-").replace("\\(dq", "\"").replace("\\e", "\\");
                text.push_str(&["\\fB", "\\fI", "\\fR"].iter().fold(line, |line, font| line.replace(font, "")));
                text.push('\n');
            }
            _ => {}
        }
    }
    out
}

/// Configuration and files, not commands.
fn is_toml(block: &str) -> bool {
    block.starts_with('[') || block.starts_with("server = ")
}

/// A place where the commands of the pages work.
struct Desk {
    node: Node,
    home: PathBuf,
    layout: PathBuf,
}

impl Desk {
    fn new(slot: &Slot) -> Desk {
        let node = Node::new(slot, Version::V22);
        let (home, layout) = (node.root.join("home"), node.root.join("app-layout"));
        std::fs::create_dir_all(home.join("bin")).unwrap();
        Image::new(vec![busybox(), bulk("bulk", 1, 24)]).write(&layout);
        let desk = Desk { node, home, layout };
        let (containerd, daemon) = (&desk.node.containerd, &desk.node.daemon);
        desk.tool(
            "soci",
            &format!(
                "export CONTAINERD_ADDRESS={}\ncase $1 in\nstatus) set -- \"$@\" --daemon {d};;\nexplain|doctor) set -- \"$@\" --daemon {d} --config {c};;\nesac\n\
                 exec {} --root {} \"$@\"",
                containerd.address.display(),
                env!("CARGO_BIN_EXE_soci"),
                daemon.root.display(),
                d = daemon.socket.display(),
                c = daemon.socket.with_file_name("config.toml").display(),
            ),
        );
        let ctr = containerd.ctr();
        desk.tool(
            "ctr",
            &format!(
                "case \"$1 $2\" in \"images pull\"|\"images push\") w=$2; shift 2; set -- images $w --plain-http \"$@\";; esac\n\
                 exec {} {} \"$@\"",
                ctr.get_program().to_string_lossy(),
                ctr.get_args().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" "),
            ),
        );
        desk.tool(
            "skopeo",
            "c=$1; shift\ncase $c in copy) set -- --src-tls-verify=false --dest-tls-verify=false \"$@\";; *) set -- --tls-verify=false \"$@\";; esac\n\
             exec /usr/bin/skopeo $c \"$@\"",
        );
        // What it would have built.
        let builder = format!(
            "[ \"$1 $2 $3 $4\" = 'buildx build --output type=oci,dest=app.tar' ]\nexec tar -C {} -cf app.tar .",
            desk.layout.display()
        );
        desk.tool("docker", &builder);
        desk
    }

    fn tool(&self, name: &str, script: &str) {
        let path = self.home.join("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\nset -e\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs the commands of one block beside an image `app:1` that is in the registry and nowhere else; what they print.
    fn run(&self, block: &str) -> String {
        self.node.registry.push(&self.layout, "app", "1");
        let script = block.replace("registry.example", &self.node.proxy.host).replace("# ", "");
        let path = format!("{}:{}", self.home.join("bin").display(), std::env::var("PATH").unwrap());
        let mut shell = Command::new("bash");
        shell.args(["-e", "-o", "pipefail", "-c", &script]).env("PATH", path).env("HOME", &self.home);
        shell.env("IMAGE", self.node.proxy.reference("app", "1")).current_dir(&self.home);
        let done = attempt(&mut shell);
        assert!(done.status.success(), "{block}\n{}\n{}{}", done.status, text(&done.stdout), text(&done.stderr));
        text(&done.stdout)
    }
}

#[test]
fn privileged_the_commands_of_the_page_about_ci_make_indexes() {
    let slot = Slot::take();
    let desk = Desk::new(&slot);
    let commands: Vec<String> = blocks(CI).into_iter().filter(|block| !is_toml(block)).collect();
    assert!(commands.len() >= 4 && commands.iter().any(|block| block.contains("--registry")), "{commands:?}");
    for block in &commands {
        desk.run(block);
        // Whatever way it went: there is an image with an index.
        let made = ["1", "1-soci"].iter().any(|tag| {
            let (_, manifest) =
                crate::support::registry::get(&format!("http://{}/v2/app/manifests/{tag}", desk.node.registry.host));
            manifest.contains("application/vnd.amazon.soci.index.v2+json")
        });
        assert!(made, "{block}");
    }
}

#[test]
fn privileged_the_commands_of_the_page_about_checking_find_an_index_and_its_use() {
    let slot = Slot::take();
    let mut desk = Desk::new(&slot);
    desk.run("soci convert --registry --min-layer-size 0 registry.example/app:1 registry.example/app:1-soci");
    desk.run("ctr content fetch --plain-http registry.example/app:1\nsoci create --min-layer-size 0 registry.example/app:1\nsoci push -q registry.example/app:1");
    // On the node it is used.
    desk.node.succeeds(&["enable", "containerd"]);
    desk.node.containerd.restart();
    let image = desk.node.proxy.reference("app", "1-soci");
    desk.node.containerd.pull("soci", &image).unwrap();
    let mut said = String::new();
    for block in blocks(CHECK).iter().filter(|block| !is_toml(block)) {
        said += &desk.run(block);
    }
    for expected in
        ["application/vnd.amazon.soci.index.v2+json", "soci index found in remote repository", "lazy", image.as_str()]
    {
        assert!(said.contains(expected), "{expected:?} is not in\n{said}");
    }
}

#[test]
fn what_the_pages_show_of_the_configuration_is_understood() {
    for page in [REGISTRIES, CREDENTIALS, CI, CHECK] {
        for block in blocks(page).iter().filter(|block| block.starts_with('[') && !block.contains("Environment=")) {
            let parsed = soci::config::parse(block, Path::new("page.toml"));
            let loaded = parsed.unwrap_or_else(|error| panic!("{error}\n{block}"));
            assert!(loaded.warnings.is_empty(), "{:?}\n{block}", loaded.warnings);
        }
    }
    let hosts = blocks(REGISTRIES).into_iter().find(|block| block.starts_with("server = ")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let of_host = dir.path().join("certs.d/registry.example");
    std::fs::create_dir_all(&of_host).unwrap();
    std::fs::write(of_host.join("hosts.toml"), hosts).unwrap();
    let pair = crate::certificates::self_signed("mirror", &["mirror.example"]);
    for (name, pem) in [("ca.crt", &pair.certificate), ("client.cert", &pair.certificate), ("client.key", &pair.key)] {
        std::fs::write(of_host.join(name), pem).unwrap();
    }
    let config = dir.path().join("config.toml");
    std::fs::write(&config, format!("[registry]\nconfig_path = '{}'\n", dir.path().join("certs.d").display())).unwrap();
    let daemon = env!("CARGO_BIN_EXE_soci-snapshotter-grpc");
    let told = output(Command::new(daemon).args(["config", "check", "--strict", "--config"]).arg(config));
    assert!(
        told.contains("decides: https://mirror.example:5000/v2 (pull, resolve), then https://registry.example/v2"),
        "{told}"
    );
}

#[test]
fn what_the_readme_promises_is_kept_by_tests_that_there_are() {
    let listed = output(Command::new(std::env::current_exe().unwrap()).arg("--list"));
    let page = include_str!("../README.md");
    let rows = page.split_once("## What happens when").expect("the page").1;
    let rows = rows.split("\n## ").next().unwrap_or_default().lines().filter(|line| line.starts_with("| "));
    let (mut kept, mut unknown) = (0, Vec::new());
    for row in rows.skip(1) {
        let keepers = row.trim_end_matches(['|', ' ']).rsplit_once(" | ").expect("a last column").1;
        // `name`, `name`: what is between each two of them is not code.
        let names: Vec<&str> = keepers.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "nothing keeps: {row}");
        kept += 1;
        unknown.extend(names.into_iter().filter(|name| !name.starts_with("make ") && !listed.contains(*name)));
    }
    assert!(kept > 20, "{kept} rows");
    assert!(unknown.is_empty(), "no test is called so: {unknown:?}");
}
