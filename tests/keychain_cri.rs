//! kubelet's logins: a CRI client pulls through our image service into a real containerd, from a registry that wants to know who asks.

use crate::support::{
    command::text,
    containerd::{Containerd, Options, Version},
    daemon::{Daemon, Settings, convert},
    grpc::cri,
    image::{Image, bulk, busybox},
    registry::{Kind, Registry},
    slot::Slot,
};
use std::process::Command;

#[test]
fn privileged_kubelets_logins_pass_through_and_serve_lazy_layers() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let root = slot.root();
        let registry = Registry::start(Kind::Guarded, &root);
        let image = Image::new(vec![busybox(), bulk("bulk", 3, 4)]);
        let (plain, indexed) = (root.join("plain"), root.join("indexed"));
        image.write(&plain);
        convert(&plain, &indexed, &["--min-layer-size", "0"]);
        registry.push(&indexed, "private", "v1");
        let reference = registry.reference("private", "v1");

        let containerd_socket = root.join("ctd/sock");
        let more = format!(
            "[background_fetch]\ndisable = true\n[cri_keychain]\nenable_keychain = true\nimage_service_path = \"unix://{}\"\n",
            containerd_socket.display()
        );
        let settings = Settings {
            containerd: Some(containerd_socket),
            more,
            // No login of this machine's own.
            env: vec![("DOCKER_CONFIG".into(), root.join("none").display().to_string())],
            ..Settings::default()
        };
        let mut daemon = Daemon::start(&root, &settings);
        let client = daemon.client();
        // containerd is not there yet: what is wrong is said, and mended by itself.
        let absent = cri::list_images(&client).unwrap_err();
        assert!(absent.message().contains("cri_keychain.image_service_path"), "{absent}");
        let pause = Some(registry.reference("pause", "v1"));
        let options = Options { soci: Some(daemon.socket.clone()), pause, ..Options::default() };
        let containerd = Containerd::start(&root, version, &options);

        let refused = cri::pull(&client, &reference).unwrap_err();
        assert!(refused.message().contains("private"), "containerd's own words: {refused}");
        cri::pull_as(&client, &reference, "u", "p").unwrap();
        assert_eq!(daemon.layers().lazy, image.layers.len(), "{version:?}: {}", daemon.log());
        assert!(cri::images(&client).unwrap().contains(&reference), "answers come back whole");
        assert_eq!(cri::images(&client).unwrap(), cri::images(&containerd.cri()).unwrap());
        assert_eq!(cri::image_status(&client, &reference).unwrap(), Some(vec![reference.clone()]));
        assert!(cri::filesystems(&client).unwrap() > 0);
        assert_eq!(cri::nonsense(&client).unwrap_err().code(), tonic::Code::Unimplemented);
        assert!(!daemon.log().contains("\"u:p\"") && !daemon.log().contains("dTpw"), "nothing of the login is logged");
        let found = Command::new("grep").args(["-rlE", "dTpw"]).arg(&daemon.root).output().unwrap();
        assert_eq!(text(&found.stdout), "", "nothing of the login is on disk");

        // The next daemon was told nothing, and what is missing needs a login: after a crash, and after a holder that was replaced.
        daemon.crash_and_restart();
        assert!(
            daemon.log().contains("logins that kubelet sent to an earlier daemon are known again"),
            "{}",
            daemon.log()
        );
        assert_eq!(bytes_below(&daemon.lazy(), "bulk"), 4 << 20, "{}", daemon.log());
        let found = Command::new("grep").args(["-rlaE", "dTpw|SOCILOG1"]).arg(&daemon.root).output().unwrap();
        assert_eq!(text(&found.stdout), "", "nothing of the login is on disk");
        let client = daemon.client();
        cri::remove_image(&client, &reference).unwrap();
        assert_eq!(cri::image_status(&client, &reference).unwrap(), None);
        drop(containerd);
    }
}

/// Bytes of all files in the directories `name` of lazy layers, read.
fn bytes_below(lazy: &std::path::Path, name: &str) -> usize {
    let layers = std::fs::read_dir(lazy).unwrap().map(|entry| entry.unwrap().path().join(name));
    let files = layers.filter_map(|directory| std::fs::read_dir(directory).ok()).flatten();
    files.map(|file| std::fs::read(file.unwrap().path()).unwrap().len()).sum()
}

#[test]
fn privileged_a_daemon_that_would_pass_on_to_itself_does_not_start() {
    let root = tempfile::tempdir().unwrap();
    let config = root.path().join("config.toml");
    let socket = root.path().join("sock");
    let text = format!("[cri_keychain]\nenable_keychain = true\nimage_service_path = \"{}\"\n", socket.display());
    std::fs::write(&config, text).unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"))
        .args(["config", "check", "--strict", "--config"])
        .arg(&config)
        .arg("--address")
        .arg(&socket)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("cri_keychain.image_service_path"), "{said}");
}
