//! The `soci` tool as a black box.

mod access;
mod artifacts;
mod golden;
mod hostile;
mod images;
mod lab;
mod layouts;
mod push;
mod screen;
mod transcript;
mod usage;
mod words;

use soci::oci::{Descriptor, Digest, Index, Manifest, Platform, media_type, to_canonical_json};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

fn command() -> Command {
    // As from a terminal: Ctrl-C is ignored by what a script starts in the background, which the tests may be.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_soci")]);
    command.env_remove("CONTAINERD_ADDRESS").env_remove("CONTAINERD_NAMESPACE");
    command
}

/// How a run of `soci` ended.
#[derive(Debug)]
struct Ran {
    /// Exit status, or minus the number of the signal.
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ran {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    #[track_caller]
    fn ok(self) -> Ran {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// Failed with exit status 1, printed nothing on stdout, and said all of `parts`.
    #[track_caller]
    fn failed(self, parts: &[&str]) {
        assert_eq!(self.code, 1, "{}", self.stderr);
        assert_eq!(String::from_utf8_lossy(&self.stdout), "");
        parts.iter().for_each(|part| assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr));
        assert!(self.stderr.contains("soci: "), "{}", self.stderr);
    }
}

fn soci<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let output = command().args(args).output().unwrap();
    let code = output.status.code().unwrap_or_else(|| -output.status.signal().unwrap());
    Ran { code, stdout: output.stdout, stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}

/// `soci convert --standalone --format oci-dir --min-layer-size 0 MORE… SOURCE DESTINATION`
fn convert(source: &Path, destination: &Path, more: &[&str]) -> Ran {
    let mut args: Vec<&OsStr> = ["convert", "--standalone", "--format", "oci-dir", "--min-layer-size", "0"]
        .into_iter()
        .chain(more.iter().copied())
        .map(OsStr::new)
        .collect();
    args.extend([source.as_os_str(), destination.as_os_str()]);
    soci(args)
}

fn tar(args: &[&str]) {
    assert!(Command::new("tar").args(args).status().unwrap().success(), "tar {args:?}");
}

/// A layout that a test puts together.
struct Layout(PathBuf);

impl Layout {
    fn new(path: impl Into<PathBuf>) -> Layout {
        let path = path.into();
        std::fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        std::fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout(path)
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.0.join("blobs/sha256").join(digest.hex())
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        std::fs::write(self.blob_path(Digest::of(bytes)), bytes).unwrap();
        Descriptor::of(media_type, bytes)
    }

    /// An image manifest; its descriptor has no platform.
    fn image(&self, platform: &str, layers: Vec<Descriptor>) -> Descriptor {
        let (os, architecture) = platform.split_once('/').unwrap();
        let config = format!(r#"{{"architecture":"{architecture}","os":"{os}","rootfs":{{"type":"layers"}}}}"#);
        let config = self.blob(media_type::OCI_CONFIG, config.as_bytes());
        self.manifest(config, layers)
    }

    fn manifest(&self, config: Descriptor, layers: Vec<Descriptor>) -> Descriptor {
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.into(),
            artifact_type: String::new(),
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        self.blob(media_type::OCI_MANIFEST, &manifest.to_canonical_json())
    }

    fn index_of(manifests: Vec<Descriptor>) -> Index {
        Index {
            schema_version: 2,
            media_type: media_type::OCI_INDEX.into(),
            artifact_type: String::new(),
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// `index.json` with one entry, an index of `manifests`.
    fn list(&self, manifests: Vec<Descriptor>) {
        let list = self.blob(media_type::OCI_INDEX, &to_canonical_json(&Layout::index_of(manifests)));
        self.top(vec![list]);
    }

    /// `index.json`.
    fn top(&self, manifests: Vec<Descriptor>) {
        std::fs::write(self.0.join("index.json"), to_canonical_json(&Layout::index_of(manifests))).unwrap();
    }

    fn read<T: serde::de::DeserializeOwned>(&self, digest: Digest) -> T {
        let bytes = std::fs::read(self.blob_path(digest)).unwrap();
        assert_eq!(Digest::of(&bytes), digest);
        serde_json::from_slice(&bytes).unwrap()
    }

    /// The converted image that `index.json` names.
    fn converted(&self) -> Index {
        let top: Index = serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap();
        assert_eq!(top.manifests.len(), 1);
        self.read(top.manifests[0].digest)
    }

    /// The SOCI index of the first converted platform.
    fn soci_index(&self) -> Manifest {
        let index = self.converted();
        let entry = index.manifests.iter().find(|e| e.artifact_type == media_type::SOCI_INDEX_V2).unwrap();
        self.read(entry.digest)
    }
}

fn platform(text: &str) -> Option<Platform> {
    let (os, architecture) = text.split_once('/')?;
    Some(Platform { os: os.into(), architecture: architecture.into(), ..Platform::default() })
}

/// A tar archive of regular files.
fn tarball(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, bytes) in files {
        out.extend_from_slice(&tar_header(name, bytes.len() as u64));
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn tar_header(name: &str, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[136..148].copy_from_slice(b"00000000000\0");
    block[148..156].copy_from_slice(b"        ");
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A gzip layer with one file.
fn layer(name: &str, bytes: &[u8]) -> Vec<u8> {
    gzip(&tarball(&[(name, bytes)]))
}

/// Names in a directory.
fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
