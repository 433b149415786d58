//! `soci convert --standalone`: what goes in, what comes out, and what is left alone.

use super::{LAYER, Layout, TAR, convert, gzip, layer, names, platform, soci, tarball};
use serde_json::Value;
use soci::oci::{Descriptor, Digest, Manifest, annotation, media_type};
use std::{
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

/// A layout with an image for amd64 and one for arm64 that share a layer.
fn two_platforms(path: &Path) -> (Layout, [Descriptor; 2]) {
    let image = Layout::new(path);
    let shared = image.blob(LAYER, &layer("shared", b"the same in both"));
    let manifests = ["amd64", "arm64"].map(|architecture| {
        let own = image.blob(LAYER, &layer("own", architecture.as_bytes()));
        image.image(&format!("linux/{architecture}"), vec![shared.clone(), own])
    });
    (image, manifests)
}

fn named(descriptor: &Descriptor, name: &str) -> Descriptor {
    Descriptor { platform: platform(name), ..descriptor.clone() }
}

fn platforms(layout: &Layout) -> Vec<String> {
    layout.converted().manifests.iter().map(|e| e.platform.as_ref().map_or("-".into(), ToString::to_string)).collect()
}

#[test]
fn platforms_that_no_descriptor_names_come_from_the_image_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, arm]) = two_platforms(&dir.path().join("in"));
    // The Go CLI refuses both: "manifest should have proper platform".
    for nested in [true, false] {
        let manifests = vec![amd.clone(), arm.clone()];
        if nested {
            image.list(manifests)
        } else {
            image.top(manifests)
        }
        let out = Layout(dir.path().join(format!("out-{nested}")));
        convert(&image.0, &out.0, &["--all-platforms"]).ok();
        assert_eq!(platforms(&out), ["linux/amd64", "linux/arm64", "linux/amd64", "linux/arm64"]);
        convert(&image.0, &out.0, &["--platform", "linux/arm64/v8"]).ok();
        assert_eq!(platforms(&out), ["linux/amd64", "linux/arm64", "linux/arm64/v8"]);
    }
    convert(&image.0, &dir.path().join("none"), &["--platform", "linux/s390x"])
        .failed(&["image manifest for linux/s390x: not found (the image is for: linux/amd64, linux/arm64)"]);
}

#[test]
fn a_layer_that_two_platforms_share_is_built_once_and_lines_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, arm]) = two_platforms(&dir.path().join("in"));
    image.list(vec![named(&amd, "linux/amd64"), named(&arm, "linux/arm64")]);
    let mut outputs = Vec::new();
    for _ in 0..3 {
        let ran = convert(&image.0, &dir.path().join("out"), &["--all-platforms"]).ok();
        outputs.push(ran.text().to_owned());
    }
    assert!(outputs.iter().all(|o| *o == outputs[0]));
    let lines: Vec<&str> = outputs[0].lines().collect();
    let manifests = [amd, arm].map(|m| image.read::<Manifest>(m.digest));
    let layers = manifests.iter().flat_map(|m| &m.layers);
    for (line, layer) in lines.iter().zip(layers) {
        assert!(line.starts_with(&format!("layer {} -> ztoc sha256:", layer.digest)), "{line}");
    }
    let exists: Vec<bool> = lines.iter().map(|line| line.ends_with(" (already exists)")).collect();
    assert_eq!(exists, [false, false, true, false]);
    let forced = convert(&image.0, &dir.path().join("out"), &["--all-platforms", "--force"]).ok();
    assert_eq!(forced.text().replace(" (already exists)", ""), outputs[0].replace(" (already exists)", ""));
    assert!(!forced.text().contains("already exists"));
}

#[test]
fn converting_one_platform_again_leaves_the_index_of_the_other_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, arm]) = two_platforms(&dir.path().join("in"));
    image.list(vec![named(&amd, "linux/amd64"), named(&arm, "linux/arm64")]);
    let (first, second) = (Layout(dir.path().join("first")), Layout(dir.path().join("second")));
    convert(&image.0, &first.0, &["--all-platforms"]).ok();
    convert(&first.0, &second.0, &["--platform", "linux/arm64", "--optimizations", "xattr"]).ok();
    let (before, after) = (first.converted().manifests, second.converted().manifests);
    assert_eq!((before.len(), after.len()), (4, 4));
    assert_eq!(before[0], after[0]);
    assert_eq!(before[2], after[2], "the Go CLI turns this SOCI index into something else");
    assert_ne!(before[3].digest, after[3].digest);
    let index: Manifest = second.read(after[2].digest);
    assert_eq!(index.config.media_type, media_type::SOCI_INDEX_V2);
    assert_eq!(after[1].annotations[annotation::INDEX_DIGEST], after[3].digest.to_string());
}

#[test]
fn artifacts_and_nested_indexes_are_carried_over_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, arm]) = two_platforms(&dir.path().join("in"));
    let config = image.blob("application/vnd.example.artifact", b"{}");
    let artifact = image.manifest(config, vec![image.blob("text/plain", b"a signature")]);
    let list = serde_json::to_vec(&Layout::index_of(vec![arm])).unwrap();
    let nested = image.blob(media_type::OCI_INDEX, &list);
    image.list(vec![named(&amd, "linux/amd64"), artifact.clone(), nested.clone()]);
    let out = Layout(dir.path().join("out"));
    convert(&image.0, &out.0, &["--platform", "linux/amd64"]).ok();
    let entries = out.converted().manifests;
    assert_eq!((&entries[1], &entries[2], entries.len()), (&artifact, &nested, 4));
}

#[test]
fn layers_that_cannot_be_indexed_are_left_alone_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let good = layer("good", b"good");
    let mut sparse = tarball(&[("sparse", b"")]);
    sparse[156] = b'S';
    sparse[148..156].copy_from_slice(b"        ");
    let sum: u32 = sparse[..512].iter().map(|b| u32::from(*b)).sum();
    sparse[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let odd = [
        (LAYER, gzip(&sparse)),
        (LAYER, [good.as_slice(), b"garbage"].concat()),
        (LAYER, good[..good.len() - 9].to_vec()),
        (LAYER, b"plain text".to_vec()),
        (TAR, gzip(b"not a tar")),
        ("application/vnd.in-toto+json", b"{}".to_vec()),
        ("application/vnd.oci.image.layer.v2.future", b"?".to_vec()),
    ];
    let mut layers: Vec<Descriptor> = odd.iter().map(|(kind, bytes)| image.blob(kind, bytes)).collect();
    layers.push(image.blob(LAYER, &good));
    let manifest = image.image("linux/amd64", layers.clone());
    image.top(vec![manifest]);
    let out = Layout(dir.path().join("out"));
    let ran = convert(&image.0, &out.0, &[]).ok();
    assert_eq!(ran.text().lines().count(), 1);
    for layer in &layers[..odd.len()] {
        let warning = format!("layer {} is left without a ztoc: ", layer.digest);
        assert_eq!(ran.stderr.matches(&warning).count(), 1, "{}", ran.stderr);
    }
    assert_eq!(out.soci_index().layers.len(), 1);
    // Everything is still there, as it was.
    assert!(layers.iter().all(|l| std::fs::read(out.blob_path(l.digest)).is_ok_and(|b| Digest::of(&b) == l.digest)));

    let none = image.image("linux/amd64", layers[..odd.len()].to_vec());
    image.top(vec![none]);
    convert(&image.0, &dir.path().join("none"), &[])
        .failed(&["no ztocs created, all layers either skipped or produced errors"]);
    assert!(!dir.path().join("none").exists());
}

#[test]
fn json_is_one_document_with_the_digests_that_pipelines_want() {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let layers = vec![
        image.blob(LAYER, &layer("etc/a", b"a")),
        image.blob("application/vnd.oci.image.layer.v1.tar+zstd", b"whatever"),
        image.blob(LAYER, b"broken"),
    ];
    let manifest = image.image("linux/amd64", layers.clone());
    image.top(vec![manifest.clone()]);
    let out = Layout(dir.path().join("out"));
    let ran = convert(&image.0, &out.0, &["--json", "--prefetch-file", "/etc/a", "--prefetch-file", "nope"]).ok();
    let got: Value = serde_json::from_slice(&ran.stdout).unwrap();
    let top: Value = serde_json::from_slice(&std::fs::read(out.0.join("index.json")).unwrap()).unwrap();
    let entries = out.converted().manifests;
    assert_eq!(got["image"]["digest"], top["manifests"][0]["digest"]);
    assert_eq!(got["output"]["format"], "oci-dir");
    let platform = &got["platforms"][0];
    assert_eq!(platform["platform"], "linux/amd64");
    assert_eq!(platform["manifest"], entries[0].digest.to_string());
    assert_eq!(platform["original_manifest"], manifest.digest.to_string());
    assert_eq!(platform["soci_index"], entries[1].digest.to_string());
    let statuses: Vec<&Value> = platform["layers"].as_array().unwrap().iter().map(|l| &l["status"]).collect();
    assert_eq!(statuses, ["indexed", "skipped", "failed"]);
    let index = out.soci_index();
    assert_eq!(platform["layers"][0]["ztoc"], index.layers[0].digest.to_string());
    assert_eq!(platform["layers"][0]["prefetch"], index.layers[1].digest.to_string());
    assert_eq!(got["warnings"].as_array().unwrap().len(), 2);
}

#[test]
fn prefetch_files_can_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let blob = image.blob(LAYER, &layer("etc/a", b"a"));
    let manifest = image.image("linux/amd64", vec![blob]);
    image.top(vec![manifest]);
    let list = dir.path().join("list.json");
    std::fs::write(&list, r#"[" /etc/a ", "", "nope"]"#).unwrap();
    let out = dir.path().join("out");
    let ran = convert(&image.0, &out, &["--prefetch-files-json", list.to_str().unwrap()]).ok();
    assert!(ran.text().contains("Created prefetch artifact for layer "), "{}", ran.text());
    assert!(ran.stderr.contains("prefetch file nope not found in any layer"), "{}", ran.stderr);
    std::fs::write(&list, r#"{"not":"an array"}"#).unwrap();
    convert(&image.0, &out, &["--prefetch-files-json", list.to_str().unwrap()])
        .failed(&["failed to parse prefetch files: "]);
}

#[test]
fn inputs_that_are_not_layouts_are_named_as_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let manifest = br#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    put("skopeo/version", b"Directory Transport Version: 1.1\n");
    put("skopeo/manifest.json", manifest);
    put("docker/manifest.json", b"[]");
    put("store/blobs/x", b"");
    put("store/ingest/x", b"");
    put("blobs-only/blobs/x", b"");
    put("other/file", b"");
    put("future/oci-layout", br#"{"imageLayoutVersion":"2.0.0"}"#);
    put("future/index.json", b"{}");
    put("broken/index.json", b"{");
    let mut rootfs = tarball(&[("x", b"")]);
    rootfs[..3].copy_from_slice(b"etc");
    rootfs[156] = b'5';
    rootfs[148..156].copy_from_slice(b"        ");
    let sum: u32 = rootfs[..512].iter().map(|b| u32::from(*b)).sum();
    rootfs[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    put("docker.tar", &tarball(&[("manifest.json", b"[]"), ("repositories", b"{}"), ("x/layer.tar", b"")]));
    put("nested.tar", &tarball(&[("image/index.json", b"{}"), ("image/oci-layout", b"{}")]));
    put("rootfs.tar", &rootfs);
    put("something.tar", &tarball(&[("readme", b"")]));
    put("layout.tar.gz", &gzip(&tarball(&[("index.json", b"{}")])));
    put("layout.tar.zst", b"\x28\xb5\x2f\xfd....");
    put("manifest.json", manifest);
    put("index.json", br#"{"schemaVersion":2,"manifests":[]}"#);
    put("nothing", b"");
    put("program", b"\x7fELF and so on");
    for (name, parts) in [
        ("empty", &["the directory is empty"][..]),
        ("skopeo", &["skopeo's dir: transport", "skopeo copy"]),
        ("docker", &["unpacked Docker archive", "skopeo copy"]),
        ("store", &["containerd's content store", "ctr images export"]),
        ("blobs-only", &["no index.json"]),
        ("other", &["not an OCI layout"]),
        ("docker.tar", &["Docker archive", "docker save", "skopeo copy docker-archive:"]),
        ("nested.tar", &["in the directory \"image\""]),
        ("rootfs.tar", &["root filesystem"]),
        ("something.tar", &["no index.json"]),
        ("layout.tar.gz", &["compressed with gzip", "gzip -dc"]),
        ("layout.tar.zst", &["compressed with zstd"]),
        ("manifest.json", &["single image manifest"]),
        ("index.json", &["single image index"]),
        ("nothing", &["the file is empty"]),
        ("program", &["neither a directory nor a tar file"]),
    ] {
        let mut all = vec!["failed to read index.json from "];
        all.extend(parts);
        convert(&dir.path().join(name), &dir.path().join("out"), &[]).failed(&all);
    }
    convert(&dir.path().join("future"), &dir.path().join("out"), &[]).failed(&["version \"2.0.0\""]);
    convert(&dir.path().join("broken"), &dir.path().join("out"), &[]).failed(&["index.json"]);
    convert(&dir.path().join("absent"), &dir.path().join("out"), &[]).failed(&["failed to access input "]);
    convert(Path::new("/dev/null"), &dir.path().join("out"), &[]).failed(&["neither a directory nor a regular file"]);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn an_existing_destination_is_replaced_only_if_it_is_a_layout_or_empty() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, _]) = two_platforms(&dir.path().join("in"));
    image.top(vec![amd]);
    // The Go CLI deletes whatever directory it is given.
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("thesis.txt"), "years of work").unwrap();
    convert(&image.0, &home, &[]).failed(&["\"thesis.txt\"", "it is not replaced"]);
    assert_eq!(names(&home), ["thesis.txt"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    convert(&image.0, &file, &[]).failed(&["is a file"]);
    soci(["convert", "--standalone", image.0.to_str().unwrap(), home.to_str().unwrap()]).failed(&["is a directory"]);
    convert(&image.0, &dir.path().join("no/such/place"), &[]).failed(&["a directory that does not exist"]);

    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    convert(&image.0, &empty, &[]).ok();
    let stale = empty.join("blobs/sha256").join("0".repeat(64));
    std::fs::write(&stale, "stale").unwrap();
    convert(&image.0, &empty, &[]).ok();
    assert!(!stale.exists());
    assert_eq!(names(&empty), ["blobs", "index.json", "oci-layout"]);
    // Onto itself, and by way of a link.
    let link = dir.path().join("link");
    symlink(&empty, &link).unwrap();
    let before = std::fs::read(empty.join("index.json")).unwrap();
    convert(&empty, &link, &[]).ok();
    assert!(link.is_symlink());
    assert_eq!(std::fs::read(empty.join("index.json")).unwrap(), before);
    assert_eq!(names(dir.path()), ["empty", "file", "home", "in", "link"]);
}

#[test]
fn a_pipe_can_take_the_archive() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, _]) = two_platforms(&dir.path().join("in"));
    image.top(vec![amd]);
    let (source, file) = (image.0.to_str().unwrap(), dir.path().join("out.tar"));
    let convert = |out: &str| soci(["convert", "--standalone", "--min-layer-size", "0", source, out]).ok();
    let lines = convert(file.to_str().unwrap());
    let piped = convert("/dev/stdout");
    assert_eq!(piped.stdout, std::fs::read(&file).unwrap());
    assert_eq!(piped.stderr, lines.text());
    assert_eq!(names(dir.path()), ["in", "out.tar"]);
}

#[test]
fn blobs_are_not_copied_where_a_second_name_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let (image, [amd, _]) = two_platforms(&dir.path().join("in"));
    image.top(vec![amd.clone()]);
    let shared = image.read::<Manifest>(amd.digest).layers[0].digest;
    let mode =
        |mode| std::fs::set_permissions(image.blob_path(shared), std::os::unix::fs::PermissionsExt::from_mode(mode));
    let out = Layout(dir.path().join("out"));
    let same = || {
        convert(&image.0, &out.0, &[]).ok();
        let inode = |l: &Layout| std::fs::metadata(l.blob_path(shared)).unwrap().ino();
        inode(&image) == inode(&out)
    };
    mode(0o444).unwrap();
    assert!(same());
    // Others could change the file afterwards.
    mode(0o666).unwrap();
    assert!(!same());
    assert_eq!(std::fs::read(out.blob_path(shared)).unwrap(), std::fs::read(image.blob_path(shared)).unwrap());
}
