//! The lab itself: what the end-to-end tests stand on holds.

use crate::support::containerd::{Containerd, Options, Version};
use crate::support::daemon::convert;
use crate::support::grpc::cri;
use crate::support::image::{Image, Layer, busybox, everything, noise, pause};
use crate::support::leaks;
use crate::support::link::{Link, Shape};
use crate::support::proxy::{Fault, Proxy, Rule, Tokens};
use crate::support::registry::{Kind, Registry, get, http, runtime};
use crate::support::slot::{Root, Slot, mounts_below};
use crate::support::tree;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

fn pushed(root: &Root, image: &Image, name: &str, registry: &Registry) -> String {
    let layout = root.join(name);
    image.write(&layout);
    registry.push(&layout, name, "v1");
    registry.reference(name, "v1")
}

#[test]
fn privileged_every_registry_serves_what_was_pushed() {
    let slot = Slot::take();
    for kind in [Kind::Docker28, Kind::Distribution3, Kind::Referrers] {
        let root = slot.root();
        let registry = Registry::start(kind, &root);
        pushed(&root, &pause(), "lab/pause", &registry);
        let (status, manifest) = get(&format!("http://{}/v2/lab/pause/manifests/v1", registry.host));
        assert_eq!(status, 200, "{kind:?}");
        assert!(manifest.contains("layers"), "{kind:?}: {manifest}");
        let digest = "sha256:".to_string() + &"0".repeat(64);
        let (status, _) = get(&format!("http://{}/v2/lab/pause/referrers/{digest}", registry.host));
        assert_eq!(status == 200, kind == Kind::Referrers, "{kind:?} answers {status} about referrers");
    }
}

#[test]
fn privileged_whatever_a_test_leaves_behind_is_seen() {
    let slot = Slot::take();
    let root = slot.root();
    let expect = |what: &str| {
        let left = leaks::remaining(root.path());
        assert!(left.len() == 1 && left[0].starts_with(what), "{what}: {left:?}");
    };
    assert_eq!(leaks::remaining(root.path()), Vec::<String>::new());
    let file = std::fs::File::create(root.join("file")).unwrap();
    expect("open file");
    drop(file);
    let point = root.dir("mount");
    nix::mount::mount(Some("x"), &point, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    expect("mount");
    nix::mount::umount(&point).unwrap();
    // A connection whose mount is gone and whose device somebody still holds.
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", std::os::fd::AsRawFd::as_raw_fd(&device));
    nix::mount::mount(Some("x"), &point, Some("fuse.test"), nix::mount::MsFlags::empty(), Some(&options[..])).unwrap();
    leaks::watch_connection(&point);
    assert_eq!(leaks::remaining(root.path()).len(), 2, "mount and connection");
    let inside = std::fs::File::options().custom_flags(nix::libc::O_PATH).read(true).open(&point).unwrap();
    nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).unwrap();
    let left = leaks::remaining(root.path());
    assert!(left.iter().any(|what| what.starts_with("FUSE connection")), "{left:?}");
    drop((inside, device));
    leaks::report(root.path(), "something else".to_owned());
    let refused = std::panic::catch_unwind(|| leaks::check(root.path())).unwrap_err();
    assert!(refused.downcast_ref::<String>().unwrap().ends_with("something else"));
    // Once is enough.
    leaks::check(root.path());
}

#[test]
fn privileged_both_containerds_unpack_every_kind_of_entry_alike() {
    let slot = Slot::take();
    let root = slot.root();
    let registry = Registry::start(Kind::Docker28, &root);
    let reference = pushed(&root, &everything(1), "lab/everything", &registry);
    let mut trees = Vec::new();
    for version in [Version::V16, Version::V22] {
        let root = slot.root();
        let containerd = Containerd::start(&root, version, &Options::default());
        containerd.pull("overlayfs", &reference).unwrap();
        assert_eq!(containerd.run("overlayfs", &reference, &["cat", "/stack/replaced"]).unwrap(), "from above\n");
        let mount = containerd.mount("overlayfs", "default", &reference, &root.join("mnt"));
        trees.push(tree::read(&mount.path));
    }
    let free = tree::implied_directories(&tree::names_in_layers(&root.join("lab/everything")));
    assert_eq!(tree::differences(&trees[0], &trees[1], &free), Vec::<String>::new());
    let missing = |path: &str| !trees[0].contains_key(std::path::Path::new(path));
    assert!(missing("stack/gone") && missing("stack/opaque/invisible") && !missing("stack/opaque/visible"));
    assert_eq!(trees[0][std::path::Path::new("kinds/exact-too")].links, 3);
}

#[test]
fn privileged_a_converted_image_goes_to_every_registry_and_runs_on_a_plain_overlayfs() {
    let slot = Slot::take();
    let layouts = slot.root();
    let (plain, indexed) = (layouts.join("plain"), layouts.join("indexed"));
    everything(1).write(&plain);
    convert(&plain, &indexed, &["--min-layer-size", "0"]);
    for kind in [Kind::Docker28, Kind::Distribution3, Kind::Referrers] {
        let root = slot.root();
        let registry = Registry::start(kind, &root);
        registry.push(&indexed, "lab/indexed", "v1");
        let reference = registry.reference("lab/indexed", "v1");
        let containerd = Containerd::start(&root, Version::V22, &Options::default());
        containerd.pull("overlayfs", &reference).unwrap();
        assert_eq!(
            containerd.run("overlayfs", &reference, &["cat", "/stack/replaced"]).unwrap(),
            "from above\n",
            "{kind:?}"
        );
        let mount = containerd.mount("overlayfs", "default", &reference, &root.join("mnt"));
        assert!(mount.path.join("stack/opaque/visible").exists());
    }
}

#[test]
fn privileged_cri_runs_a_pod_on_both_containerds() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let root = slot.root();
        let registry = Registry::start(Kind::Docker28, &root);
        let reference = pushed(&root, &pause(), "lab/pause", &registry);
        let options =
            Options { pause: Some(reference.clone()), plain_http: vec![registry.host.clone()], ..Options::default() };
        let containerd = Containerd::start(&root, version, &options);
        let client = containerd.cri();
        cri::pull(&client, &reference).unwrap();
        let pod = cri::Pod::run(&client, "pod", &reference, &["/bin/sleep", "1000"], &root.dir("logs")).unwrap();
        assert_eq!(pod.exec(&["/bin/echo", "here"]).unwrap(), (0, b"here\n".to_vec(), Vec::new()), "{version:?}");
    }
}

#[test]
fn privileged_rpull_pulls_through_both_containerds() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let root = slot.root();
        let registry = Registry::start(Kind::Docker28, &root);
        let reference = pushed(&root, &pause(), "lab/pause", &registry);
        let containerd = Containerd::start(&root, version, &Options::default());
        for labels in [&["-labels", "containerd"][..], &["-labels", "nerdctl", "-index", ""]] {
            containerd.rpull("overlayfs", &reference, labels).unwrap();
            assert_eq!(containerd.run("overlayfs", &reference, &["echo", "runs"]).unwrap(), "runs\n");
            containerd.remove_image(&reference);
        }
    }
}

#[test]
fn privileged_the_link_is_as_slow_as_it_says() {
    let slot = Slot::take();
    let root = slot.root();
    let mut link = Link::up(&slot);
    let registry = Registry::start_behind(&link, Kind::Docker28, &root, &root.join("registry"));
    let mut layer = Layer::new();
    layer.file("noise", noise(1, 8 << 20));
    pushed(&root, &Image::new(vec![busybox(), layer]), "lab/noise", &registry);
    let layout = root.join("lab/noise");
    let (_, manifest) = crate::support::registry::image_manifest(&layout);
    let blob = &manifest.layers[1];
    link.shape(Shape { mbit: 80, delay_us: 20_000 });
    let before = link.received();
    let start = Instant::now();
    let url = format!("http://{}/v2/lab/noise/blobs/{}", registry.host, blob.digest);
    let bytes = runtime().block_on(async { http().get(url).send().await.unwrap().bytes().await.unwrap() });
    let took = start.elapsed().as_secs_f64();
    assert_eq!(bytes.len() as u64, blob.size);
    // 8.4 MB at 10 MB/s, after two round trips.
    assert!((0.8..2.0).contains(&took), "{took} s");
    assert!(link.received() - before >= blob.size);
}

#[test]
fn privileged_nothing_is_left_of_a_slot() {
    let slot = Slot::take();
    let dir = slot.dir();
    {
        let root = slot.fresh_root();
        let _link = Link::up(&slot);
        std::fs::write(root.join("file"), "x").unwrap();
        assert!(!mounts_below(&dir).is_empty());
    }
    assert_eq!(mounts_below(&dir), Vec::<std::path::PathBuf>::new());
    drop(slot);
    assert!(!dir.exists());
}

#[test]
fn the_proxy_does_what_its_rules_say() {
    let upstream = tiny_server(b"0123456789");
    let proxy = Proxy::start(&upstream);
    let url = format!("http://{}/v2/x/blobs/sha256:00", proxy.host);
    let fetch = |headers: &[(&str, &str)]| {
        runtime().block_on(async {
            let mut request = http().get(&url);
            for (k, v) in headers {
                request = request.header(*k, *v);
            }
            let response = request.send().await.ok()?;
            let status = response.status().as_u16();
            Some((status, response.bytes().await.ok()))
        })
    };
    let body = |b: &'static [u8]| Some(bytes::Bytes::from_static(b));
    assert_eq!(fetch(&[]), Some((200, body(b"0123456789"))));

    proxy.rule(Rule::blobs(Fault::Status(503)).times(2).after(1));
    let statuses: Vec<u16> = (0..4).map(|_| fetch(&[]).unwrap().0).collect();
    assert_eq!(statuses, [200, 503, 503, 200]);

    proxy.rule(Rule::blobs(Fault::Corrupt(3)).times(1));
    assert_eq!(fetch(&[]), Some((200, body(b"012f456789"))));
    proxy.rule(Rule::blobs(Fault::Truncate(4)).times(1));
    assert_eq!(fetch(&[]), Some((200, None)));
    proxy.rule(Rule::blobs(Fault::Reset(4)).times(1));
    assert_eq!(fetch(&[]), Some((200, None)));

    proxy.down();
    assert_eq!(fetch(&[]), None);
    proxy.up();
    assert_eq!(fetch(&[]).unwrap().0, 200);

    proxy.rule(Rule::blobs(Fault::Redirect(Duration::from_secs(60))).times(1));
    assert_eq!(fetch(&[]), Some((200, body(b"0123456789"))));
    proxy.rule(Rule::blobs(Fault::Redirect(Duration::ZERO)).times(1));
    assert_eq!(fetch(&[]).unwrap().0, 403);

    proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(60) }));
    assert_eq!(fetch(&[]).unwrap().0, 401);
    let (_, token) = get(&format!("http://{}/token?scope=repository:x:pull", proxy.host));
    let token: serde_json::Value = serde_json::from_str(&token).unwrap();
    let bearer = format!("Bearer {}", token["token"].as_str().unwrap());
    assert_eq!(fetch(&[("authorization", &bearer)]).unwrap().0, 200);
    proxy.revoke_tokens();
    assert_eq!(fetch(&[("authorization", &bearer)]).unwrap().0, 401);
    proxy.tokens(None);

    proxy.take_seen();
    fetch(&[("range", "bytes=2-4")]);
    // It is noted after the answer, and so was the one before.
    let noted = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        proxy.take_seen().iter().any(|seen| (seen.range.clone(), seen.status) == (Some(2..5), 200))
    });
    assert!(noted);
}

/// Answers every request with `body`.
fn tiny_server(body: &'static [u8]) -> String {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut reader = BufReader::new(&connection);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                line.clear();
            }
            let _ = write!(&connection, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = (&connection).write_all(body);
        }
    });
    host
}
