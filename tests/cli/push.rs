//! `soci push`, and `--registry`: what arrives in real registries, whatever happens on the way.

use super::lab::{Lab, case, golden, ran};
use crate::support::{
    containerd::Version,
    image::{Image, Layer, busybox, noise},
    proxy::{Fault, Proxy, Rule, Seen, Tokens},
    registry::{Kind, Registry, get, image_manifest, read_json},
};
use serde_json::Value;
use soci::oci::{Digest, Index, media_type};
use std::{path::Path, time::Duration};

const KINDS: [Kind; 3] = [Kind::Docker28, Kind::Distribution3, Kind::Referrers];

/// Digests of the v1 indexes that the registry lists for a manifest: with its API if it has one, else with the tag.
fn listed(registry: &Registry, name: &str, manifest: &Digest) -> Vec<String> {
    let (status, index) = get(&format!("http://{}/v2/{name}/referrers/{manifest}", registry.host));
    let (status, index) = match status {
        200 => (status, index),
        _ => get(&format!("http://{}/v2/{name}/manifests/sha256-{}", registry.host, manifest.hex())),
    };
    if status == 404 {
        return Vec::new();
    }
    let index: Index = serde_json::from_str(&index).unwrap();
    let v1 = index.manifests.iter().filter(|entry| entry.artifact_type == media_type::SOCI_INDEX_V1);
    v1.map(|entry| entry.digest.to_string()).collect()
}

/// An image with two layers of noise, in a layout.
fn noisy(layout: &Path, megabytes: usize) {
    let layers = (0..2).map(|n| {
        let mut layer = Layer::new();
        layer.file(format!("noise-{n}"), noise(n, megabytes << 20));
        layer
    });
    Image::new([busybox()].into_iter().chain(layers).collect()).write(layout);
}

#[test]
fn privileged_an_index_is_pushed_to_every_registry_and_is_found_there() {
    for kind in KINDS {
        let lab = Lab::new(Version::V22);
        let (_root, registry) = lab.registry(kind);
        let layout = lab.root.join("layout");
        noisy(&layout, 12);
        registry.push(&layout, "lab/noise", "v1");
        let image = registry.reference("lab/noise", "v1");
        lab.fetch(&image);
        let (manifest, _) = image_manifest(&layout);
        lab.soci(["push", &image])
            .failed(&["could not find any soci index manifest v1 to push", "soci create --platform"]);
        lab.soci(["create", "--min-layer-size", "0", &image]).ok();
        let pushed = lab.soci(["push", "--quiet", &image]).ok();
        assert_eq!(listed(&registry, "lab/noise", &manifest), [pushed.text().trim()], "{kind:?}");
        // Again: it is there, and stays the only one.
        let again = lab.soci(["push", &image]).ok();
        assert!(
            again.text().contains("[WARN] soci index found in remote repository with digest: "),
            "{}",
            again.text()
        );
        assert!(again.text().contains("skipped artifact with digest: "), "{}", again.text());
        let skipped = lab.soci(["push", "--existing-index", "skip", "--json", &image]).ok();
        let told: Value = serde_json::from_str(skipped.text()).unwrap();
        assert_eq!(told[0]["status"], "skipped");
        assert_eq!(listed(&registry, "lab/noise", &manifest).len(), 1);
        // Another index of the same image joins it.
        lab.soci(["create", "--span-size", "1048576", "--min-layer-size", "0", &image]).ok();
        lab.soci(["push", "--existing-index", "skip", &image]).ok();
        assert_eq!(listed(&registry, "lab/noise", &manifest).len(), 1);
        let second = lab.soci(["push", "--existing-index", "allow", "-q", &image]).ok();
        let all = listed(&registry, "lab/noise", &manifest);
        assert!(all.len() == 2 && all.contains(&second.text().trim().to_owned()), "{kind:?}: {all:?}");
        let multiple = lab.soci(["push", &image]).ok();
        assert!(multiple.text().contains("multiple soci indices found in remote repository"), "{}", multiple.text());
    }
}

#[test]
fn privileged_two_who_push_at_the_same_time_are_both_listed() {
    for kind in KINDS {
        let lab = Lab::new(Version::V22);
        let (_root, registry) = lab.registry(kind);
        let layout = lab.root.join("layout");
        noisy(&layout, 1);
        registry.push(&layout, "lab/noise", "v1");
        let (manifest, _) = image_manifest(&layout);
        // As from several machines: each has a database of its own, and an index of its own.
        let spans = [65536, 131_072, 262_144, 524_288, 1_048_576];
        let image = registry.reference("lab/noise", "v1");
        lab.fetch(&image);
        let soci = |span: usize, args: &[&str]| {
            let root = lab.root.join(&format!("machine-{span}"));
            let mut soci = super::command();
            soci.env("CONTAINERD_ADDRESS", &lab.containerd.address).arg("--root").arg(root).args(args);
            ran(&mut soci).ok()
        };
        for span in spans {
            soci(
                span,
                &[
                    "--content-store",
                    "soci",
                    "create",
                    "--min-layer-size",
                    "0",
                    "--span-size",
                    &span.to_string(),
                    &image,
                ],
            );
        }
        std::thread::scope(|scope| {
            for span in spans {
                let (soci, image) = (&soci, &image);
                scope.spawn(move || {
                    soci(span, &["--content-store", "soci", "push", "--existing-index", "allow", image])
                });
            }
        });
        let all = listed(&registry, "lab/noise", &manifest);
        assert_eq!(all.len(), spans.len(), "{kind:?}: {all:?}");
    }
}

#[test]
fn privileged_an_entry_that_came_in_between_is_kept_where_the_registry_obeys_if_match() {
    let lab = Lab::new(Version::V22);
    let (_root, registry) = lab.registry(Kind::Distribution3);
    let layout = lab.root.join("layout");
    noisy(&layout, 1);
    registry.push(&layout, "lab/noise", "v1");
    let (manifest, _) = image_manifest(&layout);
    let (proxy, image) = (Proxy::start(&registry.host), registry.reference("lab/noise", "v1"));
    lab.fetch(&image);
    let other = proxy.reference("lab/noise", "v1");
    crate::support::command::output(lab.containerd.ctr().args(["images", "tag", &image, &other]));
    let index = |span: &str, image: &str| {
        lab.soci(["create", "--min-layer-size", "0", "--span-size", span, image]).ok();
        let pushed = lab.command();
        (pushed, image.to_owned())
    };
    // There is a list already, or nothing could have changed.
    let (mut first, image) = index("65536", &image);
    let first = ran(first.args(["push", "-q", &image])).ok().text().trim().to_owned();
    proxy.obey_conditions();
    let (mut second, other) = index("131072", &other);
    // What it writes is held up, and meanwhile somebody else writes.
    let tag = format!("PUT /v2/lab/noise/manifests/sha256-{}", manifest.hex());
    proxy.rule(Rule::all(Fault::Hang).containing(&tag).times(1));
    second.args(["push", "-q", "--existing-index", "allow", &other]).stdout(std::process::Stdio::piped());
    let second = second.spawn().unwrap();
    super::lab::eventually("the list is being written", || proxy.hangs() == 1);
    let (mut third, image) = index("262144", &image);
    let third = ran(third.args(["push", "-q", "--existing-index", "allow", &image])).ok().text().trim().to_owned();
    proxy.release();
    let second = second.wait_with_output().unwrap();
    assert!(second.status.success());
    let second = String::from_utf8(second.stdout).unwrap().trim().to_owned();
    let statuses: Vec<u16> =
        proxy.take_seen().iter().filter(|s| format!("{} {}", s.method, s.path) == tag).map(|s| s.status).collect();
    assert_eq!(statuses, [412, 201], "the first attempt was refused, the second took what had been added into account");
    let all = listed(&registry, "lab/noise", &manifest);
    assert!(all.len() == 3 && [first, second, third].iter().all(|one| all.contains(one)), "{all:?}");
}

#[test]
fn privileged_a_push_gets_through_trouble_and_logs_in() {
    let lab = Lab::new(Version::V22);
    let (_root, registry) = lab.registry(Kind::Distribution3);
    let layout = lab.root.join("layout");
    noisy(&layout, 24);
    registry.push(&layout, "lab/noise", "v1");
    let proxy = Proxy::start(&registry.host);
    // containerd has the image under the proxy's name.
    let image = proxy.reference("lab/noise", "v1");
    lab.fetch(&image);
    lab.soci(["create", "--min-layer-size", "0", "--span-size", "65536", &image]).ok();
    proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(1) }));
    for fault in ["POST /v2/lab/noise/blobs/uploads", "PUT /v2/lab/noise/blobs/uploads", "PUT /v2/lab/noise/manifests"]
    {
        proxy.rule(Rule::all(Fault::Status(503)).containing(fault).times(2));
    }
    proxy.rule(Rule::all(Fault::Status(502)).containing("PATCH ").times(1).after(1));
    let pushed = lab.soci(["push", "-q", "--user", "me:secret", &image]).ok();
    let (manifest, _) = image_manifest(&layout);
    assert_eq!(listed(&registry, "lab/noise", &manifest), [pushed.text().trim()]);
    let seen = proxy.take_seen();
    let statuses: Vec<u16> = seen.iter().filter(|s| s.method == "PATCH").map(|s| s.status).collect();
    assert!(statuses.len() > 1 && statuses.contains(&502), "it was sent in pieces: {statuses:?}");
    // What the registry says no to is said, with what to do.
    proxy.rule(Rule::all(Fault::Status(403)).containing("HEAD "));
    let refused = lab.soci(["push", "--existing-index", "allow", &image]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("access denied") && refused.stderr.contains("docker login"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("secret"));
}

#[test]
fn privileged_the_image_itself_goes_up_if_the_registry_lacks_it() {
    let lab = Lab::new(Version::V22);
    let (_root, from) = lab.registry(Kind::Docker28);
    let (_root2, to) = lab.registry(Kind::Docker28);
    let layout = lab.root.join("layout");
    noisy(&layout, 12);
    from.push(&layout, "lab/noise", "v1");
    lab.fetch(&from.reference("lab/noise", "v1"));
    let image = to.reference("lab/copy", "v1");
    crate::support::command::output(lab.containerd.ctr().args([
        "images",
        "tag",
        &from.reference("lab/noise", "v1"),
        &image,
    ]));
    lab.soci(["create", "--min-layer-size", "0", &image]).ok();
    lab.soci(["push", &image]).ok();
    let (manifest, _) = image_manifest(&layout);
    assert_eq!(listed(&to, "lab/copy", &manifest).len(), 1);
    let (status, _) = get(&format!("http://{}/v2/lab/copy/manifests/{manifest}", to.host));
    assert_eq!(status, 200);
}

/// `soci convert --registry --min-layer-size 0 MORE… FROM TO`, without any containerd.
fn convert(from: &str, to: &str, more: &[&str]) -> super::Ran {
    let args =
        ["--address", "/nonexistent", "--root", "/nonexistent/root", "convert", "--registry", "--min-layer-size", "0"];
    super::soci(args.iter().chain(more).chain(&[from, to]))
}

#[test]
fn privileged_a_conversion_between_registries_is_that_of_a_layout() {
    let slot = crate::support::slot::Slot::take();
    let layouts = golden();
    let name = "two_platforms_all";
    for (source, target) in [
        (Kind::Docker28, Kind::Distribution3),
        (Kind::Distribution3, Kind::Referrers),
        (Kind::Referrers, Kind::Docker28),
    ] {
        let (a, b) = (slot.root(), slot.root());
        let (from, to) = (Registry::start(source, &a), Registry::start(target, &b));
        from.push(&case(&layouts, name), "two", "v1");
        let proxy = Proxy::start(&to.host);
        let (image, other) = (from.reference("two", "v1"), proxy.reference("somewhere/else", "soci"));
        let out = a.join("out");
        let want =
            super::convert(&case(&layouts, name), &out, &["--all-platforms", "--json", "--min-layer-size", "100000"])
                .ok();
        let want: Value = serde_json::from_str(want.text()).unwrap();
        let more = ["--all-platforms", "--json", "--min-layer-size", "100000"];
        let got = convert(&image, &other, &more).ok();
        let got: Value = serde_json::from_str(got.text()).unwrap();
        assert_eq!(got["image"], want["image"], "{source:?} {target:?}");
        assert_eq!(got["platforms"], want["platforms"]);
        // All of it is there, byte for byte.
        let index: Index =
            serde_json::from_str(&get(&format!("http://{}/v2/somewhere/else/manifests/soci", to.host)).1).unwrap();
        let local: Index = read_json(&crate::support::registry::blob_path(
            &out,
            &want["image"]["digest"].as_str().unwrap().parse().unwrap(),
        ));
        assert_eq!(index, local);
        for manifest in &index.manifests {
            let (status, text) = get(&format!("http://{}/v2/somewhere/else/manifests/{}", to.host, manifest.digest));
            assert_eq!((status, Digest::of(text.as_bytes())), (200, manifest.digest));
            let manifest: soci::oci::Manifest = serde_json::from_str(&text).unwrap();
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                let (status, _) = get(&format!("http://{}/v2/somewhere/else/blobs/{}", to.host, blob.digest));
                assert_eq!(status, 200, "{}", blob.digest);
            }
        }
        // Again: the same, and nothing is sent.
        proxy.take_seen();
        let again = convert(&image, &other, &more[..1].iter().chain(&more[2..]).copied().collect::<Vec<_>>()).ok();
        assert_eq!(again.text().matches("(already exists)").count(), 2, "{}", again.text());
        let sent: Vec<_> =
            proxy.take_seen().into_iter().filter(|s| !matches!(s.method.as_str(), "GET" | "HEAD")).collect();
        assert!(sent.is_empty(), "{sent:?}");
    }
}

#[test]
fn privileged_layers_stream_once_and_only_what_is_new_is_sent() {
    let slot = crate::support::slot::Slot::take();
    let (a, b) = (slot.root(), slot.root());
    let (from, to) = (Registry::start(Kind::Docker28, &a), Registry::start(Kind::Docker28, &b));
    let layout = a.join("layout");
    noisy(&layout, 20);
    from.push(&layout, "lab/noise", "v1");
    let (_, manifest) = image_manifest(&layout);
    let bytes: u64 = manifest.layers.iter().map(|l| l.size).sum();
    let (source, target) = (Proxy::start(&from.host), Proxy::start(&to.host));
    let (image, other) = (source.reference("lab/noise", "v1"), target.reference("lab/noise", "soci"));
    // Downloads break off, uploads meet trouble.
    let large = manifest.layers.iter().max_by_key(|l| l.size).unwrap();
    source.rule(Rule::blobs(Fault::Truncate(3 << 20)).containing(&large.digest.to_string()).times(3));
    target.rule(Rule::all(Fault::Status(503)).containing("PATCH ").times(2).after(1));
    convert(&image, &other, &[]).ok();
    let downloaded: u64 = source.take_seen().iter().filter(|s| s.path.contains("/blobs/")).map(|s| s.bytes).sum();
    assert!(downloaded < bytes + (1 << 20), "{downloaded} bytes for {bytes}");
    target.take_seen();
    // Another tag of the same repository: the layers are there and are read to be indexed, nothing more; this time with other spans.
    let third = target.reference("lab/noise", "other");
    convert(&other, &third, &["--span-size", "1048576"]).ok();
    let seen = target.take_seen();
    assert!(seen.iter().all(|s| s.method != "PATCH"), "layers were sent again");
    // Another repository of the same registry: mounted, not sent.
    let fourth = target.reference("lab/elsewhere", "soci");
    convert(&other, &fourth, &[]).ok();
    let seen = target.take_seen();
    let mounts = seen.iter().filter(|s| s.path.contains("mount=") && s.status == 201).count();
    assert!(mounts >= manifest.layers.len(), "{mounts}");
    assert!(seen.iter().all(|s| s.method != "PATCH"));
}

#[test]
fn privileged_an_index_is_made_in_the_registry_alone() {
    for kind in KINDS {
        let slot = crate::support::slot::Slot::take();
        let root = slot.root();
        let registry = Registry::start(kind, &root);
        let layout = root.join("layout");
        noisy(&layout, 12);
        registry.push(&layout, "lab/noise", "v1");
        let image = registry.reference("lab/noise", "v1");
        let (manifest, _) = image_manifest(&layout);
        let create = |more: &[&str]| {
            let args = ["--root", "/nonexistent/root", "create", "--registry", "--min-layer-size", "0"];
            super::soci(args.iter().chain(more).chain(&[image.as_str()]))
        };
        let made = create(&["--quiet"]).ok();
        assert_eq!(listed(&registry, "lab/noise", &manifest), [made.text().trim()], "{kind:?}");
        let again = create(&[]).ok();
        assert_eq!(again.text().matches("(already exists)").count(), 3, "{}", again.text());
        assert_eq!(listed(&registry, "lab/noise", &manifest).len(), 1);
        // The one that containerd would have been asked for is the same.
        let lab = Lab::new(Version::V16);
        lab.fetch(&image);
        let local = lab.soci(["create", "--quiet", "--min-layer-size", "0", &image]).ok();
        assert_eq!(local.text(), made.text());
    }
}

#[test]
fn privileged_what_cannot_be_had_from_a_registry_is_named() {
    let slot = crate::support::slot::Slot::take();
    let root = slot.root();
    let registry = Registry::start(Kind::Docker28, &root);
    let to = registry.reference("a", "soci");
    convert(&registry.reference("nothing", "here"), &to, &[])
        .failed(&[&registry.reference("nothing", "here"), "not found"]);
    convert("lab/UPPER", &to, &[]).failed(&["invalid image reference \"docker.io/lab/UPPER\"", "lower-case"]);
    convert(&registry.reference("a", "v1"), "b", &[]).failed(&["the destination image must be a tagged ref"]);
    let layouts = golden();
    let manifest = registry.push(&case(&layouts, "single"), "gold", "v1");
    let gold = registry.reference("gold", "v1");
    convert(&gold, &to, &["--platform", "linux/arm64"])
        .failed(&["image manifest for linux/arm64: not found", "linux/amd64"]);
    let empty = convert(&gold, &to, &["--min-layer-size", "100000000"]);
    assert_eq!(empty.code, 1);
    assert!(
        empty.stderr.contains("no ztocs created") && empty.stderr.contains("--min-layer-size 4115789"),
        "{}",
        empty.stderr
    );
    // By digest, and into the same place.
    let by_digest = format!("{}@{manifest}", gold.trim_end_matches(":v1"));
    convert(&by_digest, &gold, &[]).ok();
    let stopped = super::soci(["convert", "--registry", "--standalone", "a", "b"]);
    assert_eq!(stopped.code, 1, "{}", stopped.stderr);
}

/// Uploads whose bytes a registry with its data in `root` keeps, in case somebody goes on with them.
fn uploads(root: &Path) -> usize {
    let uploads = root.join("docker/registry/v2/repositories/lab/noise/_uploads");
    let begun = std::fs::read_dir(uploads).into_iter().flatten().flatten();
    begun.filter(|upload| upload.path().join("data").exists()).count()
}

/// Numbers of bytes that went up, and which blobs were completed.
fn sent(seen: &[Seen]) -> (u64, Vec<&str>) {
    let up = seen.iter().filter(|s| matches!(s.method.as_str(), "PATCH" | "PUT") && s.path.contains("/uploads/"));
    let digest = |path: &str| Some(path.find("digest=")? + "digest=".len());
    let complete = seen.iter().filter(|s| s.method == "PUT" && s.status == 201);
    (up.map(|s| s.received).sum(), complete.filter_map(|s| digest(&s.path).map(|at| &s.path[at..])).collect())
}

#[test]
fn privileged_after_a_kill_only_what_had_not_arrived_is_sent() {
    let slot = crate::support::slot::Slot::take();
    let (a, b, home) = (slot.root(), slot.root(), tempfile::tempdir().unwrap());
    let (from, to) = (Registry::start(Kind::Distribution3, &a), Registry::start(Kind::Distribution3, &b));
    let layout = a.join("layout");
    let layers = (0..6).map(|n| {
        let mut layer = Layer::new();
        layer.file(format!("noise-{n}"), noise(n, (10 + 4 * n as usize) << 20));
        layer
    });
    Image::new([busybox()].into_iter().chain(layers).collect()).write(&layout);
    from.push(&layout, "lab/noise", "v1");
    let (_, manifest) = image_manifest(&layout);
    let all: u64 = manifest.layers.iter().map(|layer| layer.size).sum();
    let (source, target) = (Proxy::start(&from.host), Proxy::start(&to.host));
    source.shape(8 << 20, Duration::ZERO);
    let (image, other) = (source.reference("lab/noise", "v1"), target.reference("lab/noise", "soci"));
    let mut soci = super::command();
    soci.args(["convert", "--registry", "--quiet", "--min-layer-size", "0", &image, &other]);
    soci.env("HOME", home.path()).env("TMPDIR", home.path()).current_dir(home.path());
    let mut running = soci.spawn().unwrap();
    // In the middle: some layers are there, others under way.
    let mut before = Vec::new();
    let until = std::time::Instant::now() + Duration::from_secs(120);
    while sent(&before).1.len() < 4 {
        assert!(std::time::Instant::now() < until, "nothing arrives");
        std::thread::sleep(Duration::from_millis(20));
        before.extend(target.take_seen());
    }
    running.kill().unwrap();
    running.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    before.extend(target.take_seen());
    assert_eq!(get(&format!("http://{}/v2/lab/noise/manifests/soci", to.host)).0, 404, "half an image has no name");
    let (_, done) = sent(&before);
    let arrived: u64 = manifest
        .layers
        .iter()
        .filter(|l| done.iter().any(|d| d.contains(l.digest.hex().as_str())))
        .map(|l| l.size)
        .sum();
    assert!(arrived > 10 << 20 && arrived < all, "{arrived} of {all}");
    source.shape(0, Duration::ZERO);
    let again = convert(&image, &other, &["--quiet"]).ok();
    let seen = target.take_seen();
    let (bytes, second) = sent(&seen);
    assert!(second.iter().all(|digest| !done.contains(digest)), "sent twice: {done:?}, then {second:?}");
    // The rest, zTOCs and the configuration.
    assert!(bytes <= all - arrived + (2 << 20), "{bytes} bytes, when {} were missing", all - arrived);
    let want = super::convert(&layout, &b.join("out"), &["--quiet"]).ok();
    assert_eq!(again.text(), want.text());
    assert_eq!(super::names(home.path()), Vec::<String>::new(), "nothing is kept on this machine, so nothing is left");
}

#[test]
fn privileged_an_interrupted_conversion_is_completed_by_the_next_one() {
    let slot = crate::support::slot::Slot::take();
    let (a, b) = (slot.root(), slot.root());
    let (from, to) = (Registry::start(Kind::Distribution3, &a), Registry::start(Kind::Distribution3, &b));
    let layout = a.join("layout");
    noisy(&layout, 40);
    from.push(&layout, "lab/noise", "v1");
    let source = Proxy::start(&from.host);
    source.shape(20 << 20, Duration::ZERO);
    let target = Proxy::start(&to.host);
    let (image, other) = (source.reference("lab/noise", "v1"), target.reference("lab/noise", "soci"));
    let mut soci = super::command();
    soci.args(["convert", "--registry", "--min-layer-size", "0", &image, &other]);
    let mut running = soci.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(running.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    let status = running.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(2), "{status}");
    assert_eq!(get(&format!("http://{}/v2/lab/noise/manifests/soci", to.host)).0, 404, "half an image has no name");
    assert_eq!(uploads(&b.join("registry")), 0, "what was under way was taken back");
    source.shape(0, Duration::ZERO);
    let digest = convert(&image, &other, &["--quiet"]).ok();
    let want = super::convert(&layout, &b.join("out"), &["--quiet"]).ok();
    assert_eq!(digest.text(), want.text());
}
