//! Images in containerd: what is kept and what is collected, converting, both stores, the database, stopping.

use super::lab::{Lab, case, eventually, golden, ran};
use crate::support::{
    command::output,
    containerd::Version,
    image::{Image, Layer, busybox, everything, noise},
    registry::Kind,
    tool,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use soci::oci::Digest;
use std::{
    process::{Command, Stdio},
    time::Duration,
};

const TWO: [&str; 3] = ["--all-platforms", "--min-layer-size", "100000"];

/// The golden image of two platforms, in containerd under this name.
fn two_platforms(lab: &Lab) -> (String, tempfile::TempDir) {
    let layouts = golden();
    let (_root, registry) = lab.registry(Kind::Docker28);
    registry.push(&case(&layouts, "two_platforms_all"), "two", "v1");
    let reference = registry.reference("two", "v1");
    lab.fetch(&reference);
    (reference, layouts)
}

#[test]
fn privileged_every_platforms_index_is_kept_with_its_image_and_goes_with_it() {
    for version in [Version::V16, Version::V22] {
        let lab = Lab::new(version);
        let (image, _layouts) = two_platforms(&lab);
        lab.soci(["create"].into_iter().chain(TWO).chain([image.as_str()])).ok();
        let indexes = lab.soci(["index", "ls", "-q"]).ok();
        let indexes: Vec<&str> = indexes.text().lines().collect();
        assert_eq!(indexes.len(), 2, "{version:?}");
        let ztocs = lab.soci(["ztoc", "ls", "-q"]).ok();
        assert_eq!(ztocs.text().lines().count(), 2);
        lab.collect();
        for digest in indexes.iter().copied().chain(ztocs.text().lines()) {
            assert!(lab.has(digest), "{version:?}: {digest} was collected");
        }
        let listed = lab.soci(["index", "ls", "--ref", &image, "--platform", "linux/arm64"]).ok();
        assert_eq!(listed.text().lines().count(), 2, "{}", listed.text());
        output(lab.containerd.ctr().args(["images", "rm", "--sync", &image]));
        lab.collect();
        for digest in indexes.iter().copied().chain(ztocs.text().lines()) {
            assert!(!lab.has(digest), "{version:?}: {digest} outlived its image");
        }
        // What is gone is forgotten.
        lab.soci(["rebuild-db"]).ok();
        assert_eq!(lab.soci(["index", "ls", "-q"]).ok().text(), "");
        assert_eq!(lab.soci(["ztoc", "ls", "-q"]).ok().text(), "");
    }
}

#[test]
fn privileged_a_removed_index_goes_and_a_shared_ztoc_stays() {
    let lab = Lab::new(Version::V22);
    let (image, _layouts) = two_platforms(&lab);
    lab.soci(["create"].into_iter().chain(TWO).chain([image.as_str()])).ok();
    let other = image.replace(":v1", ":soci");
    lab.soci(["convert"].into_iter().chain(TWO).chain([image.as_str(), &other])).ok();
    let ztocs = lab.soci(["ztoc", "ls", "-q"]).ok();
    lab.soci(["index", "rm", "--ref", &image]).ok();
    lab.collect();
    assert!(ztocs.text().lines().all(|digest| lab.has(digest)), "the converted image has them");
    let left = lab.soci(["index", "ls", "--json"]).ok();
    let left: serde_json::Value = serde_json::from_str(left.text()).unwrap();
    assert_eq!(left.as_array().unwrap().len(), 2);
    assert!(left[0]["version"] == "v2" && left[0]["images"][0] == other.as_str(), "{left}");
    lab.soci(["index", "rm", "--ref", &image, left[0]["digest"].as_str().unwrap()])
        .failed(&["please provide either index digests or image ref, but not both"]);
    lab.soci(["index", "rm", ztocs.text().lines().next().unwrap()]).failed(&["does not correspond to an index"]);
    let labels = output(lab.containerd.ctr().args(["images", "ls"]));
    assert!(!labels.contains("soci-index"), "{labels}");
}

#[test]
fn privileged_a_database_that_was_lost_is_built_again() {
    for store in ["containerd", "soci"] {
        let lab = Lab::new(Version::V16);
        let (image, _layouts) = two_platforms(&lab);
        let soci = |args: &[&str]| lab.soci(["--content-store", store].iter().chain(args)).ok();
        let create: Vec<&str> = ["create", "--prefetch-file", "/opt/app/config.json"]
            .into_iter()
            .chain(TWO)
            .chain([image.as_str()])
            .collect();
        soci(&create);
        let other = image.replace(":v1", ":soci");
        let convert: Vec<&str> = ["convert"].into_iter().chain(TWO).chain([image.as_str(), &other]).collect();
        soci(&convert);
        let lists = || {
            let lists = [&["index", "ls", "--json"][..], &["ztoc", "ls"], &["prefetch", "ls", "--json"]];
            lists.map(|list| {
                let text = soci(list).text().to_owned();
                let mut rows: Vec<String> = text.split("  {").map(without_time).collect();
                rows.sort_unstable();
                rows
            })
        };
        let before = lists();
        lab.bbolt();
        std::fs::remove_file(lab.state.join("artifacts.db")).unwrap();
        assert_eq!(soci(&["index", "ls", "-q"]).text(), "");
        soci(&["rebuild-db"]);
        assert_eq!(lists(), before, "{store}");
        assert_eq!(soci(&["index", "ls", "-q"]).text().lines().count(), 4);
    }
}

fn without_time(text: &str) -> String {
    let line = |line: &&str| !line.contains("reated") && !line.contains("LayerDigest") && !line.trim().is_empty();
    let lines: Vec<&str> = text.lines().filter(line).map(|l| l.trim_end_matches([',', ']', '}'])).collect();
    lines.join("\n").trim_end().to_owned()
}

#[test]
fn privileged_the_database_is_one_that_bbolt_reads_and_we_read_what_bbolt_writes() {
    let lab = Lab::new(Version::V16);
    let (image, _layouts) = two_platforms(&lab);
    lab.soci(["create"].into_iter().chain(TWO).chain([image.as_str()])).ok();
    let digests = lab.bbolt();
    assert_eq!(digests.len(), 4);
    let before = lab.soci(["index", "ls", "-q"]).ok();
    // Its own writer, with its list of free pages, makes a file of the same content.
    let database = lab.state.join("artifacts.db");
    let compacted = lab.state.join("compacted.db");
    output(Command::new(tool("bbolt")).args(["compact", "-o"]).arg(&compacted).arg(&database));
    std::fs::rename(&compacted, &database).unwrap();
    assert_eq!(lab.soci(["index", "ls", "-q"]).ok().text(), before.text());
    // And goes on from there, and again.
    for _ in 0..3 {
        lab.soci(["create", "--force"].into_iter().chain(TWO).chain([image.as_str()])).ok();
        assert_eq!(lab.bbolt(), digests);
    }
    assert_eq!(std::fs::metadata(&database).unwrap().len() % 4096, 0);
    // containerd's own database is one, too; what is in it is not ours.
    let theirs = lab.containerd.dir().join("root/io.containerd.metadata.v1.bolt/meta.db");
    std::fs::copy(theirs, &database).unwrap();
    assert_eq!(lab.soci(["ztoc", "ls", "-q"]).ok().text(), "");
    std::fs::write(&database, vec![0xff; 20_000]).unwrap();
    lab.soci(["ztoc", "ls"]).failed(&["artifacts.db is not available", "soci rebuild-db"]);
}

#[test]
fn privileged_a_converted_image_is_what_a_layout_gives_and_runs() {
    for (version, store) in [(Version::V16, "containerd"), (Version::V22, "soci")] {
        let lab = Lab::new(version);
        let layout = lab.root.join("layout");
        everything(2).write(&layout);
        let (_root, registry) = lab.registry(Kind::Docker28);
        registry.push(&layout, "lab/everything", "v1");
        let (image, other) = (registry.reference("lab/everything", "v1"), registry.reference("lab/everything", "soci"));
        lab.containerd.pull("overlayfs", &image).unwrap();
        let converted = super::convert(&layout, &lab.root.join("out"), &["--json"]).ok();
        let want: serde_json::Value = serde_json::from_str(converted.text()).unwrap();
        let convert = ["--content-store", store, "convert", "--min-layer-size", "0"];
        let got = lab.soci(convert.iter().chain(&["--json", image.as_str(), &other])).ok();
        let got: serde_json::Value = serde_json::from_str(got.text()).unwrap();
        assert_eq!(got["image"], want["image"]);
        assert_eq!(got["platforms"], want["platforms"]);
        lab.collect();
        let again = lab.soci(convert.iter().chain(&[image.as_str(), &other])).ok();
        let layers = want["platforms"][0]["layers"].as_array().unwrap();
        let layers = layers.iter().filter(|layer| layer["status"] == "indexed").count();
        assert_eq!(again.text().matches("(already exists)").count(), layers, "{}", again.text());
        // In its own place, too, which changes nothing any more.
        let digest = lab.soci(convert.iter().chain(&["--quiet", other.as_str(), &other])).ok();
        assert_eq!(digest.text().trim(), want["image"]["digest"].as_str().unwrap());
        let target = output(lab.containerd.ctr().args(["images", "ls", &format!("name=={other}")]));
        assert!(target.contains(digest.text().trim()), "{target}");
        // All of it is there to be pushed, and to run.
        output(lab.containerd.ctr().args(["images", "push", "--plain-http", &other]));
        assert_eq!(registry.log().matches("MANIFEST_BLOB_UNKNOWN").count(), 0);
        assert_eq!(lab.containerd.run("overlayfs", &image, &["cat", "/stack/replaced"]).unwrap(), "from above\n");
        let index = got["platforms"][0]["soci_index"].as_str().unwrap();
        lab.soci(["--content-store", store, "index", "info", index]).ok();
        let ztoc = got["platforms"][0]["layers"][0]["ztoc"].as_str().expect("busybox is indexed");
        let busybox = lab.soci(["--content-store", store, "ztoc", "get-file", ztoc, "bin/busybox"]).ok();
        assert_eq!(busybox.stdout, std::fs::read("/bin/busybox").unwrap());
    }
}

/// An image that takes a while to index.
fn heavy(lab: &Lab) -> String {
    let layers = (0..2).map(|n| {
        let mut layer = Layer::new();
        layer.file("noise", noise(n, 80 << 20));
        layer
    });
    let layout = lab.root.join("heavy");
    Image::new([busybox()].into_iter().chain(layers).collect()).write(&layout);
    let (_root, registry) = lab.registry(Kind::Docker28);
    registry.push(&layout, "heavy", "v1");
    let name = registry.reference("heavy", "v1");
    lab.fetch(&name);
    name
}

#[test]
fn privileged_a_command_that_is_stopped_leaves_nothing_behind() {
    for store in ["containerd", "soci"] {
        let lab = Lab::new(Version::V22);
        let image = heavy(&lab);
        let temporary = lab.root.dir("tmp");
        lab.collect();
        let before = lab.containerd.content();
        for (signal, command) in [(Signal::SIGINT, "create"), (Signal::SIGTERM, "convert"), (Signal::SIGKILL, "create")]
        {
            let mut soci = lab.command();
            soci.args(["--content-store", store, command, "--min-layer-size", "0", &image]).env("TMPDIR", &temporary);
            if command == "convert" {
                soci.arg("registry.example/heavy:soci");
            }
            let mut running = soci.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            eventually("it holds a lease", || !lab.leases().is_empty());
            std::thread::sleep(Duration::from_millis(100));
            kill(Pid::from_raw(running.id() as i32), signal).unwrap();
            let status = running.wait().unwrap();
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(signal as i32), "{status}");
            if signal == Signal::SIGKILL {
                // Nobody was left to give it back: containerd does, when its time has come.
                let lease = lab.leases().remove(0);
                assert!(lease.contains("containerd.io/gc.expire="), "{lease}");
                output(lab.containerd.ctr().args([
                    "leases",
                    "delete",
                    "--sync",
                    lease.split_whitespace().next().unwrap(),
                ]));
            } else {
                assert_eq!(lab.leases(), Vec::<String>::new(), "{command}");
                assert_eq!(blobs(&lab), 0, "{command}");
            }
            lab.collect();
            assert_eq!(lab.containerd.content(), before, "{command}");
            assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
            assert_eq!(lab.soci(["index", "ls", "-q"]).ok().text(), "");
        }
        let timed = lab.soci(["--timeout", "200ms", "create", "--quiet", "--min-layer-size", "0", &image]);
        timed.failed(&["context deadline exceeded"]);
        assert_eq!(lab.leases(), Vec::<String>::new());
    }
}

/// Files in the soci content store.
fn blobs(lab: &Lab) -> usize {
    std::fs::read_dir(lab.state.join("content/blobs/sha256")).map_or(0, |entries| entries.count())
}

#[test]
fn privileged_commands_at_the_same_time_lose_nothing() {
    let lab = Lab::new(Version::V22);
    let (image, _layouts) = two_platforms(&lab);
    let spans = ["65536", "131072", "262144", "524288"];
    std::thread::scope(|scope| {
        for span in spans {
            let (lab, image) = (&lab, &image);
            scope.spawn(move || {
                lab.soci(["create", "--span-size", span].into_iter().chain(TWO).chain([image.as_str()])).ok();
            });
        }
    });
    assert_eq!(lab.soci(["index", "ls", "-q"]).ok().text().lines().count(), 2 * spans.len());
    assert_eq!(lab.bbolt().len(), 4 * spans.len());
    assert_eq!(lab.leases(), Vec::<String>::new());
}

#[test]
fn privileged_a_prefetch_artifact_is_made_listed_and_shown() {
    let lab = Lab::new(Version::V16);
    let layouts = golden();
    lab.import(&case(&layouts, "prefetch"), "registry.example/prefetch:v1");
    let files = ["--prefetch-file", "/opt/app/m3.bin,opt/app/config.json", "--prefetch-file", "/nope"];
    let list = lab.root.join("files.json");
    std::fs::write(&list, r#"[" /usr/share/f7 ", ""]"#).unwrap();
    let image = "registry.example/prefetch:v1";
    let made = lab.soci(
        ["convert", "--min-layer-size", "0", "--prefetch-files-json", list.to_str().unwrap()]
            .into_iter()
            .chain(files)
            .chain([image, "registry.example/prefetch:soci"]),
    );
    let made = made.ok();
    assert!(made.stderr.contains("prefetch file nope not found in any layer"), "{}", made.stderr);
    let artifact = made.text().lines().find_map(|line| line.strip_prefix("Created prefetch artifact for layer "));
    let (layer, artifact) = artifact.unwrap().split_once(": ").unwrap();
    // The digest that the Go CLI gives it.
    let cases: serde_json::Value =
        serde_json::from_slice(&std::fs::read(layouts.path().join("convert/manifest.json")).unwrap()).unwrap();
    assert!(cases["prefetch"]["stdout"].as_str().unwrap().contains(artifact), "{}", made.text());
    let listed = lab.soci(["prefetch", "ls"]).ok();
    assert!(listed.text().starts_with("DIGEST ") && listed.text().contains(layer), "{}", listed.text());
    let json = lab.soci(["prefetch", "ls", "--json"]).ok();
    let json: serde_json::Value = serde_json::from_str(json.text()).unwrap();
    assert_eq!((&json[0]["Digest"], &json[0]["LayerDigest"]), (&artifact.into(), &layer.into()));
    assert!(json[0]["TotalSpans"].as_i64().unwrap() > 0 && json[0]["CreatedAt"].is_string(), "{json}");
    let info = lab.soci(["prefetch", "info", artifact]).ok();
    assert!(info.text().starts_with(&format!("Digest:        {artifact}\nVersion:       1.0\n")), "{}", info.text());
    assert!(info.text().contains("  [0] StartSpan: ") && info.text().contains("Total spans to prefetch: "));
    lab.soci(["prefetch", "info", &Digest::of(b"x").to_string()]).failed(&["couldn't retrieve artifact"]);
    let ztoc = lab.soci(["ztoc", "ls", "-q"]).ok();
    lab.soci(["prefetch", "info", ztoc.text().lines().next().unwrap()])
        .failed(&["the provided digest is not a prefetch artifact (type: soci_layer)"]);
}

#[test]
fn privileged_what_is_not_there_is_said_to_be_so() {
    let lab = Lab::new(Version::V16);
    let gone = lab.root.join("gone.sock");
    let soci =
        |args: &[&str]| ran(super::command().arg("--root").arg(&lab.state).arg("--address").arg(&gone).args(args));
    for args in [&["create", "a/b:c"][..], &["index", "ls"], &["push", "a/b:c"], &["rebuild-db"], &["prefetch", "ls"]] {
        soci(args).failed(&["cannot reach containerd at ", "gone.sock", "--address"]);
    }
    // This one needs none.
    assert_eq!(soci(&["ztoc", "ls", "-q"]).ok().text(), "");
    let deep = lab.root.join("no/such/parent");
    ran(super::command().arg("--root").arg(deep).args(["ztoc", "ls"])).failed(&["its parent must exist", "--root"]);
    lab.soci(["create", "nginx"]).failed(&["image \"nginx\": not found", "docker.io/library/NAME:TAG"]);
    lab.soci(["create", "--span-size", "1024", "a/b:c"]).failed(&["makes no sense", "65536", "134217728"]);
    lab.soci(["convert", "--span-size", "1073741824", "a/b:c", "a/b:d"]).failed(&["makes no sense"]);
    lab.soci(["--content-store", "bogus", "index", "ls"])
        .failed(&["unknown content store type: bogus; must be one of [soci containerd]"]);
    // An image of which a layer is missing is named with the layer.
    let layouts = golden();
    lab.import(&case(&layouts, "single"), "registry.example/gold:v1");
    let layer = "sha256:e3e6e61c0c8fc7d4a1989fb93d6d2e6b5b6693de167945b80528ef137bab9e7c";
    output(lab.containerd.ctr().args(["content", "rm", layer]));
    lab.soci(["convert", "registry.example/gold:v1", "registry.example/gold:v2"]).failed(&[
        "errors encountered while building soci layers; layer ",
        layer,
        "not found in containerd",
    ]);
    assert_eq!(lab.leases(), Vec::<String>::new());
}
