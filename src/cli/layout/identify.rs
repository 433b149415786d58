//! What a path is, when it is not the OCI layout that was asked for, and what to do about it.

use super::archive::{self, Archive};
use std::{fmt, fs::File, os::unix::fs::FileExt, path::Path};

/// What was found. `Display` completes "failed to read index.json from PATH: ".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A tar file; whether it is a layout is for its index to say.
    Tar,
    Compressed {
        with: &'static str,
        command: &'static str,
    },
    DockerArchive,
    DockerDirectory,
    SkopeoDirectory,
    NestedLayout(String),
    RootFilesystem,
    TarOfSomething,
    ContainerdStore,
    BlobsOnly,
    EmptyDirectory,
    OtherDirectory,
    ManifestFile,
    IndexFile,
    ConfigFile,
    OtherJson,
    EmptyFile,
    OtherFile,
    Special,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CONVERT: &str = "write an OCI layout with \
            `skopeo copy docker-archive:FILE oci-archive:layout.tar`, or save it again with Docker 25 or later";
        match self {
            Identity::Tar => write!(f, "it is a tar file"),
            Identity::Compressed { with, command } => {
                write!(f, "it is compressed with {with}; unpack it first: `{command} FILE > layout.tar`")
            }
            Identity::DockerArchive => {
                write!(f, "it is a Docker archive (`docker save`) without index.json, not an OCI layout; {CONVERT}")
            }
            Identity::DockerDirectory => {
                write!(f, "it is an unpacked Docker archive (`docker save`) without index.json; {CONVERT}")
            }
            Identity::SkopeoDirectory => write!(
                f,
                "it is a directory of skopeo's dir: transport, not an OCI layout; write one with `skopeo copy --all dir:DIRECTORY oci:layout`"
            ),
            Identity::NestedLayout(directory) => write!(
                f,
                "the layout is in the directory {directory:?} of the tar file; it must be at the top: `tar -C {directory} -cf layout.tar .`"
            ),
            Identity::RootFilesystem => write!(
                f,
                "it is a tar file of a root filesystem (`docker export`, or a single layer), not an image in OCI layout"
            ),
            Identity::TarOfSomething => write!(f, "the tar file has no index.json: it is not an OCI layout"),
            Identity::ContainerdStore => write!(
                f,
                "it is containerd's content store, not an OCI layout; write one image with `ctr images export layout.tar REF`"
            ),
            Identity::BlobsOnly => {
                write!(f, "the directory has blobs, but no index.json that says which of them is the image")
            }
            Identity::EmptyDirectory => write!(f, "the directory is empty"),
            Identity::OtherDirectory => {
                write!(f, "no such file: the directory is not an OCI layout (index.json, oci-layout and blobs/)")
            }
            Identity::ManifestFile => write!(
                f,
                "it is a single image manifest; name the OCI layout (directory or tar file) that holds it together with its blobs"
            ),
            Identity::IndexFile => write!(
                f,
                "it is a single image index; name the OCI layout (directory or tar file) that holds it together with its blobs"
            ),
            Identity::ConfigFile => write!(f, "it is an image configuration, not an OCI layout"),
            Identity::OtherJson => write!(f, "it is a JSON file, not an OCI layout"),
            Identity::EmptyFile => write!(f, "the file is empty"),
            Identity::OtherFile => write!(f, "it is neither a directory nor a tar file"),
            Identity::Special => {
                write!(f, "it is neither a directory nor a regular file; save what it gives to a file first")
            }
        }
    }
}

/// How much of a file is looked at: a tar header, and enough JSON to know a document.
const LOOK: usize = 64 << 10;

/// What a regular file is, by its first bytes.
pub fn file(file: &File) -> std::io::Result<Identity> {
    let mut bytes = vec![0; LOOK];
    let mut length = 0;
    while length < LOOK {
        match file.read_at(&mut bytes[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    bytes.truncate(length);
    Ok(bytes_of_file(&bytes))
}

fn bytes_of_file(bytes: &[u8]) -> Identity {
    let compressed = |with, command| Identity::Compressed { with, command };
    match bytes {
        [] => return Identity::EmptyFile,
        [0x1f, 0x8b, ..] => return compressed("gzip", "gzip -dc"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return compressed("zstd", "zstd -dc"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => return compressed("xz", "xz -dc"),
        [b'B', b'Z', b'h', ..] => return compressed("bzip2", "bzip2 -dc"),
        [0x04, 0x22, 0x4d, 0x18, ..] => return compressed("lz4", "lz4 -dc"),
        _ => {}
    }
    let block = bytes.first_chunk::<512>();
    if block.is_some_and(|block| archive::is_header(block) || block.iter().all(|b| *b == 0)) {
        return Identity::Tar;
    }
    if bytes.trim_ascii_start().first() == Some(&b'{') {
        // A document longer than what we look at does not parse; its first keys still tell.
        let text = String::from_utf8_lossy(bytes);
        return if text.contains("\"manifests\"") {
            Identity::IndexFile
        } else if text.contains("\"layers\"") && text.contains("\"config\"") {
            Identity::ManifestFile
        } else if text.contains("\"rootfs\"") {
            Identity::ConfigFile
        } else {
            Identity::OtherJson
        };
    }
    Identity::OtherFile
}

/// What a tar file without `index.json` is.
pub fn archive(archive: &Archive) -> Identity {
    match archive {
        Archive { docker: true, .. } => Identity::DockerArchive,
        Archive { nested: Some(directory), .. } => Identity::NestedLayout(directory.clone()),
        Archive { rootfs: true, .. } => Identity::RootFilesystem,
        _ => Identity::TarOfSomething,
    }
}

/// What a directory without `index.json` is.
pub fn directory(path: &Path) -> Identity {
    let has = |name: &str| path.join(name).exists();
    let version = std::fs::File::open(path.join("version")).and_then(|file| {
        let mut start = [0; 17];
        file.read_exact_at(&mut start, 0).map(|()| start)
    });
    if version.is_ok_and(|start| start.starts_with(b"Directory Transpo")) {
        Identity::SkopeoDirectory
    } else if has("manifest.json") || has("repositories") {
        Identity::DockerDirectory
    } else if has("io.containerd.content.v1.content") || (has("blobs") && has("ingest")) {
        Identity::ContainerdStore
    } else if has("blobs") {
        Identity::BlobsOnly
    } else if std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none()) {
        Identity::EmptyDirectory
    } else {
        Identity::OtherDirectory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let is = bytes_of_file;
        assert_eq!(is(b""), Identity::EmptyFile);
        assert!(is(b"\x1f\x8b\x08").to_string().contains("gzip -dc"));
        assert!(is(b"\x28\xb5\x2f\xfd").to_string().contains("zstd"));
        assert_eq!(is(b" {\"schemaVersion\":2,\"manifests\":[]}"), Identity::IndexFile);
        assert_eq!(is(b"{\"config\":{},\"layers\":[]}"), Identity::ManifestFile);
        assert_eq!(is(b"{\"config\":{},\"rootfs\":{}}"), Identity::ConfigFile);
        assert_eq!(is(b"{\"a\":1}"), Identity::OtherJson);
        assert_eq!(is(&[7; 2000]), Identity::OtherFile);
        assert_eq!(is(&[0; 1024]), Identity::Tar);
    }
}
