//! Conversions whose results are known: what the Go CLI made of the same layouts, with the same flags.
//!
//! `tests/data/golden-convert.tar.gz` holds the layouts and `manifest.json`; new blobs are known by their digests, which are
//! their names.

use super::{Layout, convert, names, soci, tar};
use serde_json::Value;
use soci::oci::{Digest, annotation};
use std::{collections::HashMap, path::Path};

fn unpack() -> (tempfile::TempDir, HashMap<String, Value>) {
    let dir = tempfile::tempdir().unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden-convert.tar.gz");
    tar(&["-C", dir.path().to_str().unwrap(), "-xzf", data]);
    let manifest = std::fs::read(dir.path().join("convert/manifest.json")).unwrap();
    (dir, serde_json::from_slice(&manifest).unwrap())
}

fn flags(case: &Value) -> Vec<&str> {
    case["flags"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect()
}

fn lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

/// Without the time of log lines.
fn timeless(stderr: &str) -> String {
    let line = |line: &str| match line.strip_prefix("time=\"").and_then(|l| l.split_once("\" ")) {
        Some((_, rest)) => rest.to_owned(),
        None => line.to_owned(),
    };
    stderr.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Where the Go CLI fails an image for one layer, and we leave the layer without a zTOC instead: the layer, part of the warning,
/// and the layer that is indexed all the same.
const ONE_BAD_LAYER: [(&str, &str, &str, &str); 2] = [
    ("corrupt_layer", "8e9b59c884c0", "the blob is damaged", "321e228a5fa4"),
    ("trailing_bytes", "4b17f543e62c", "gzip", "8d07e678acbb"),
];

/// Cases without a result in either tool. Go prints the lines of layers it had finished; we look for missing blobs first.
const FAILURES: [(&str, &str); 4] = [
    ("empty_top", "index.json contains no manifests"),
    ("missing_layer", "blob sha256:05b5558cba3fed6363c1c03ad77fd06d0cecb71c07c1c176ea6d491e326df3e6 not found"),
    ("no_layout", "failed to read index.json from "),
    ("too_small", "no ztocs created, all layers either skipped or produced errors"),
];

#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the default platform of the golden cases is linux/amd64")]
fn every_conversion_has_the_digests_and_blobs_of_the_go_cli() {
    let (dir, cases) = unpack();
    let mut compared = 0;
    for (name, case) in cases.iter().filter(|(_, case)| case["exit"] == 0) {
        let (source, out) = (dir.path().join("convert").join(name).join("in"), dir.path().join(name));
        // The Go run had no default for --min-layer-size 0, so its flags come last.
        let mut args = vec!["--min-layer-size", "10485760"];
        args.extend(flags(case));
        let ran = convert(&source, &out, &args);
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        assert_eq!(lines(ran.text()), lines(case["stdout"].as_str().unwrap()), "{name}");
        assert_eq!(timeless(&ran.stderr), timeless(case["stderr"].as_str().unwrap()), "{name}");
        let index: Value = serde_json::from_slice(&std::fs::read(out.join("index.json")).unwrap()).unwrap();
        assert_eq!(index, case["index_json"], "{name}");
        assert_eq!(Value::from(names(&out.join("blobs/sha256"))), case["all_blobs"], "{name}");
        for blob in names(&out.join("blobs/sha256")) {
            let bytes = std::fs::read(out.join("blobs/sha256").join(&blob)).unwrap();
            assert_eq!(Digest::of(&bytes).hex(), blob, "{name}");
        }

        again(name, case, &out, &args);
        archive(name, &source, &out, &args);
        compared += 1;
    }
    assert_eq!(compared + FAILURES.len() + ONE_BAD_LAYER.len(), cases.len());
}

/// Converting the result once more changes nothing.
fn again(name: &str, case: &Value, out: &Path, args: &[&str]) {
    let twice = out.with_extension("again");
    let ran = convert(out, &twice, args);
    assert_eq!(Value::from(ran.code), case["again"]["exit"], "{name}: {}", ran.stderr);
    if ran.code == 0 {
        let same = std::fs::read(out.join("index.json")).unwrap() == std::fs::read(twice.join("index.json")).unwrap();
        assert_eq!(Value::from(same), case["again"]["same"], "{name}");
    } else {
        assert!(ran.stderr.contains(case["again"]["stderr"].as_str().unwrap().trim()), "{name}: {}", ran.stderr);
    }
}

/// An archive has the same index, nothing that is not reachable, and can be read again.
fn archive(name: &str, source: &Path, out: &Path, args: &[&str]) {
    let (file, unpacked) = (out.with_extension("tar"), out.with_extension("unpacked"));
    let mut words = vec!["convert", "--standalone"];
    words.extend(["--min-layer-size", "0"]);
    words.extend(args);
    soci(words.iter().copied().chain([source.to_str().unwrap(), file.to_str().unwrap()])).ok();
    std::fs::create_dir(&unpacked).unwrap();
    tar(&["-C", unpacked.to_str().unwrap(), "-xf", file.to_str().unwrap()]);
    assert_eq!(names(&unpacked), ["blobs", "index.json", "oci-layout"], "{name}");
    let index = |path: &Path| std::fs::read(path.join("index.json")).unwrap();
    assert_eq!(index(&unpacked), index(out), "{name}");
    let (all, reachable) = (names(&out.join("blobs/sha256")), names(&unpacked.join("blobs/sha256")));
    assert!(reachable.iter().all(|blob| all.contains(blob)), "{name}");

    let from_archive = out.with_extension("from-archive");
    let ran = convert(&file, &from_archive, args);
    if name != "windows" {
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        assert_eq!(index(&from_archive), index(out), "{name}");
    }
}

#[test]
fn one_bad_layer_is_left_without_a_ztoc_where_the_go_cli_fails_the_image() {
    let (dir, cases) = unpack();
    for (name, bad, warning, good) in ONE_BAD_LAYER {
        let case = &cases[name];
        assert_eq!(case["exit"], 1);
        let (source, out) = (dir.path().join("convert").join(name).join("in"), dir.path().join(name));
        let ran = convert(&source, &out, &flags(case)).ok();
        // The line of the good layer is the one the Go CLI printed before it gave up.
        assert_eq!(ran.text(), case["stdout"].as_str().unwrap(), "{name}");
        assert!(ran.stderr.contains(&format!("layer sha256:{bad}")), "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains("level=warning") && ran.stderr.contains(warning), "{name}: {}", ran.stderr);
        let layers = Layout(out).soci_index().layers;
        assert_eq!(layers.len(), 1, "{name}");
        assert!(layers[0].annotations[annotation::LAYER_DIGEST].starts_with(&format!("sha256:{good}")), "{name}");
    }
}

#[test]
fn what_the_go_cli_refuses_is_refused_and_leaves_nothing_behind() {
    let (dir, cases) = unpack();
    for (name, message) in FAILURES {
        let case = &cases[name];
        assert_eq!(case["exit"], 1, "{name}");
        let place = dir.path().join(format!("out-{name}"));
        std::fs::create_dir(&place).unwrap();
        let source = dir.path().join("convert").join(name).join("in");
        for format in ["oci-dir", "oci-archive"] {
            let mut args = vec!["convert", "--standalone", "--format", format];
            args.extend(flags(case));
            let out = place.join("out");
            let ran = soci(args.iter().copied().chain([source.to_str().unwrap(), out.to_str().unwrap()]));
            assert_eq!(ran.code, 1, "{name}");
            assert!(ran.stderr.contains(message), "{name}: {}", ran.stderr);
            assert!(lines(ran.text()).iter().all(|l| case["stdout"].as_str().unwrap().contains(l)), "{name}");
            assert_eq!(names(&place), Vec::<String>::new(), "{name}");
        }
    }
}
