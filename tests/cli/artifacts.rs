//! `soci index info`, `soci ztoc info` and `soci ztoc get-file`, without containerd.

use super::{LAYER, Layout, TAR, convert, gzip, soci, tarball};
use serde_json::Value;
use soci::oci::{Digest, annotation, media_type};
use std::{os::unix::fs::PermissionsExt, path::PathBuf};

/// A converted image with one gzip and one plain layer; spans are small, so files cross them.
struct Image {
    _dir: tempfile::TempDir,
    layout: Layout,
    path: PathBuf,
    ztocs: Vec<Digest>,
    big: Vec<u8>,
}

fn image() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let source = Layout::new(dir.path().join("in"));
    // Text that compresses into many blocks, none like another.
    let big: Vec<u8> = (0u32..120_000).flat_map(|n| n.wrapping_mul(2_654_435_761).to_string().into_bytes()).collect();
    let files: [(&str, &[u8]); 3] = [("etc/hostname", b"h\n"), ("usr/big", &big), ("empty", b"")];
    let mut tarred = tarball(&files);
    // A symbolic link, a link to it, and a circle.
    for (name, target) in [("link", "usr/big"), ("link2", "link"), ("a", "b"), ("b", "a")] {
        let mut header = super::tar_header(name, 0);
        header[156] = b'2';
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let end = tarred.len() - 1024;
        tarred.splice(end..end, header);
    }
    let layers = vec![source.blob(LAYER, &gzip(&tarred)), source.blob(TAR, &tarred)];
    let manifest = source.image("linux/amd64", layers);
    source.top(vec![manifest]);
    let path = dir.path().join("out");
    convert(&source.0, &path, &["--span-size", "65536"]).ok();
    let layout = Layout(path.clone());
    let ztocs = layout.soci_index().layers.iter().map(|l| l.digest).collect();
    Image { _dir: dir, layout, path, ztocs, big }
}

impl Image {
    fn at(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

#[test]
fn files_come_out_as_they_are_in_the_layer() {
    let image = image();
    for ztoc in &image.ztocs {
        let get = |name: &str| soci(["ztoc", "get-file", "--layout", image.at(), &ztoc.to_string(), name]);
        assert_eq!(get("usr/big").ok().stdout, image.big);
        assert_eq!(get("link2").ok().stdout, image.big);
        assert_eq!(get("etc/hostname").ok().stdout, b"h\n");
        assert_eq!(get("empty").ok().stdout, b"");
        get("/usr/big").failed(&["file /usr/big does not exist in metadata"]);
        get("a").failed(&["links in a circle"]);

        let out = image.path.join("saved");
        soci(["ztoc", "get-file", "-o", out.to_str().unwrap(), "--layout", image.at(), &ztoc.to_string(), "usr/big"])
            .ok();
        assert_eq!(std::fs::read(&out).unwrap(), image.big);
        assert_eq!(std::fs::metadata(&out).unwrap().permissions().mode() & 0o400, 0o400);

        // Beside its layout, the file of the blob is enough.
        let file = image.layout.blob_path(*ztoc);
        assert_eq!(soci(["ztoc", "get-file", file.to_str().unwrap(), "etc/hostname"]).ok().stdout, b"h\n");
    }
}

#[test]
fn a_damaged_layer_gives_an_error_and_no_wrong_byte() {
    let image = image();
    let ztoc = image.ztocs[0];
    let index = image.layout.soci_index();
    let layer: Digest = index.layers[0].annotations[annotation::LAYER_DIGEST].parse().unwrap();
    let path = image.layout.blob_path(layer);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let saved = image.path.join("saved");
    let ran =
        soci(["ztoc", "get-file", "-o", saved.to_str().unwrap(), "--layout", image.at(), &ztoc.to_string(), "usr/big"]);
    ran.failed(&["span digests do not match"]);
    assert!(!saved.exists());
    std::fs::write(&path, &bytes[..middle]).unwrap();
    soci(["ztoc", "get-file", "--layout", image.at(), &ztoc.to_string(), "usr/big"]).failed(&["the layer has"]);
    std::fs::remove_file(&path).unwrap();
    soci(["ztoc", "get-file", "--layout", image.at(), &ztoc.to_string(), "usr/big"]).failed(&["is not in", "--layout"]);
}

#[test]
fn the_output_is_that_of_the_go_transcript() {
    let transcript: Value = serde_json::from_slice(include_bytes!("../data/golden-cli.json")).unwrap();
    let steps = transcript["steps"].as_array().unwrap();
    let step = |args: &[&str]| steps.iter().find(|s| s["args"] == Value::from(args.to_vec())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden-convert.tar.gz");
    super::tar(&["-C", dir.path().to_str().unwrap(), "-xzf", data, "convert/single"]);
    // The transcript's zTOCs have a span size of zero.
    let store = dir.path().join("root/content");
    std::fs::create_dir_all(dir.path().join("root")).unwrap();
    convert(&dir.path().join("convert/single/in"), &store, &["--span-size", "0", "--platform", "linux/amd64"]).ok();
    let root = dir.path().join("root");
    let in_store = |args: &[&str]| {
        let global = ["--content-store", "soci", "--root", root.to_str().unwrap()];
        soci(global.iter().chain(args))
    };

    let ztoc = "sha256:080d8e44836ee45702d8262c01fb3785f6c3bec55c3458e6505eb553f5b6c7cd";
    let info = ["ztoc", "info", ztoc];
    assert_eq!(in_store(&info).ok().text(), step(&info)["stdout"].as_str().unwrap());
    // Also the index, from its canonical form.
    let index = "sha256:2d59c952cff20d23eb02b11a4854250708caed2ea6594464cdd32e6c569dee4c";
    let info = ["index", "info", index];
    let want = step(&info)["stdout"].as_str().unwrap();
    let manifest: soci::oci::Manifest = serde_json::from_str(want).unwrap();
    let digest = Layout(store.clone()).blob(media_type::OCI_MANIFEST, &manifest.to_canonical_json()).digest;
    assert_eq!(digest.to_string(), index);
    assert_eq!(in_store(&info).ok().text(), want);

    for args in [
        &["index", "info", "sha256:0000000000000000000000000000000000000000000000000000000000000000"][..],
        &["ztoc", "info", "sha256:0000000000000000000000000000000000000000000000000000000000000000"],
        &["index", "info"],
        &["index", "info", "bogus"],
        &["ztoc", "get-file", ztoc],
        &["ztoc", "get-file", ztoc, "opt/huge/nope"],
        &["ztoc", "get-file", "-o", "x.out", ztoc, "opt/huge/m3.bin"],
    ] {
        in_store(args).failed(&[step(args)["stderr"].as_str().unwrap().trim_end()]);
    }
    in_store(&["index", "info", ztoc])
        .failed(&["the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\""]);
    in_store(&["ztoc", "info", index]).failed(&["the provided digest belongs to a SOCI index. Use `soci index info`"]);
}

#[test]
fn stores_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"x").to_string();
    let (root, address) = (dir.path().join("root"), dir.path().join("no.sock"));
    let here = ["--root", root.to_str().unwrap(), "--address", address.to_str().unwrap()];
    for store in [&[][..], &["--content-store", "containerd"], &["--content-store="]] {
        soci(here.iter().chain(store).copied().chain(["ztoc", "info", &digest])).failed(&[
            "cannot reach containerd at ",
            "no.sock",
            "--address",
        ]);
    }
    soci(["--content-store", "bogus", "ztoc", "info", &digest])
        .failed(&["unknown content store type: bogus; must be one of [soci containerd]"]);
    soci(["--content-store", "soci", "--root", "/nonexistent", "index", "info", &digest])
        .failed(&[&format!("couldn't retrieve artifact for {digest}, not found")]);
}

#[test]
fn what_is_neither_a_ztoc_nor_an_index_is_said_to_be_so() {
    let image = image();
    let converted = image.layout.converted();
    let manifest = converted.manifests[0].digest.to_string();
    soci(["index", "info", "--layout", image.at(), &manifest]).failed(&["is not a SOCI index but an image manifest"]);
    soci(["ztoc", "info", "--layout", image.at(), &manifest]).failed(&["is not a ztoc"]);
    let odd = image.path.join("odd");
    std::fs::write(&odd, [0xff; 100]).unwrap();
    soci(["ztoc", "info", odd.to_str().unwrap()]).failed(&["is not a ztoc"]);
    soci(["index", "info", odd.to_str().unwrap()]).failed(&["is not a SOCI index but something else"]);
    // A blob that is not what its name says is not shown.
    let path = image.layout.blob_path(image.ztocs[0]);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, [0xff; 100]).unwrap();
    soci(["ztoc", "info", "--layout", image.at(), &image.ztocs[0].to_string()]).failed(&["is damaged"]);
}

#[test]
fn an_archive_serves_as_a_layout_too() {
    let image = image();
    let archive = image.path.join("../image.tar");
    soci([
        "convert",
        "--standalone",
        "--min-layer-size",
        "0",
        "--span-size",
        "65536",
        image.at(),
        archive.to_str().unwrap(),
    ])
    .ok();
    let get = ["ztoc", "get-file", "--layout", archive.to_str().unwrap(), &image.ztocs[0].to_string(), "usr/big"];
    assert_eq!(soci(get).ok().stdout, image.big);
}
