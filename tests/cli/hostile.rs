//! Layouts that lie, and ends that come early.

use super::{LAYER, Layout, TAR, command, convert, layer, names, platform, soci, tar_header, tarball};
use soci::oci::{Descriptor, Digest, media_type};
use std::{
    os::unix::{fs::symlink, process::ExitStatusExt},
    path::Path,
    time::{Duration, Instant},
};

/// A layout of one image with one layer; `tamper` changes it before it is converted.
fn refused(parts: &[&str], tamper: impl FnOnce(&Layout, &Descriptor)) {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let blob = image.blob(LAYER, &layer("a", b"a"));
    let manifest = image.image("linux/amd64", vec![blob]);
    image.top(vec![manifest.clone()]);
    tamper(&image, &manifest);
    let mut ran = convert(&image.0, &dir.path().join("out"), &[]);
    // Layers may have been indexed before the lie was found.
    ran.stdout.clear();
    ran.failed(parts);
    assert_eq!(names(dir.path()), ["in"]);
}

#[test]
fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    refused(&["is damaged: its bytes have the digest"], |image, manifest| {
        let path = image.blob_path(manifest.digest);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"schemaVersion\":2", "\"schemaVersion\":3")).unwrap();
    });
}

#[test]
fn sizes_are_checked_and_documents_bounded() {
    refused(&["but its descriptor says"], |image, manifest| {
        image.top(vec![Descriptor { size: manifest.size + 1, ..manifest.clone() }]);
    });
    refused(&["documents of more than 4194304 are not read"], |image, _| {
        let mut bytes = b"{\"schemaVersion\":2}".to_vec();
        bytes.resize(5 << 20, b' ');
        let big = image.blob(media_type::OCI_MANIFEST, &bytes);
        image.top(vec![big]);
    });
    refused(&["index.json has 5242880 bytes"], |image, _| {
        std::fs::write(image.0.join("index.json"), vec![b' '; 5 << 20]).unwrap();
    });
    refused(&["errors encountered while building soci layers", "but its descriptor says"], |image, manifest| {
        let mut manifest: soci::oci::Manifest = image.read(manifest.digest);
        manifest.layers[0].size -= 1;
        let shorter = image.manifest(manifest.config, manifest.layers);
        image.top(vec![shorter]);
    });
}

#[test]
fn a_digest_is_never_a_path() {
    for digest in ["sha256:../../../etc/passwd", "../../etc/passwd", "sha256:", "sha512:00", "sha256:ABCD"] {
        refused(&["index.json is not what it should be", "invalid digest"], |image, _| {
            let index = format!(
                r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{digest}","size":1}}]}}"#,
                media_type::OCI_MANIFEST
            );
            std::fs::write(image.0.join("index.json"), index).unwrap();
        });
    }
}

#[test]
fn nested_indexes_are_followed_so_far_and_no_further() {
    refused(&["levels of nested indexes"], |image, manifest| {
        let amd = Descriptor { platform: platform("linux/amd64"), ..manifest.clone() };
        let mut inner = amd.clone();
        for _ in 0..100 {
            let bytes = Layout::index_of(vec![inner]).to_canonical_json();
            inner = image.blob(media_type::OCI_INDEX, &bytes);
        }
        image.list(vec![amd, inner]);
    });
    refused(&["more than 1000 manifests"], |image, manifest| {
        image.list(vec![manifest.clone(); 1001]);
    });
}

#[test]
fn a_link_out_of_the_layout_shows_nothing_but_what_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let image = Layout::new(dir.path().join("in"));
    let (secret, elsewhere) = (dir.path().join("secret"), dir.path().join("elsewhere"));
    std::fs::write(&secret, layer("password", b"hunter2")).unwrap();
    // A blob kept elsewhere is fine: its bytes have the digest.
    let bytes = layer("a", b"a");
    let good = Descriptor::of(LAYER, &bytes);
    std::fs::write(&elsewhere, &bytes).unwrap();
    symlink(&elsewhere, image.blob_path(good.digest)).unwrap();
    let size = std::fs::metadata(&secret).unwrap().len();
    let manifest = image.image("linux/amd64", vec![good.clone()]);
    image.top(vec![manifest]);
    let archive = |name: &str| {
        let out = dir.path().join(name);
        soci(["convert", "--standalone", "--min-layer-size", "0", image.0.to_str().unwrap(), out.to_str().unwrap()])
    };
    archive("good.tar").ok();
    // One that is too small to be indexed is only copied, and still checked; one that nothing refers to is not copied at all.
    let bad = Descriptor::new("application/vnd.oci.image.layer.v1.tar+zstd", Digest::of(b"something"), size);
    symlink(&secret, image.blob_path(bad.digest)).unwrap();
    let out = dir.path().join("out");
    convert(&image.0, &out, &[]).ok();
    assert!(!out.join("blobs/sha256").join(bad.digest.hex()).exists());
    let manifest = image.image("linux/amd64", vec![good, bad]);
    image.top(vec![manifest]);
    let ran = archive("bad.tar");
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("is damaged"), "{}", ran.stderr);
    assert!(!dir.path().join("bad.tar").exists());
}

#[test]
fn a_fifo_is_not_waited_for() {
    refused(&["it is not a regular file"], |image, manifest| {
        let path = image.blob_path(manifest.digest);
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    });
}

#[test]
fn damaged_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let index = br#"{"schemaVersion":2,"manifests":[]}"#;
    let whole = tarball(&[("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#), ("index.json", index)]);
    let mut cases = vec![("cut", whole[..1536 + 10].to_vec(), "it ends in the middle of a file")];
    let mut flipped = whole.clone();
    flipped[1024] ^= 1;
    cases.push(("flipped", flipped, "wrong checksum"));
    let mut huge = tar_header("index.json", 0o77_777_777_777).to_vec();
    huge.resize(2048, 0);
    cases.push(("huge", huge, "it ends in the middle of a file"));
    let mut pax = tar_header("x", 20).to_vec();
    pax[156] = b'x';
    pax[148..156].copy_from_slice(b"        ");
    let sum: u32 = pax[..512].iter().map(|b| u32::from(*b)).sum();
    pax[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    pax.extend_from_slice(&[b'9'; 512]);
    pax.extend_from_slice(&whole);
    cases.push(("pax", pax, "an extended header is malformed"));
    for (name, bytes, part) in cases {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        convert(&path, &dir.path().join("out"), &[]).failed(&["is damaged", part]);
    }
    let path = dir.path().join("whole");
    std::fs::write(&path, whole).unwrap();
    convert(&path, &dir.path().join("out"), &[]).failed(&["index.json contains no manifests"]);
}

/// A layout whose layer takes minutes to read: a tar with a huge file, all of it a hole.
fn endless(path: &Path) -> Layout {
    const SIZE: u64 = 1 << 40;
    let image = Layout::new(path);
    let digest = Digest::of(b"endless");
    let file = std::fs::File::create(image.blob_path(digest)).unwrap();
    let mut header = tar_header("hole", 0);
    header[124..136].copy_from_slice(&[&[0x80, 0, 0, 0][..], &(SIZE - 1536).to_be_bytes()].concat());
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    std::io::Write::write_all(&mut &file, &header).unwrap();
    file.set_len(SIZE).unwrap();
    let manifest = image.image("linux/amd64", vec![Descriptor::new(TAR, digest, SIZE)]);
    image.top(vec![manifest]);
    image
}

#[test]
fn an_interrupted_conversion_leaves_nothing_behind() {
    for (signal, format) in [(2, "oci-dir"), (15, "oci-archive")] {
        let dir = tempfile::tempdir().unwrap();
        let image = endless(&dir.path().join("in"));
        let place = dir.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let mut child = command()
            .args(["convert", "--standalone", "--min-layer-size", "0", "--format", format])
            .arg(&image.0)
            .arg(place.join("out"))
            .spawn()
            .unwrap();
        let started = Instant::now();
        while names(&place).is_empty() {
            assert!(started.elapsed() < Duration::from_secs(60), "nothing was staged");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(100));
        assert!(
            std::process::Command::new("kill")
                .args([format!("-{signal}"), child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(signal), "{status}");
        assert_eq!(names(&place), Vec::<String>::new());
    }
}

#[test]
fn a_timeout_ends_a_conversion() {
    let dir = tempfile::tempdir().unwrap();
    let image = endless(&dir.path().join("in"));
    convert(&image.0, &dir.path().join("out"), &["--timeout", "300ms"]).failed(&["context deadline exceeded"]);
    assert_eq!(names(dir.path()), ["in"]);
}
